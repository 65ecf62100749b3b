"""Names of models: a cache in the layout of the Hub, read offline, and a sentence for each thing that can go wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.errors as hub
import pytest
from huggingface_hub import constants

from probe.errors import ProbeError, UsageError
from probe.models.load import load
from probe.models.names import ALIASES, FAMILIES, locate
from probe.store import read_zarr
from tests.tiny_qwen import save_checkpoint

REPOSITORY = "Qwen/Qwen2.5-VL-7B-Instruct"
COMMIT = hashlib.sha1(b"a commit").hexdigest()


def store(
    cache: Path, repository: str, checkpoint: Path, commit: str = COMMIT, refs: tuple[str, ...] = ("main",)
) -> Path:
    """Lay files down as huggingface_hub does: blobs by hash, links to them in a snapshot, a file for each ref."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for file in checkpoint.iterdir():
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What HF_HOME is for a user who has fetched the model once."""
    home = tmp_path_factory.mktemp("home")
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("files"), template="json", video=True)
    assert len(list(checkpoint.glob("model-0*-of-*.safetensors"))) > 1
    store(home / "hub", REPOSITORY, checkpoint, refs=("main", "v1.0"))
    llama = tmp_path_factory.mktemp("llama")
    (llama / "config.json").write_text('{"model_type": "llama"}')
    store(home / "hub", "someone/llama", llama)
    (llama / "config.json").unlink()
    return home


@pytest.fixture(autouse=True)
def offline(home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["qwen-vl", REPOSITORY, f"{REPOSITORY}@v1.0", f"{REPOSITORY}@{COMMIT}"])
def test_every_name_of_a_cached_model_finds_it(name):
    located = locate(name)
    assert located.name == name
    assert located.directory.name == COMMIT
    assert located.origin == f"{REPOSITORY}@{COMMIT}"
    assert located.family is FAMILIES["qwen2_5_vl"]


def test_the_literal_command_runs_offline_and_stamps_the_commit(home, tmp_path):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [Path(sys.executable).with_name("probe"), "attention-map", "--model", "qwen-vl"]
    command += ["--episodes", "4", "--shots", "1", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = read_zarr(tmp_path / "run" / "result.zarr")
    assert result.attrs["model"] == "qwen-vl"
    assert result.attrs["model_origin"] == f"{REPOSITORY}@{COMMIT}"
    assert result.attrs["model_family"] == "Qwen2.5-VL"


def test_a_directory_has_no_origin(home):
    assert load(home / "hub" / "models--Qwen--Qwen2.5-VL-7B-Instruct" / "snapshots" / COMMIT).origin == ""


def test_an_alias_is_not_shadowed_by_a_directory(tmp_path, monkeypatch):
    (tmp_path / "qwen-vl").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("qwen-vl").origin == f"{REPOSITORY}@{COMMIT}"


def test_no_two_families_claim_an_alias():
    assert len(ALIASES) == sum(len(family.aliases) for family in FAMILIES.values())
    assert all(repository.count("/") == 1 for repository in ALIASES.values())


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_model_that_is_not_here_and_cannot_be_fetched():
    with pytest.raises(ProbeError, match=r"qwen2\.5-vl-3b \(Qwen/.*\) is not on this machine.*hf download Qwen/"):
        locate("qwen2.5-vl-3b")


def test_a_family_that_cannot_be_read_is_refused_before_its_weights_are_fetched():
    with pytest.raises(UsageError, match=r"someone/llama is a 'llama' model; known families are.*Qwen2\.5-VL"):
        locate("someone/llama")


def test_a_missing_shard_in_the_cache(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    sorted(locate("qwen-vl").directory.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ProbeError, match="cannot be loaded"):
        load("qwen-vl")


def test_names_that_mean_nothing():
    with pytest.raises(UsageError, match="did you mean qwen-vl"):
        locate("qwen-v1")
    with pytest.raises(UsageError, match="write owner/name"):
        locate("-owner-/name--x")


def response(status: int) -> SimpleNamespace:
    return SimpleNamespace(headers={}, request=None, status_code=status)


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (hub.GatedRepoError("x", response=response(403)), ProbeError, "is gated: accept its terms at https://"),
        (hub.RepositoryNotFoundError("x", response=response(404)), UsageError, "no such repository, or it is private"),
        (hub.RevisionNotFoundError("x", response=response(404)), UsageError, "no revision 'v9'"),
        (hub.RemoteEntryNotFoundError("x", response=response(404)), UsageError, r"has no config\.json"),
        (
            hub.HfHubHTTPError("the Hub is down", response=response(500)),
            ProbeError,
            "cannot be fetched: the Hub is down",
        ),
        (OSError(28, "No space left on device"), ProbeError, "cannot be fetched: .*No space left"),
        (hub.LocalEntryNotFoundError("x"), ProbeError, "is not on this machine.* someone/model --revision v9"),
        (hub.IncompleteSnapshotError("x", "somewhere"), ProbeError, "only in part"),
    ],
)
def test_what_the_hub_answers_becomes_a_sentence(monkeypatch, error, kind, sentence):
    import huggingface_hub

    def refuse(*_arguments, **_options):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(kind, match=sentence):
        locate("someone/model@v9")
