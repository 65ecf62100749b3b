"""The store: what has a name is complete, and a run goes on where it was killed."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import xarray as xr

import probe
from probe.errors import ProbeError, UsageError
from probe.store import key, open_run, read_zarr, stamp, write_bytes, write_json, write_text, write_zarr

pytestmark = pytest.mark.filterwarnings("error")  # zarr warns of what may become unreadable

CONFIG: dict[str, object] = {"model": "toy", "shots": 4, "options": {"rows": "answer", "seed": 0}}


def make_dataset() -> xr.Dataset:
    """One of everything that a result may hold."""
    episodes = np.array(["a", "übung 日本", ""])
    return xr.Dataset(
        {
            "mass": (
                ("episode", "layer", "segment"),
                np.array([[[0.5, np.nan]], [[0.0, 1.0]], [[np.nan, np.nan]]], np.float32),
                {"unit": "probability"},
            ),
            "all_nan": ("episode", np.full(3, np.nan)),
            "zeros": ("episode", np.zeros(3)),
            "n_tokens": ("episode", np.array([0, -1, 127], np.int8)),
            "correct": ("episode", np.array([True, False, True])),
            "prediction": ("episode", np.array(["rot", "", "été 🦊"])),
            "seconds": ("episode", np.array([1.5, np.nan, 0.0]), {"units": "seconds"}),
            "age": ("episode", np.array([1.0, 2.0, np.nan]), {"units": "days since 2020-01-01"}),
            "nothing": (("episode", "none"), np.zeros((3, 0), np.float32)),
            "no_words": ("none", np.array([], dtype="<U1")),
            "scalar": ((), 3.25),
            "word": ((), "ä"),
        },
        coords={
            "episode": episodes,
            "layer": [3],
            "segment": ["sink", "demo0/image"],
            "role": ("segment", ["sink", "image"]),
            "unused": ("elsewhere", ["x"]),
        },
        attrs={
            "none": None,
            "yes": True,
            "n": 3,
            "x": 0.5,
            "ß": "é",
            "list": [1, [], {}],
            "nested": {"a": {"b": None}},
        },
    )


def number(value: float) -> xr.Dataset:
    return xr.Dataset({"x": ("episode", np.array([value]))}, coords={"episode": [f"e{value:.0f}"]})


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


# Files


def test_writers_write(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "a.bin", b"\x00\r\n")
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"\x00\r\n"
    write_text(tmp_path / "a.txt", "ü\n")
    assert (tmp_path / "a.txt").read_bytes() == "ü\n".encode()
    write_json(tmp_path / "a.json", {"b": [1, None, "ü"]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"b": [1, None, "ü"]}
    assert names(tmp_path) == {"new", "a.txt", "a.json"}
    assert names(tmp_path / "new") == {"a.bin"}


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(ProbeError, match=r"Cannot write .*a\.txt: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


@pytest.mark.parametrize(("value", "error"), [({"x": math.nan}, ValueError), ({"x": object()}, TypeError)])
def test_what_is_not_json_is_refused_before_anything_is_written(
    tmp_path: Path, value: object, error: type[Exception]
) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(error):
        write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text() == "1\n"
    assert names(tmp_path) == {"a.json"}


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProbeError, match="Cannot write"):
        write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(ProbeError, match="Cannot write"):
        write_zarr(tmp_path / "file" / "below", number(1))
    with pytest.raises(ProbeError, match="Cannot write"):
        write_text(tmp_path, "x")
    assert names(tmp_path) == {"file"}


# Datasets


@pytest.mark.parametrize("kind", ["U", "object", "StringDType"])
def test_a_dataset_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    dataset = make_dataset()
    kinds = {"U": np.dtype("U20"), "object": np.dtype(object), "StringDType": np.dtypes.StringDType()}
    given = dataset.assign(prediction=dataset.prediction.astype(kinds[kind]))
    given = given.assign_coords(episode=dataset.episode.astype(kinds[kind]), role=dataset.role.astype(kinds[kind]))
    write_zarr(tmp_path / "a.zarr", given)
    back = read_zarr(tmp_path / "a.zarr")
    xr.testing.assert_identical(back, dataset)
    for name, variable in dataset.variables.items():
        assert back[name].dtype.kind == variable.dtype.kind, name
        assert variable.dtype.kind == "U" or back[name].dtype == variable.dtype, name
        assert isinstance(back[name].variable._data, np.ndarray) or name in back.dims, name
    assert list(back.data_vars) == sorted(dataset.data_vars, key=str)
    assert back.sel(episode="übung 日本").prediction == ""
    assert names(tmp_path) == {"a.zarr"}


def test_the_file_that_a_dataset_came_from_does_not_decide_how_it_is_written(tmp_path: Path) -> None:
    write_zarr(tmp_path / "a.zarr", make_dataset())
    # read by xarray itself, which remembers the chunks
    with xr.open_zarr(tmp_path / "a.zarr", consolidated=False, chunks=None, decode_times=False) as opened:
        part = opened.load().isel(episode=slice(1, 3), segment=[1])
    both = xr.concat([part, part], "episode", data_vars="minimal", compat="override", coords="minimal")
    both["x"] = both.prediction.astype("U5")
    write_zarr(tmp_path / "a.zarr", both)
    xr.testing.assert_identical(read_zarr(tmp_path / "a.zarr"), both)
    assert names(tmp_path) == {"a.zarr"}


def test_a_large_variable_is_compressed_and_cut_along_its_first_dimension(tmp_path: Path) -> None:
    big = xr.Dataset({"x": (("token", "head"), np.tile(np.arange(64.0), (20_000, 1)))})
    write_zarr(tmp_path / "a.zarr", big)
    meta = json.loads((tmp_path / "a.zarr" / "x" / "zarr.json").read_text())
    assert meta["zarr_format"] == 3
    assert meta["chunk_grid"]["configuration"]["chunk_shape"] == [8192, 64]
    assert {"zstd", "blosc"} & {codec["name"] for codec in meta["codecs"]}
    assert sum(file.stat().st_size for file in (tmp_path / "a.zarr").rglob("*")) < big.nbytes / 20
    xr.testing.assert_identical(read_zarr(tmp_path / "a.zarr"), big)


@pytest.mark.parametrize("values", [np.array(["x", None], object), np.array(["2020-01-01"], "datetime64[ns]")])
def test_what_cannot_be_stored_exactly_is_refused(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(TypeError, match="'odd'"):
        write_zarr(tmp_path / "a.zarr", xr.Dataset({"odd": ("episode", values)}))
    assert not names(tmp_path)


def test_a_failing_dataset_leaves_the_old_one_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zarr"
    write_zarr(path, number(1))
    # fails in the middle, when some variables are written
    with pytest.raises(TypeError):
        write_zarr(path, number(2).assign_attrs(odd=object()))
    assert names(tmp_path) == {"a.zarr"}
    xr.testing.assert_identical(read_zarr(path), number(1))

    rename, calls = os.rename, []

    def fail_at_the_second(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_the_second)
    with pytest.raises(ProbeError, match="Input/output error"):
        write_zarr(path, number(2))
    assert names(tmp_path) == {"a.zarr"}
    xr.testing.assert_identical(read_zarr(path), number(1))


def test_an_unreadable_dataset_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="no saved dataset"):
        read_zarr(tmp_path / "none.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ProbeError, match="cannot be read"):
        read_zarr(tmp_path / "empty.zarr")
    write_zarr(tmp_path / "cut.zarr", number(1))
    (tmp_path / "cut.zarr" / "x" / "zarr.json").write_text("{")
    with pytest.raises(ProbeError, match="cannot be read"):
        read_zarr(tmp_path / "cut.zarr")
    write_zarr(tmp_path / "chunk.zarr", number(1))
    (tmp_path / "chunk.zarr" / "x" / "c" / "0").write_bytes(b"no")
    with pytest.raises(ProbeError, match="cannot be read"):
        read_zarr(tmp_path / "chunk.zarr")


# Key and stamp


def test_key_does_not_depend_on_order_or_on_the_kind_of_sequence() -> None:
    assert key({"a": 1, "b": {"c": (1, 2), "d": None}}) == key({"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert key({"path": Path("x") / "y"}) == key({"path": "x/y"})
    assert len(key({})) == 16
    assert int(key({}), 16) >= 0


def test_key_is_the_same_in_every_process() -> None:
    assert key(CONFIG) == "c2a316c8f1ccdcf2"


@pytest.mark.parametrize("other", [{"a": True}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": 1, "b": None}, {"a": [1]}])
def test_key_tells_configurations_apart(other: dict[str, object]) -> None:
    assert key(other) != key({"a": 1})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"a": {"b": [0, object()]}}, r"'a\.b\[1\]'"),
        ({"seed": np.int64(3)}, "'seed'"),
        ({"x": math.nan}, "'x'"),
        ({"x": {1, 2}}, "'x'"),
        ({"x": {1: 2}}, "'x'"),
    ],
)
def test_key_names_the_entry_that_is_not_json(config: dict[str, object], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        key(config)


def test_stamp_says_what_ran() -> None:
    made_by = stamp("probe attention --shots 4")
    assert made_by["command"] == "probe attention --shots 4"
    assert made_by["python_version"] == sys.version.split()[0]
    assert made_by["xarray_version"] == xr.__version__
    assert datetime.fromisoformat(str(made_by["created"])).utcoffset() is not None
    assert all(isinstance(value, str) for value in made_by.values())
    assert str(Path(sys.executable)) not in str(stamp()["command"])
    root = Path(probe.__file__).resolve().parents[1]
    assert ("commit" in made_by) <= (root / ".git").exists()
    if "commit" in made_by:
        assert len(str(made_by["commit"]).removesuffix("-dirty")) == 40


def test_stamp_repeats_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    script = tmp_path / "package" / "script.py"
    script.write_text("from probe.store import stamp\nprint(stamp()['command'])")
    environment = child_env()
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    for program, said in (([str(script)], "script.py"), (["-m", "package.script"], "python -m package.script")):
        arguments = [sys.executable, *program, "--data", "a b"]
        answer = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
        assert answer.stdout.strip() == f"{said} --data 'a b'"


def test_stamp_and_store_import_nothing_heavy() -> None:
    code = (
        "import sys, probe.store, probe.stats, probe.scoring; probe.store.stamp();"
        "print({'torch', 'numpy', 'xarray', 'zarr', 'scipy', 'transformers'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_env())
    assert answer.stdout.strip() == "set()"


def child_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(probe.__file__).resolve().parents[1])}


# Runs


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    directory = tmp_path / "some" / "where"
    with open_run(directory, CONFIG, command="probe it") as run:
        with pytest.raises(ProbeError, match="not finished"):
            run.result()
        record = json.loads((directory / "run.json").read_text("utf-8"))
        assert record["key"] == key(CONFIG)
        assert record["config"] == CONFIG
        assert record["stamp"]["command"] == "probe it"
        assert record["state"] == "running"
        write_text(run.path("notes.txt"), "mine")
        parts = [run.part(f"{i:03d}", partial(number, i)) for i in range(3)]
        assert names(directory / "parts") == {"000.zarr", "001.zarr", "002.zarr"}
        run.finish(xr.concat(parts, "episode"))
        assert run.finished
        assert list(run.result().x) == [0, 1, 2]
    assert names(directory) == {"run.json", "result.zarr", "notes.txt", ".lock"}

    with open_run(directory, CONFIG) as run:
        assert run.finished
        assert list(run.result().episode) == ["e0", "e1", "e2"]
        assert run.record["stamp"]["command"] == "probe it"
        with pytest.raises(RuntimeError, match="is finished"):
            run.part("000", lambda: number(0))
        with pytest.raises(RuntimeError, match="is finished"):
            run.finish(number(0))


def never() -> xr.Dataset:
    raise AssertionError("computed again")


def test_a_part_is_computed_once_and_is_the_same_before_and_after(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", CONFIG) as run:
        first = run.part("a", make_dataset)
        with pytest.raises(ZeroDivisionError):
            run.part("b", lambda: number(1 / 0))
        again = run.part("a", never)
    with open_run(tmp_path / "run", CONFIG) as run:
        later = run.part("a", never)
        assert float(run.part("b", lambda: number(2)).x[0]) == 2
    xr.testing.assert_identical(first, again)
    xr.testing.assert_identical(first, later)


@pytest.mark.parametrize("name", ["", ".a", "a/b", "../a", "a b", "a\n"])
def test_a_part_has_a_plain_name(tmp_path: Path, name: str) -> None:
    with open_run(tmp_path / "run", CONFIG) as run, pytest.raises(ValueError, match="named"):
        run.part(name, never)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/../../x", "/x", "run.json", "parts/a", "result.zarr", ".lock"])
def test_a_callers_file_stays_in_the_run_and_off_its_own(tmp_path: Path, name: str) -> None:
    with open_run(tmp_path / "run", CONFIG) as run, pytest.raises(ValueError, match="name"):
        run.path(name)


CHILD = """
import os, sys
from pathlib import Path
import numpy as np, xarray as xr
import probe.store.run as store_run
from probe.store import open_run

