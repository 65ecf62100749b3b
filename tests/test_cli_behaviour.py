"""``probe copy-rate`` and ``probe task-split`` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from probe.cli import run
from probe.data.manifest import read_manifest
from probe.store import read_zarr
from tests.test_encoders import save_checkpoint


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every command runs in an empty directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def hues(tmp_path):
    """Files of plain colours: a pool, and queries beside it."""
    folder = tmp_path / "hues"
    folder.mkdir()
    colours = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
    for name, count in (("pool", 30), ("queries", 6)):
        lines = []
        for i in range(count):
            colour = list(colours)[i % 3]
            shade = tuple(min(255, part + 3 * i) for part in colours[colour])
            Image.new("RGB", (48, 32), shade).save(folder / f"{name}{i}.png")
            lines.append({"image": f"{name}{i}.png", "question": "colour?", "answer": colour})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def printed(capsys, *arguments: str) -> str:
    code = run(list(arguments))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def failure(capsys, *arguments: str) -> tuple[int, str]:
    code = run(list(arguments))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, " ".join(captured.err.split())


# ---------------------------------------------------------------------------------------------------------- copy-rate


def test_copy_rate_prints_the_published_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ("copy-rate", "--episodes", "8", "--shots", "2", "--out", "run", "--sweep")
    out = printed(capsys, *arguments)
    for group in ("RS, 2 shots", "SI, 2 shots", "SQ, 2 shots", "SQA, 2 shots", "sole, 2 shots", "sole-wrong, 1 shot"):
        assert group in out
    assert "87.7 / 89.5" in out
    assert "seeded" in out  # the caveat
    assert "<html" in Path("run/copy_rate.html").read_text()[:200]
    result = read_zarr(Path("run/result.zarr"))
    episodes = read_manifest(Path("run/episodes.jsonl"))
    assert [episode.id for episode in episodes] == result["episode"].values.tolist()
    assert set(result["strategy"].values.tolist()) == {"RS", "SI", "SQ", "SQA", "sole", "sole-wrong"}
    assert {e.info["order"] for e in episodes if e.strategy != "RS"} == {"similar-last"}
    assert result["sweep_said_planted"].sizes == {"level": 4, "repetition": 3, "sweep_episode": 8}
    again = json.loads(printed(capsys, *arguments, "--json"))
    assert again["reused"]
    assert again["groups"][0]["strategy"] == "RS"
    assert again["groups"][0]["copy_rate"]["n"] == 8
    assert 0 <= again["groups"][0]["copy_rate"]["low"] <= again["groups"][0]["copy_rate"]["estimate"]


def test_copy_rate_on_data_of_ones_own_with_pseudo_answers(capsys, hues, tmp_path):
    data = ("--data", str(hues / "queries.jsonl"), "--pool", str(hues / "pool.jsonl"))
    arguments = ("copy-rate", *data, "--choose", "SQPA,SI-Q,RS", "--text-encoder", "tfidf", "--shots", "3")
    found = json.loads(printed(capsys, *arguments, "--out", "run", "--order", "similar-first", "--json"))
    assert [group["strategy"] for group in found["groups"]] == ["SQPA", "SI-Q", "RS"]
    episodes = read_manifest(Path("run/episodes.jsonl"))
    assert len(episodes) == 18
    asked = [[e.query.id for e in episodes if e.strategy == name] for name in ("SQPA", "SI-Q", "RS")]
    assert asked[0] == asked[1] == asked[2]
    assert all(x.id.startswith("pool-") for e in episodes for x in e.demonstrations)
    assert all(e.query.id.startswith("queries-") for e in episodes)
    assert "tf-idf" in episodes[0].info["encoders"]["question+answer"]
    assert Path("probe-runs/vectors.sqlite").exists()


def test_copy_rate_with_a_checkpoint_as_encoder_and_perturbed_queries(capsys, hues, tmp_path):
    encoder = tmp_path / "clip"
    save_checkpoint("clip", encoder)
    data = ("--data", str(hues / "pool.jsonl"), "--episodes", "4", "--shots", "1", "--out", "run")
    choice = ("--choose", "SI", "--image-encoder", str(encoder), "--perturb", "blurred-query", "--no-counterfactual")
    found = json.loads(printed(capsys, "copy-rate", *data, *choice, "--json"))
    assert found["groups"][0]["counterfactual"]["estimate"] is None
    episodes = read_manifest(Path("run/episodes.jsonl"))
    assert all(e.perturbations == ("blurred-query (seed 0)",) for e in episodes)
    assert str(encoder) in episodes[0].info["encoders"]["image"]


def test_copy_rate_of_whole_episodes(capsys):
    found = json.loads(
        printed(capsys, "copy-rate", "--task", "binding-cued", "--episodes", "6", "--shots", "4", "--json")
    )
    [group] = found["groups"]
    assert group["strategy"] == "synthetic:binding-cued"
    assert group["null"]["estimate"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--choose", "SX"), "no strategy 'SX'"),
        (("--choose", "SI", "--task", "binding-cued"), "demonstrations cannot be chosen"),
        (("--sweep", "--task", "binding-cued"), "--sweep needs a pool"),
        (("--sweep", "--perturb", "blurred-query"), "leave out --perturb"),
        (("--perturb", "blurry"), "no perturbation 'blurry'"),
        (("--shots", "0"), "1 or more"),
        (("--pool", "pool.jsonl"), "--pool and --format belong to --data"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--data", ".", "--format", "vqav3"), "vqav3"),
        (("--image-encoder", "no/such/encoder"), "no/such/encoder"),
        (("--seed", "-1"), "--seed 0 or more"),
    ],
)
def test_copy_rate_refuses(capsys, here, arguments, words):
    code, message = failure(capsys, "copy-rate", "--episodes", "4", *arguments)
    assert code in (1, 2)
    assert words in message
    assert not list(here.rglob("result.zarr"))


def test_a_pool_without_images_and_one_too_small(capsys, here):
    lines = [{"image": None, "question": "colour?", "answer": ("red", "blue")[i % 2]} for i in range(6)]
    Path("texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, message = failure(capsys, "copy-rate", "--data", "texts.jsonl")
    assert code == 2
    assert "'texts-1' has no image, but SI compares images; choose by text" in message
    code, message = failure(capsys, "copy-rate", "--data", "texts.jsonl", "--choose", "SQ", "--shots", "9")
    assert "9 shots need 9 examples besides the query, but there are 5" in message


def test_copy_rate_goes_on_where_it_stopped(capsys, monkeypatch):
    from probe.experiments import answering as module

    true, calls = module._answer, []

    def stops(model, episodes, *rest):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return true(model, episodes, *rest)

    arguments = ("copy-rate", "--choose", "RS", "--episodes", "6", "--shots", "2", "--batch-size", "2", "--out", "run")
    monkeypatch.setattr(module, "_answer", stops)
    assert run(list(arguments)) == 130
    assert len(list(Path("run/parts").iterdir())) == 2
    monkeypatch.setattr(module, "_answer", lambda *rest: calls.append(1) or true(*rest))
    capsys.readouterr()
    interrupted = json.loads(printed(capsys, *arguments, "--json"))
    assert len(calls) == 6  # three batches, twice, each read once
    whole = json.loads(printed(capsys, *arguments[:-1], "whole", "--json"))
    assert interrupted["groups"] == whole["groups"]


# --------------------------------------------------------------------------------------------------------- task-split


def test_task_split_with_its_twin(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ("task-split", "--episodes", "6", "--shots", "0,2", "--seeds", "2", "--out", "run")
    out = printed(capsys, *arguments)
    for words in (
        "with images",
        "text-only twin",
        "TR (random labels)",
        "TL (symbols)",
        "unknown to toy",
        "not measured",
    ):
        assert words in out
    result = read_zarr(Path("run/result.zarr"))
    assert dict(result.sizes) == {"shown": 2, "setting": 5, "shot": 2, "episode": 12}
    assert sorted(set(result["seed"].values.tolist())) == [0, 1]
    assert "<html" in Path("run/task_split.html").read_text()[:200]
    again = json.loads(printed(capsys, *arguments, "--json"))
    assert again["reused"]
    assert again["shown"]["images"]["gold"]["2"]["n"] == 12
    assert again["shown"]["words"]["words"]["0"]["accuracy"]["estimate"] is None


def test_task_split_measures_reliance_where_questions_differ(capsys):
    arguments = ("task-split", "--task", "vqa", "--episodes", "5", "--shots", "0", "--seeds", "1", "--out", "run")
    found = json.loads(printed(capsys, *arguments, "--json"))
    assert found["reliance"]["linguistic"]["estimate"] > 0
    assert read_zarr(Path("run/result.zarr"))["reliance_score"].sizes == {"reading": 3, "reliance_episode": 5}


def test_task_split_on_data_of_ones_own(capsys, hues):
    data = ("--data", str(hues / "pool.jsonl"), "--episodes", "6", "--shots", "0,3", "--seeds", "1")
    found = json.loads(printed(capsys, "task-split", *data, "--symbols", "dax,wug,fep,toma", "--labels", "3", "--json"))
    assert list(found["shown"]) == ["images"]
    cell = found["shown"]["images"]["gold"]["3"]
    episodes = read_manifest(Path(found["directory"]) / "episodes.jsonl")
    assert cell["n"] == len(episodes) == 6
    commonest = episodes[0].info["label_set"][0]
    prior = sum(e.query.answer == commonest for e in episodes) / 6
    assert cell["guess"] == pytest.approx(max(1 / 3, prior))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shots", "four"), "write 0,1,2,4"),
        (("--shots", "-1"), "write 0,1,2,4"),
        (("--labels", "1"), "--labels 2 or more"),
        (("--symbols", "@"), "fewer than two"),
        (("--task", "binding-cued"), "cannot be pooled"),
        (("--task", "describe", "--shots", "700"), "two answers with enough examples"),
    ],
)
def test_task_split_refuses(capsys, here, arguments, words):
    code, message = failure(capsys, "task-split", "--episodes", "3", "--seeds", "1", *arguments)
    assert code == 2
    assert words in message
    assert not list(here.rglob("result.zarr"))


def test_the_help_teaches(capsys):
    for command, words in (("copy-rate", "--image-encoder"), ("task-split", "--symbols")):
        assert run([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert words in out
        assert f"probe {command}" in out
