"""``probe vector`` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from probe.cli import run
from probe.data.manifest import read_manifest
from probe.store import read_zarr
from probe.vectors.vector import InContextVector

TRAIN = (
    "vector",
    "train",
    "--episodes",
    "20",
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--shots",
    "2",
    "--out",
    "trained",
)
QUERIES = ("--episodes", "12", "--shots", "2")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every command runs in an empty directory, on a terminal that is wide enough for its tables."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("COLUMNS", "200")
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three methods, made once."""
    directory = tmp_path_factory.mktemp("vector") / "trained"
    assert run([*TRAIN[:-1], str(directory), "--method", "live,mimic:size=shared,mean-difference:layer=1"]) == 0
    return directory


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


def test_training_keeps_vectors_curves_and_a_picture(trained, capsys):
    out = printed(capsys, *TRAIN[:-1], str(trained), "--method", "live,mimic:size=shared,mean-difference:layer=1")
    assert "was finished before" in out
    assert "seeded" in out  # the caveat
    names = sorted(path.name for path in (trained / "vectors").iterdir())
    assert names == [
        "live.2shot.20ep.seed0",
        "mean-difference_layer-1.2shot.20ep.seed0",
        "mimic_size-shared.2shot.20ep.seed0",
    ]
    assert not (trained / "training").exists()
    assert "<html" in (trained / "training.html").read_text()[:200]
    result = read_zarr(trained / "result.zarr")
    assert result["validation"].sel(vector=names[0]).notnull().sum() == 2
    assert result["validation"].sel(vector=names[1]).isnull().all()
    vector = InContextVector.load(trained / "vectors" / names[2])
    assert vector.method.size == "shared"
    assert vector.card["data"]["shots"] == [2]
    assert len(vector.card["data"]["queries"]) == 20
    assert len(read_manifest(trained / "episodes.jsonl")) == 20


def test_several_seeds_sizes_and_shots_in_one_go(capsys):
    many = ("--method", "live", "--seeds", "0,1", "--sizes", "10,20", "--shots", "1,2")
    small = ("--episodes", "20", "--epochs", "1", "--batch-size", "8", "--out", "trained")
    told = json.loads(printed(capsys, "vector", "train", *small, *many, "--json"))
    found = {(row["shots"], row["training_episodes"], row["training_seed"]) for row in told["found"]}
    assert found == {(k, n, seed) for k in (1, 2) for n in (10, 20) for seed in (0, 1)}
    assert len(list(Path("trained/vectors").iterdir())) == 8


def test_every_method_is_found_applied_and_compared(capsys):
    """Those of weights, of heads and of one layer, in one run."""
    methods = "hificl:pairs=2:rank_k=0,lora:rank=2,task-vector:layer=2,function-vector:layer=1:heads=2:prompts=3"
    printed(capsys, *TRAIN[:-1], "several", "--method", methods)
    places = sorted(Path("several/vectors").iterdir())
    names = (
        "function-vector_layer-1_heads-2_prompts-3",
        "hificl_pairs-2_rank_k-0",
        "lora_rank-2",
        "task-vector_layer-2",
    )
    assert [place.name for place in places] == [f"{name}.2shot.20ep.seed0" for name in names]
    for place in places:
        told = json.loads(printed(capsys, "vector", "apply", str(place), *QUERIES, "--out", place.name, "--json"))
        assert told["n_done"] == 12
    options = ("--cost", "--put-back", "--distances", "4", "--out", "compared")
    out = printed(capsys, "vector", "compare", "several", *QUERIES, *options)
    result = read_zarr(Path("compared/result.zarr"))
    assert result.sizes["way"] == 2 + 3 * len(places)
    assert all(name in out for name in names)
    answered = result["log_probability"].sel(way=[place.name for place in places])
    assert (abs(answered - result["log_probability"].sel(way="zero-shot")) > 0).any("episode").all()
    parts = ("--parts", "layers", "--random", "0", "--distances", "0", "--out", "parts")
    printed(capsys, "vector", "compare", str(places[2]), *QUERIES, *parts)
    assert read_zarr(Path("parts/result.zarr")).sizes["way"] == 3 + 6
    code, said = failure(capsys, "vector", "compare", str(places[2]), *QUERIES, "--parts", "rows", "--out", "rows")
    assert code == 2
    assert "choose layers" in said


def test_training_goes_on_where_it_stopped(capsys, monkeypatch):
    """Killed in the second vector's second epoch; what comes out is what an uninterrupted run gives."""
    from probe.vectors import training

    methods = ("--method", "live,m2iv")
    steps, own = [], training.losses_of

    def dies(*arguments, **options):
        steps.append(1)
        if len(steps) == 11:
            raise KeyboardInterrupt
        return own(*arguments, **options)

    monkeypatch.setattr(training, "losses_of", dies)
    assert run([*TRAIN, *methods]) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert [path.name for path in Path("trained/vectors").iterdir()] == ["live.2shot.20ep.seed0"]
    assert list(Path("trained/training").glob("m2iv*/training.safetensors"))
    monkeypatch.setattr(training, "losses_of", own)
    printed(capsys, *TRAIN, *methods)
    printed(capsys, *TRAIN[:-1], "whole", *methods)
    for name in ("live.2shot.20ep.seed0", "m2iv.2shot.20ep.seed0"):
        ours, whole = (InContextVector.load(Path(place) / "vectors" / name) for place in ("trained", "whole"))
        assert ours.identity == whole.identity
        assert ours.card["curve"] == whole.card["curve"]


