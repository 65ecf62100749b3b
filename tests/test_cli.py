"""The command as a user meets it: real input, bad input, reuse, and what is left on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probe.cli import run
from probe.data.manifest import read_manifest
from probe.store import read_zarr
from tests.tiny_qwen import save_checkpoint


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every command runs in an empty directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def photo(path: Path, seed: int, size: tuple[int, int] = (320, 213)) -> Path:
    """A smooth colourful picture with the grain of a camera, as JPEG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=float) + rng.normal(
        0, 6, (size[1], size[0], 3)
    )
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)
    return path


@pytest.fixture
def photos(tmp_path):
    """A user's folder: photographs of several sizes and a JSON-lines file beside them."""
    folder = tmp_path / "holiday"
    folder.mkdir()
    colours = ("red", "green", "blue", "yellow")
    lines = []
    for i in range(6):
        photo(folder / f"photo {i}.jpg", i, ((320, 213), (200, 300), (256, 256))[i % 3])
        lines.append({"image": f"photo {i}.jpg", "question": "colour?", "answer": colours[i % 4]})
    lines[5] |= {"image": ["photo 5.jpg", "photo 0.jpg"], "answer": ["red", "pink"]}
    (folder / "photos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def as_json(capsys, *arguments: str) -> dict:
    code = run(["attention-map", *arguments, "--json"])
    out = capsys.readouterr().out
    assert code == 0, out
    return json.loads(out)


def failure(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and message of a command that fails; the message is one paragraph and no traceback."""
    code = run(["attention-map", *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, " ".join(captured.err.split())


def test_the_main_job_on_the_bundled_model(here, capsys):
    code = run(["attention-map", "--episodes", "12", "--shots", "2", "--out", "run"])
    out = capsys.readouterr().out
    assert code == 0
    assert "Heads that attend most to the demonstrations' images" in out
    assert "run/attention_map.html" in out
    assert "seeded" in out  # the caveat
    page = Path("run/attention_map.html").read_text()
    assert page.count("<html") == 1
    result = read_zarr(Path("run/result.zarr"))
    assert result.sizes["episode"] == 12
    assert result.attrs["task"] == "recognition"
    assert result.attrs["torch_version"].startswith("2.")
    episodes = read_manifest(Path("run/episodes.jsonl"))
    assert [episode.id for episode in episodes] == result["episode"].values.tolist()
    assert not list(Path("run").rglob("*.part*"))
    assert not Path("run/parts").exists()


def test_the_same_command_reuses_the_run_and_another_is_refused(capsys):
    first = as_json(capsys, "--episodes", "4", "--shots", "1", "--out", "run")
    stamp = Path("run/run.json").read_bytes()
    second = as_json(capsys, "--episodes", "4", "--shots", "1", "--out", "run", "--top", "2")
    assert (first["reused"], second["reused"]) == (False, True)
    assert Path("run/run.json").read_bytes() == stamp
    assert second["heads"][0] == first["heads"][0]
    code, message = failure(capsys, "--episodes", "4", "--shots", "2", "--out", "run")
    assert code == 2
    assert "shots" in message
    assert Path("run/run.json").read_bytes() == stamp


def test_a_run_goes_on_where_it_stopped(capsys, monkeypatch):
    from probe.experiments import attention_map as experiment

    true, calls = experiment._measure, []

    def stops(model, episodes, *rest):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(episodes[0].id)
        return true(model, episodes, *rest)

    arguments = ("--episodes", "6", "--shots", "1", "--batch-size", "2")
    monkeypatch.setattr(experiment, "_measure", stops)
    assert run(["attention-map", *arguments, "--out", "run"]) == 130
    assert not Path("run/result.zarr").exists()
    calls.clear()
    monkeypatch.setattr(experiment, "_measure", true)
    whole = as_json(capsys, *arguments, "--out", "other")
    monkeypatch.setattr(experiment, "_measure", lambda *a: calls.append(a[1][0].id) or true(*a))
    resumed = as_json(capsys, *arguments, "--out", "run")
    assert calls == ["recognition-0-4"]  # only the third batch was left
    assert resumed["heads"] == whole["heads"]


def test_photographs_and_a_file_that_a_user_wrote(photos, capsys):
    got = as_json(capsys, "--data", str(photos / "photos.jsonl"), "--shots", "2", "--rows", "all")
    assert got["n_done"] == 6
    assert got["unknown_word_share"] == 0
    assert got["images_resized"].endswith(f"of {got['images_resized'].split()[-1]}")
    assert int(got["images_resized"].split()[0]) == int(got["images_resized"].split()[-1]) > 18
    assert 0 < got["image_scale"] < 0.5
    result = read_zarr(Path(got["directory"]) / "result.zarr")
    assert "token_mass" in result
    grids = {(int(r), int(c)) for r, c in zip(result["image_rows"], result["image_columns"], strict=True)}
    assert len(grids) > 1


def test_an_image_folder(photos, capsys):
    lines = (json.loads(line) for line in (photos / "photos.jsonl").read_text().splitlines()[:5])
    records = [{"file_name": x["image"], "question": x["question"], "answer": x["answer"]} for x in lines]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert as_json(capsys, "--data", str(photos), "--shots", "1")["n_done"] == 5


def test_any_checkpoint_in_a_directory(checkpoint, photos, capsys):
    arguments = ("--model", str(checkpoint), "--data", str(photos / "photos.jsonl"), "--shots", "1")
    got = as_json(capsys, *arguments, "--layers", "1:3", "--rows", "demo-answers")
    assert got["model_family"] == "Qwen2.5-VL"
    assert "caveat" not in got
    assert {head["layer"] for head in got["heads"]} <= {1, 2}
    assert got["worst_residual"] < got["residual_bound"]


def test_zero_shots_and_a_single_episode(capsys):
    got = as_json(capsys, "--shots", "0", "--episodes", "3", "--task", "vqa")
    assert got["heads"] == []
    got = as_json(capsys, "--shots", "1", "--episodes", "1")
    assert got["heads"][0]["n"] == 0
    assert got["heads"][0]["mass"] is None
    assert (
        as_json(capsys, "--shots", "1", "--episodes", "2", "--task", "recognition-text")["images_resized"] == "0 of 0"
    )


MESSAGES = [
    (("--model", "toi"), 2, "did you mean toy"),
    (("--task", "recogniton"), 2, "did you mean recognition"),
    (("--task", "vqa", "--data", "x.jsonl"), 2, "exclude each other"),
    (("--data", "nowhere.jsonl"), 1, "nowhere.jsonl"),
    (("--shots", "-1"), 2, "0 or more"),
    (("--episodes", "0"), 2, "1 or more"),
    (("--layers", "0:99"), 2, "has layers 0 to 5; asked for 6,"),
    (("--layers", "a"), 2, "is not a choice of layers"),
    (("--layers", "4:2"), 2, "chooses none"),
    (("--layers", "0:300000000"), 2, "no model has"),
    (("--rows", "some"), 2, "answer"),
    (("--shots", "many"), 2, "many"),
    (("--dtype", "float23"), 2, "did you mean float32"),
    (("--shoots", "3"), 2, "--shoots"),
    (("--out", "/proc/nothing/here"), 1, "/proc/nothing"),
    (("--device", "cuda:77"), 2, "cuda:77"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), MESSAGES)
def test_bad_options(here, capsys, arguments, code, words):
    got, message = failure(capsys, *arguments)
    assert words in message
    assert got == code
    assert list(here.iterdir()) in ([], [here / "probe-runs"])
    assert not list(here.rglob("*.*"))  # nothing half-written


def break_line(folder: Path, number: int, text: str) -> None:
    path = folder / "photos.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


BREAKAGES = [
    (lambda f: (f / "photo 2.jpg").unlink(), "photo 2.jpg"),
    (lambda f: truncate(f / "photo 2.jpg"), "photo 2.jpg cannot be decoded"),
    (lambda f: (f / "photo 2.jpg").write_text("hello"), "photo 2.jpg"),
    (lambda f: break_line(f, 3, "{not json"), "photos.jsonl, line 3"),
    (lambda f: break_line(f, 4, '{"image": "photo 1.jpg", "question": "colour?"}'), "line 4"),
    (lambda f: break_line(f, 1, '{"image": "photo 1.jpg", "question": "", "answer": "red"}'), "line 1"),
    (lambda f: (f / "photos.jsonl").write_text(""), "photos.jsonl"),
    (
        lambda f: [break_line(f, i, "") for i in range(2, 7)],
        "2 shots need 2 examples besides the query, but there are 0",
    ),
]


@pytest.mark.parametrize(("breakage", "words"), BREAKAGES)
def test_bad_data(here, photos, capsys, breakage, words):
    breakage(photos)
    code, message = failure(capsys, "--data", str(photos / "photos.jsonl"), "--shots", "2")
    assert code in (1, 2)
    assert words in message
    assert list(here.iterdir()) == []


def test_words_that_the_bundled_model_does_not_know(here, photos, capsys):
    for number in range(1, 4):
        break_line(
            photos, number, json.dumps({"image": "photo 1.jpg", "question": "Is it raining?", "answer": "hardly"})
        )
    code, message = failure(capsys, "--data", str(photos / "photos.jsonl"), "--shots", "1")
    assert code == 2
    assert "unknown to toy" in message
    assert "--model" in message
    assert not list(here.rglob("*.*"))


def test_bad_data_leaves_the_directory_to_mended_data(here, photos, capsys):
    """A text with a special token and a picture that the image processor refuses, then the same data mended."""
    good = (photos / "photos.jsonl").read_text()
    arguments = ("--data", str(photos / "photos.jsonl"), "--shots", "1", "--out", "run")
    break_line(photos, 2, json.dumps({"image": "photo 1.jpg", "question": "colour? <|im_start|>", "answer": "red"}))
    code, message = failure(capsys, *arguments)
    assert (code, list(here.iterdir())) == (1, [])
    assert "special token <|im_start|>" in message
    Image.new("RGB", (900, 3)).save(photos / "thin.png")
    break_line(photos, 2, json.dumps({"image": "thin.png", "question": "colour?", "answer": "red"}))
    code, message = failure(capsys, *arguments)
    assert (code, list(here.iterdir())) == (1, [])
    assert "(900, 3)" in message
    (photos / "photos.jsonl").write_text(good)
    assert as_json(capsys, *arguments)["n_done"] == 6


def test_text_of_the_user_is_never_markup(photos, capsys):
    code, message = failure(capsys, "--rows", "[/x]")
    assert code == 2
    assert "[/x]" in message
    renamed = photos.rename(photos.parent / "odd [b]")
    assert run(["attention-map", "--data", str(renamed / "photos.jsonl"), "--shots", "1", "--out", "r[/b]"]) == 0
    assert "r[/b]/attention_map.html" in capsys.readouterr().out.replace("\n", "")
    assert run(["attention-map", "--shots", "1", "--episodes", "2"]) == 0
    assert "(95 %, Wilson)" in (out := capsys.readouterr().out) and "] (95" in out  # an interval in its brackets


def test_names_that_are_not_utf8(photos, capsys):
    renamed = Path(os.fsdecode(os.fsencode(photos.parent) + b"/caf\xe9"))
    photos.rename(renamed)
    got = as_json(capsys, "--data", str(renamed / "photos.jsonl"), "--shots", "1", "--out", "run")
    assert got["data_path"].endswith("caf\\xe9/photos.jsonl")


def test_another_precision_is_another_run(capsys):
    arguments = ("--episodes", "2", "--shots", "1", "--out", "run")
    assert as_json(capsys, *arguments)["dtype"] == "float32"
    code, message = failure(capsys, *arguments, "--dtype", "bfloat16")
    assert code == 2
    assert "dtype" in message
    assert as_json(capsys, *arguments, "--dtype", "float32", "--device", "cpu")["reused"]


def test_a_directory_of_another_family(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, message = failure(capsys, "--model", str(tmp_path))
    assert code == 2
    assert "is a 'llama' model" in message


def test_a_directory_with_files_of_ones_own_is_left_alone(here, capsys):
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.tex").write_text("years of work")
    code, _ = failure(capsys, "--episodes", "2", "--out", "thesis")
    assert code == 2
    assert [path.name for path in (here / "thesis").iterdir()] == ["chapter.tex"]


def test_help_loads_no_torch():
    code = (
        "import sys; from probe.cli import run; run(['--help']); run(['attention-map', '--help']); "
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "attention-map" in out
    assert "--shots" in out
    assert out.strip().endswith("False")


def test_a_prompt_format_and_a_template_of_ones_own(here, capsys):
    """Each is another run, and each result says how its demonstrations were laid out."""
    plain = as_json(capsys, "--episodes", "2", "--shots", "1")
    mimic = as_json(capsys, "--episodes", "2", "--shots", "1", "--prompt", "mimic")
    own = here / "own.jinja"
    own.write_text(
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{{ ' ; ' }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    first = as_json(capsys, "--episodes", "2", "--shots", "1", "--prompt", str(own))
    own.write_text(own.read_text().replace(" ; ", " A: "))
    second = as_json(capsys, "--episodes", "2", "--shots", "1", "--prompt", str(own))
    assert [got["prompt"] for got in (plain, mimic, first, second)] == ["chat template", "mimic", *["own.jinja"] * 2]
    assert len({got["key"] for got in (plain, mimic, first, second)}) == 4


def test_prompts_that_cannot_be_used(here, capsys):
    code, message = failure(capsys, "--prompt", "mimik")
    assert code == 2
    assert "no file 'mimik'; did you mean mimic?" in message
    bad = here / "bad.jinja"
    bad.write_text("{% for message in messages %}no content{% endfor %}")
    code, message = failure(capsys, "--prompt", str(bad))
    assert code == 1
    assert "shows 0 of" in message