directory, mode, log = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

def compute(i):
    with log.open("a") as file:
        file.write(f"{i}\\n")
    rng = np.random.default_rng(i)
    return xr.Dataset({"x": (("episode", "head"), rng.normal(size=(2, 3)))}, coords={"episode": [f"ü{i}.0", f"ü{i}.1"]})

def stop():
    print("here", flush=True)
    sys.stdin.read()  # until killed

def stop_at(module, name, n):
    real, calls = getattr(module, name), []
    def wrapped(*args, **options):
        calls.append(args)
        if len(calls) == n:
            stop()
        return real(*args, **options)
    setattr(module, name, wrapped)

with open_run(directory, {"seed": 0}) as run:
    if mode == "part":
        stop_at(os, "rename", 3)  # the third part lies complete under its temporary name
    if mode == "result":
        stop_at(os, "rename", 6)
    if mode == "state":
        stop_at(store_run, "write_json", 1)  # the result is there; the state is about to be
    if mode == "parts":
        stop_at(store_run.shutil, "rmtree", 1)  # finished, its parts are not deleted yet
    if not run.finished:
        run.finish(xr.concat([run.part(f"{i}", lambda i=i: compute(i)) for i in range(5)], "episode"))
"""


def start(directory: Path, mode: str, log: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory), mode, str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_env(),
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    place = tmp_path_factory.mktemp("uninterrupted")
    with start(place / "run", "no stop", place / "log") as child:
        assert child.wait() == 0
    assert (place / "log").read_text().split() == list("01234")
    return read_zarr(place / "run" / "result.zarr")


@pytest.mark.parametrize(
    ("mode", "computed_again"), [("part", ["2", "3", "4"]), ("result", []), ("state", []), ("parts", [])]
)
def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path, uninterrupted: xr.Dataset, mode: str, computed_again: list[str]
) -> None:
    directory, log = tmp_path / "run", tmp_path / "log"
    with start(directory, mode, log) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        with pytest.raises(ProbeError, match="Another process"), open_run(directory, {"seed": 0}):
            pass
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    if mode in ("part", "result"):
        assert list(directory.rglob(".*.tmp")), "the child was to be killed in the middle of a write"
    before = log.read_text().split()
    with start(directory, "no stop", log) as child:
        assert child.wait() == 0
    assert log.read_text().split()[len(before) :] == computed_again
    xr.testing.assert_identical(read_zarr(directory / "result.zarr"), uninterrupted)
    assert names(directory) == {"run.json", "result.zarr", ".lock"}
    assert json.loads((directory / "run.json").read_text())["state"] == "finished"


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", CONFIG) as run:
        run.part("a", lambda: number(1))
    other = {"shots": 8, "options": {"rows": "answer", "seed": True}, "extra": "x" * 200, "model": "toy"}
    with pytest.raises(UsageError) as caught, open_run(tmp_path / "run", other):
        pass
    said = str(caught.value)
    assert "shots was 4, now 8" in said
    assert "options.seed was 0, now true" in said
    assert "extra was absent" in said
    assert "choose another directory" in said
    assert "model" not in said
    assert "rows" not in said
    assert len(said) < 400
    with open_run(tmp_path / "run", CONFIG) as run:
        run.part("a", never)


def test_a_foreign_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"), open_run(tmp_path, CONFIG):
        pass
    assert names(tmp_path) == {"thesis.tex"}


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()  # left by a process killed between taking the lock and writing the record
    (tmp_path / ".run.json.0123abcd.tmp").touch()
    with open_run(tmp_path, CONFIG) as run:
        assert run.directory == tmp_path
    assert names(tmp_path) == {"run.json", ".lock"}


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_file_in_the_way_is_told(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProbeError, match="Cannot make the run directory"), open_run(tmp_path / below, CONFIG):
        pass


def test_a_full_disk_at_the_start_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProbeError, match="No space left"), open_run(tmp_path / "a" / "b", CONFIG):
        pass
    assert not names(tmp_path)


def test_a_second_opener_is_refused_at_once(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", CONFIG) as run:
        with pytest.raises(ProbeError, match="Another process"), open_run(tmp_path / "run", CONFIG):
            pass
        run.part("a", lambda: number(1))  # the first is none the worse
    with open_run(tmp_path / "run", CONFIG) as run:
        run.part("a", never)


def test_a_lock_on_a_directory_that_was_taken_back_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def late(file: BinaryIO, operation: int) -> None:
        (tmp_path / ".lock").unlink()  # the first process ends here, and removes what it had made
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ProbeError, match="Another process"), open_run(tmp_path, CONFIG):
        pass


def other_key(record: dict[str, object]) -> Mapping[str, object]:
    return {**record, "key": "0" * 16}


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: json.dumps(record)[:40],
        lambda record: "",
        lambda record: "[]",
        lambda record: "{}",
        lambda record: json.dumps(other_key(record)),
        lambda record: json.dumps({**record, "state": "odd"}),
        lambda record: json.dumps({**record, "config": 3}),
    ],
)
def test_a_damaged_record_is_told(tmp_path: Path, damage: Callable[[dict[str, object]], str]) -> None:
    with open_run(tmp_path / "run", CONFIG) as run:
        run.part("a", lambda: number(1))
        record = run.record
    (tmp_path / "run" / "run.json").write_text(damage(record))
    with pytest.raises(ProbeError, match=r"run\.json is not the record of a run"), open_run(tmp_path / "run", CONFIG):
        pass
    assert names(tmp_path / "run" / "parts") == {"a.zarr"}


def test_a_run_that_fails_before_it_wrote_leaves_the_place_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "a" / "b", CONFIG) as run:
        run.part("a", lambda: number(1 / 0))
    assert not names(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "empty", CONFIG):
        raise KeyboardInterrupt
    assert names(tmp_path) == {"empty"}
    assert not names(tmp_path / "empty")


def test_a_run_that_fails_after_it_wrote_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "part", CONFIG) as run:
        run.part("a", lambda: number(1))
        run.part("b", lambda: number(1 / 0))
    assert names(tmp_path / "part" / "parts") == {"a.zarr"}
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "file", CONFIG) as run:
        write_text(run.path("manifest.jsonl"), "{}")
        run.part("b", lambda: number(1 / 0))
    assert names(tmp_path / "file") == {"run.json", ".lock", "manifest.jsonl"}
    with open_run(tmp_path / "begun", CONFIG):
        pass
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "begun", CONFIG) as run:
        run.part("b", lambda: number(1 / 0))
    assert names(tmp_path / "begun") == {"run.json", ".lock"}


def test_opening_sweeps_what_killed_writers_left(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", CONFIG) as run:
        run.part("a", lambda: number(1))
        (tmp_path / "run" / "parts" / ".b.zarr.0123abcd.tmp" / "x").mkdir(parents=True)
        (tmp_path / "run" / ".notes.txt.0123abcd.tmp").touch()
        (tmp_path / "run" / ".mine.tmp").touch()
    with open_run(tmp_path / "run", CONFIG):
        pass
    assert names(tmp_path / "run") == {"run.json", "parts", ".lock", ".mine.tmp"}
    assert names(tmp_path / "run" / "parts") == {"a.zarr"}