def test_apply_answers_with_the_vector_and_without(trained, capsys):
    place = str(trained / "vectors" / "live.2shot.20ep.seed0")
    out = printed(capsys, "vector", "apply", place, *QUERIES, "--out", "applied", "--scale", "0.5", "--layers", "1:3")
    assert "Accuracy without:" in out
    assert "12 of operator:3" in out  # the task that it was fitted on
    result = read_zarr(Path("applied/result.zarr"))
    assert result.attrs["scale"] == 0.5
    assert (result["shots"] == 0).all()
    assert not (result["log_probability"] == result["log_probability_without"]).any()
    told = json.loads(
        printed(capsys, "vector", "apply", place, *QUERIES, "--out", "none", "--scale", "0", "--layers", "1", "--json")
    )
    assert told["log_probability_change"] == pytest.approx(0, abs=1e-5)


def test_compare_shows_every_way(trained, capsys):
    out = printed(
        capsys, "vector", "compare", str(trained), *QUERIES, "--out", "compared", "--put-back", "--distances", "4"
    )
    for words in ("zero-shot", "few-shot", "mimic_size-shared.2shot", "random", "+ demonstrations", "recovered"):
        assert words in out
    result = read_zarr(Path("compared/result.zarr"))
    assert result.sizes["way"] == 2 + 3 * 3
    assert result["distance"].sel(way="few-shot").max() < 1e-3
    assert result["distance"].notnull().all("layer").any("way").sum() == 4
    assert "<html" in Path("compared/compare.html").read_text()[:200]
    again = json.loads(
        printed(
            capsys,
            "vector",
            "compare",
            str(trained),
            *QUERIES,
            "--out",
            "compared",
            "--put-back",
            "--distances",
            "4",
            "--json",
        )
    )
    assert again["reused"]


def test_compare_takes_a_vector_apart_and_measures_time(trained, capsys):
    place = str(trained / "vectors" / "mimic_size-shared.2shot.20ep.seed0")
    printed(
        capsys,
        "vector",
        "compare",
        place,
        *QUERIES,
        "--random",
        "0",
        "--parts",
        "layers",
        "--cost",
        "--out",
        "compared",
    )
    result = read_zarr(Path("compared/result.zarr"))
    assert [way for way in result["way"].values.tolist() if "layer" in way][-1].endswith("layer 5")
    whole = [way for way in result["way"].values.tolist() if "layer" not in way]
    assert result["first"].sel(way=whole).notnull().all()
    assert result["first"].sel(way="few-shot").median() > result["first"].sel(way="zero-shot").median()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("vector", "train", "--method", "lime"), 2, "There is no method 'lime'"),
        (("vector", "train", "--method", "live:kk=1"), 2, "no option 'kk'"),
        (("vector", "train", "--method", "live:kl"), 2, "NAME=VALUE"),
        (("vector", "train", "--method", "live,live"), 2, "twice"),
        (("vector", "train", "--method", "live:kl=0:ce=0"), 2, "nothing to learn from"),
        (("vector", "train", "--shots", "0"), 2, "--shots must be 1 or more"),
        (("vector", "train", "--seeds", "a"), 2, "not a list of numbers"),
        (("vector", "train", "--sizes", "400"), 2, "raise --episodes"),
        (("vector", "train", "--epochs", "0"), 2, "one epoch or more"),
        (("vector", "train", "--task", "operator:9"), 2, "There is no rule"),
        (("vector", "fit", "--method", "mean-difference:layer=77", "--episodes", "8"), 2, "layers 0 to 5"),
        (("vector", "apply", "nowhere"), 1, "There is no vector in nowhere"),
        (("vector", "compare"), 2, "Name a vector"),
        (("vector", "compare", "nowhere"), 1, "There is no vector"),
    ],
)
def test_bad_options(here, capsys, arguments, code, words):
    got, said = failure(capsys, *arguments)
    assert got == code, said
    assert words in said
    assert not list(here.glob("**/result.zarr"))


def test_queries_that_were_trained_on_are_refused(trained, capsys):
    code, said = failure(capsys, "vector", "compare", str(trained), *QUERIES, "--seed", "0")
    assert code == 2
    assert "fitted on" in said


def test_queries_that_were_trained_on_are_left_out_and_counted(trained, capsys):
    """A scene is four words in the text-only twin, so another seed asks some queries again."""
    small = ("--episodes", "40", "--shots", "1", "--task", "operator-text:3")
    printed(capsys, "vector", "fit", *small, "--method", "mean-difference:layer=1", "--out", "words")
    for command in (("compare", "words", "--random", "0", "--distances", "0"), ("apply", "words")):
        told = json.loads(printed(capsys, "vector", *command, *small, "--out", command[0], "--json"))
        assert told["n_left_out"] + told["n_done"] == 40
        assert 0 < told["n_left_out"] < 40
    assert "left out" in printed(capsys, "vector", "apply", "words", *small, "--out", "apply")


def test_no_shots_are_refused_and_not_replaced(trained, capsys):
    code, said = failure(capsys, "vector", "compare", str(trained), "--episodes", "4", "--shots", "0")
    assert code == 2
    assert "no demonstrations" in said


def test_vectors_of_another_model_and_damaged_ones_are_refused(trained, tmp_path, capsys):
    place = tmp_path / "vector"
    shutil.copytree(trained / "vectors" / "live.2shot.20ep.seed0", place)
    code, said = failure(capsys, "vector", "apply", str(place), *QUERIES, "--model", "toy-no-binding")
    assert code == 2
    assert "another model or revision" in said
    tensors = place / "vector.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"0000")
    code, said = failure(capsys, "vector", "apply", str(place), *QUERIES)
    assert code == 1
    assert "is not the file" in said
    (tmp_path / "vector.pt").write_bytes(b"\\x80\\x02}")
    code, said = failure(capsys, "vector", "apply", str(tmp_path / "vector.pt"), *QUERIES)
    assert code == 1
    assert "pickles" in said
