"""``probe models``: what people see, and what a program gets."""

from __future__ import annotations

import json

import pytest

from probe.cli import run
from probe.experiments import certification
from probe.experiments.certification import CHECKS, Check
from probe.models.families import ALIASES, FAMILIES
from tests.tiny_families import save


def output(capsys, *arguments: str) -> str:
    assert run(["models", *arguments]) == 0
    return capsys.readouterr().out


def test_the_list_names_every_family_and_alias(capsys):
    text = output(capsys, "list")
    listed = json.loads(output(capsys, "list", "--json"))
    assert [family["family"] for family in listed["families"]] == [family.name for family in FAMILIES.values()]
    assert {alias: repo for family in listed["families"] for alias, repo in family["aliases"].items()} == dict(ALIASES)
    assert all(family.name in text for family in FAMILIES.values())
    assert listed["bundled"] == ["toy", "toy-no-binding"]


def test_info_reads_no_weights(tmp_path, capsys):
    directory = save("idefics", tmp_path / "idefics")
    for path in directory.glob("*.safetensors"):
        path.unlink()
    facts = json.loads(output(capsys, "info", str(directory), "--json"))
    assert facts["family"] == "Idefics"
    assert facts["cross_attention"] == "layers 0, 2"
    assert facts["prompt"] == "mimic"
    assert "layers 0, 2" in output(capsys, "info", str(directory))


def test_info_knows_windows(tmp_path, capsys):
    facts = json.loads(output(capsys, "info", str(save("gemma3", tmp_path / "gemma3")), "--json"))
    assert facts["sliding_windows"].endswith("layers, 8 keys")


def test_check_proves_the_bundled_model(capsys):
    got = json.loads(output(capsys, "check", "--json"))
    assert got["model"] == "toy"
    assert len(got["checks"]) == len(CHECKS)
    assert all(check["passed"] for check in got["checks"])


def test_a_failed_check_fails_the_command(capsys, monkeypatch):
    monkeypatch.setattr(certification, "CHECKS", (lambda case: Check("a thing", "not so", False),))
    assert run(["models", "check"]) == 1
    printed = capsys.readouterr()
    assert "NO" in printed.out
    assert "1 of 1 checks failed (a thing)" in " ".join(printed.err.split())


@pytest.mark.parametrize("command", ["info", "check"])
def test_names_that_mean_nothing(command, capsys):
    assert run(["models", command, "qwen-v"]) == 2
    assert "did you mean qwen-vl?" in " ".join(capsys.readouterr().err.split())
