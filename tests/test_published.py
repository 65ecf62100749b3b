"""Published data sets: small files in the formats in which they come, and what is said when something is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from probe.data import Example
from probe.data.manifest import read_manifest, write_manifest
from probe.data.published import (
    NAMES,
    Published,
    check_disjoint,
    read_open_mi,
    read_published,
    read_vizwiz,
    read_vl_icl,
    read_vqa,
)
from probe.errors import ProbeError, UsageError
from probe.scoring import vqa_accuracy

NET = ["net", "net", "net", "netting", "net", "net", "mesh", "net", "net", "net"]
TIED = ["red", "blue", "blue", "red", "red", "blue", "green", "blue", "red", "teal"]
Change = Callable[[Any], object]


def dump(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), colour).save(path)
    return path


def annotators(answers: list[str], **more: str) -> list[dict[str, Any]]:
    """The answers as VQAv2 has them; every other annotator is sure."""
    sure = ["yes", "maybe"]
    return [
        {"answer": answer, "answer_confidence": sure[number % 2], "answer_id": number + 1} | more
        for number, answer in enumerate(answers)
    ]


def vqa(directory: Path, split: str = "val2014", *, images: str = "val2014") -> tuple[Path, Path, Path]:
    """Two questions about one image, in the layout of VQAv2."""
    picture(directory / images / f"COCO_{split}_000000262148.jpg")
    questions = [
        {"image_id": 262148, "question": "What is this? ", "question_id": 262148000},
        {"image_id": 262148, "question": "What colour?", "question_id": 262148001},
    ]
    head = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": split, "license": {}}
    annotations = [
        {
            "question_type": "what colour",
            "multiple_choice_answer": "blue",
            "answers": annotators(TIED),
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148001,
        },
        {
            "question_type": "what is this",
            "multiple_choice_answer": "net",
            "answers": annotators(NET[3:] + NET[:3]),
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000,
        },
    ]
    return (
        dump(directory / f"v2_OpenEnded_mscoco_{split}_questions.json", head | {"questions": questions}),
        dump(directory / f"v2_mscoco_{split}_annotations.json", head | {"annotations": annotations}),
        directory / images,
    )


def edit(path: Path, change: Change) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    dump(path, content)


# ------------------------------------------------------------------------------------------------------------------ VQA


def test_vqa(tmp_path: Path) -> None:
    net, tied = read_vqa(*vqa(tmp_path))
    assert net.id == "val2014-262148000"
    assert net.images == (tmp_path / "val2014" / "COCO_val2014_000000262148.jpg",)
    assert net.question == "What is this?"
    assert tied.id == "val2014-262148001"
    assert tied.info == {
        "annotated": True,
        "question_type": "what colour",
        "multiple_choice_answer": "blue",
        "image_id": 262148,
        "answer_type": "other",
        "question_id": 262148001,
        "answer_confidence": ["maybe", "yes", "yes", "maybe", "yes", "maybe", "yes", "maybe", "yes", "maybe"],
    }


def test_the_majority_comes_first_and_all_ten_stay(tmp_path: Path) -> None:
    net, tied = read_vqa(*vqa(tmp_path))
    assert net.answers == ("net", "netting", "net", "mesh", *["net"] * 6)
    assert tied.answers == ("blue", "red", "blue", "red", "red", "blue", "green", "blue", "red", "teal")
    first = read_vqa(*vqa(tmp_path), shown="first")
    assert [example.answers for example in first] == [(*NET[3:], *NET[:3]), tuple(TIED)]
    assert first[1].info["answer_confidence"] == ["yes", "maybe"] * 5
    for given in ("net", "mesh", "red", "blue", "green"):
        for one, other in zip((net, tied), first, strict=True):
            assert vqa_accuracy(given, one.answers) == vqa_accuracy(given, other.answers)


@pytest.mark.parametrize(
    ("official", "answers", "shown"),
    [
        ("blue", TIED, "blue"),
        (None, TIED, "red"),
        ("teal", TIED, "red"),  # OpenFlamingo's VizWiz has the first annotator's there
        (7, TIED, "red"),
        (None, ["", "", "", "red"], "red"),
        (None, [" red", "blue", "red "], "red"),
    ],
)
def test_which_answer_is_shown(tmp_path: Path, official: object, answers: list[str], shown: str) -> None:
    questions, annotations, images = vqa(tmp_path)

    def change(content: Any) -> None:
        content["annotations"][1] |= {"multiple_choice_answer": official, "answers": annotators(answers)}

    edit(annotations, change)
    example = read_vqa(questions, annotations, images)[0]
    assert example.answer == shown
    assert sorted(example.answers) == sorted(answer.strip() for answer in answers)
    first = next(answer.strip() for answer in answers if answer)
    assert read_vqa(questions, annotations, images, shown="first")[0].answer == first


def test_okvqa_keeps_the_raw_answers(tmp_path: Path) -> None:
    questions, annotations, images = vqa(tmp_path)

    def change(content: Any) -> None:
        entry = content["annotations"][1]
        del entry["multiple_choice_answer"]
        entry["answers"] = [*annotators(["race"], raw_answer="racing"), *annotators(["surf"] * 9, raw_answer="surfing")]

    edit(annotations, change)
    example = read_vqa(questions, annotations, images)[0]
    assert example.answers == ("surf", "race", *["surf"] * 8)
    assert example.info["raw_answer"] == ["surfing", "racing", *["surfing"] * 8]


def test_the_split_names_images_and_examples(tmp_path: Path) -> None:
    questions, annotations, images = vqa(tmp_path)
    picture(images / "COCO_mine_000000262148.jpg")
    example = read_vqa(questions, annotations, images, split="mine")[0]
    assert example.id == "mine-262148000"
    assert example.images == (images / "COCO_mine_000000262148.jpg",)


@pytest.mark.parametrize(
    ("which", "change", "words"),
    [
        ("questions", lambda c: c.pop("questions"), "'questions' must be a list of objects, found missing"),
        ("questions", lambda c: c.update(questions={}), "'questions' must be a list of objects, found an object"),
        ("questions", lambda c: c.update(questions=[]), "'questions' is empty"),
        ("questions", lambda c: c["questions"].append(3), "entry 3 of 'questions': this is a number"),
        ("questions", lambda c: c.pop("data_subtype"), "'data_subtype' does not say"),
        ("questions", lambda c: c["questions"][1].pop("question_id"), "entry 2: there is no 'question_id'"),
        ("questions", lambda c: c["questions"][1].update(question_id=True), "'question_id' must be .* found true"),
        (
            "questions",
            lambda c: c["questions"][1].update(question_id=262148000),
            "entry 2, question_id 262148000: entry 1 has this question_id too",
        ),
        (
            "questions",
            lambda c: c["questions"][1].pop("question"),
            "entry 2, question_id 262148001: there is no 'question'",
        ),
        ("questions", lambda c: c["questions"][1].update(question=[]), "'question' must be a string, found a list"),
        ("questions", lambda c: c["questions"][1].update(question=" "), "question is empty"),
        ("questions", lambda c: c["questions"][0].pop("image_id"), "entry 1, .*: there is no 'image_id'"),
        (
            "questions",
            lambda c: [entry.update(image_id=7) for entry in c["questions"]],
            "annotations.json, entry 2, question_id 262148000: 'image_id' is 7 in .*questions.json",
        ),
        (
            "questions",
            lambda c: c["questions"].pop(0),
            "annotations.json, entry 2, question_id 262148000: this question is not in .*questions.json",
        ),
        (
            "annotations",
            lambda c: c["annotations"].pop(0),
            "questions.json, entry 2, question_id 262148001: this question has no annotation in .*annotations.json",
        ),
        (
            "annotations",
            lambda c: c["annotations"].append(c["annotations"][0]),
            "annotations.json, entry 3, question_id 262148001: entry 1 has this question_id too",
        ),
        (
            "annotations",
            lambda c: c["annotations"][1].pop("answers"),
            "annotations.json, entry 2, question_id 262148000: there is no 'answers'",
        ),
        ("annotations", lambda c: c["annotations"][1].update(answers="net"), "'answers' must be a list, found a str"),
        ("annotations", lambda c: c["annotations"][1].update(answers=[]), "answer is empty"),
        (
            "annotations",
            lambda c: c["annotations"][1].update(answers=annotators([" "] * 10)),
            "none of the 'answers' has anything in it",
        ),
        ("annotations", lambda c: c["annotations"][1]["answers"][3].pop("answer"), "number 4 of 'answers' is no obj"),
        ("annotations", lambda c: c["annotations"][1].update(answers=["net"]), "number 1 of 'answers' is no object"),
        (
            "annotations",
            lambda c: c["annotations"][1]["answers"][3].update(answer=4),
            "question_id 262148000: answer must be a string or a list of strings, found a number",
        ),
        (
            "annotations",
            lambda c: c["annotations"][1]["answers"][3].update(answer="\ud83d"),
            "question_id 262148000: answer holds half of a character",
        ),
    ],
)
def test_a_broken_vqa_file(tmp_path: Path, which: str, change: Change, words: str) -> None:
    questions, annotations, images = vqa(tmp_path)
    edit(questions if which == "questions" else annotations, change)
    with pytest.raises(ProbeError) as caught:
        read_vqa(questions, annotations, images)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert re.search(words, message), message


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    questions, annotations, images = vqa(tmp_path)
    (images / "COCO_val2014_000000262148.jpg").unlink()
    with pytest.raises(ProbeError, match=r"questions.json, entry 1, question_id 262148000: the image .*does not exist"):
        read_vqa(questions, annotations, images)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"questions": [\n  {"image_id" 1}]}', r"questions\.json, line 2, column 15: this is not JSON"),
        (b"version https://git-lfs.github.com/spec/v1", r"line 1, column 1: this is not JSON"),
        (b"PK\x03\x04\xff", r"byte 4: this is not UTF-8.*unpack"),
        (b"[]", r'the file must hold \{"questions": \[…\]\}'),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_not_json(tmp_path: Path, content: bytes, words: str) -> None:
    questions, annotations, images = vqa(tmp_path)
    questions.write_bytes(content)
    with pytest.raises(ProbeError, match=words):
        read_vqa(questions, annotations, images)


def test_a_byte_order_mark(tmp_path: Path) -> None:
    questions, annotations, images = vqa(tmp_path)
    questions.write_bytes(b"\xef\xbb\xbf" + questions.read_bytes())
    assert len(read_vqa(questions, annotations, images)) == 2


def test_an_unknown_way_of_showing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'most'.*(majority|first)"):
        read_vqa(*vqa(tmp_path), shown="most")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- VizWiz


def vizwiz(directory: Path, split: str = "val", *, file: str | None = None) -> tuple[Path, Path]:
    picture(directory / split / f"VizWiz_{split}_00000001.jpg", "blue" if split == "val" else "red")
    answers = ["night time", "no", "night time", "unanswerable"]
    entry = {
        "image": f"VizWiz_{split}_00000001.jpg",
        "question": "Can you tell me what this medicine is please?",
        "answers": [{"answer_confidence": "yes", "answer": answer} for answer in ["no", *answers]],
        "answer_type": "other",
        "answerable": 1,
    }
    return dump(directory / (file or f"{split}.json"), [entry]), directory / split


def test_vizwiz(tmp_path: Path) -> None:
    assert read_vizwiz(*vizwiz(tmp_path)) == [
        Example(
            "VizWiz_val_00000001",
            (tmp_path / "val" / "VizWiz_val_00000001.jpg",),
            "Can you tell me what this medicine is please?",
            ("no", "night time", "no", "night time", "unanswerable"),
            {"annotated": True, "answer_type": "other", "answerable": 1, "answer_confidence": ["yes"] * 5},
        )
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[0].pop("answers"), r"val\.json, entry 1, image VizWiz_val_00000001\.jpg: there is no 'answers'"),
        (lambda c: c[0].update(image="a.jpg"), "entry 1, image a.jpg: the image .*a.jpg does not exist"),
        (lambda c: c.append(c[0]), "entry 2, image VizWiz_val_00000001.jpg: entry 1 has this image too"),
        (lambda c: c.clear(), "the file is empty"),
    ],
)
def test_a_broken_vizwiz_file(tmp_path: Path, change: Change, words: str) -> None:
    annotations, images = vizwiz(tmp_path)
    edit(annotations, change)
    with pytest.raises(ProbeError, match=words):
        read_vizwiz(annotations, images)


# --------------------------------------------------------------------------------------------------------------- VL-ICL


def vl_icl(directory: Path, task: str, query: list[Any], support: list[Any]) -> Path:
    """Write the two files of a task, and every image that they name."""
    for part, entries in (("query", query), ("support", support)):
        text = dump(directory / task / f"{part}.json", entries).read_text("utf-8")
        for name in re.findall(r'"([^"]+\.(?:png|jpg))"', text):
            picture(directory / name, "red" if part == "query" else "blue")
    return directory


def clevr(directory: Path) -> Path:
    def entry(part: str, name: str, question: str, answer: int) -> dict[str, Any]:
        image = f"clevr/{part}/{name}.png"
        return {"id": f"clevr_{part}_{name}", "image": [image], "question": question, "answer": answer}

    return vl_icl(
        directory,
        "clevr",
        [entry("query", "CLEVR_val_000649", "material: rubber", 2)],
        [entry("support", "CLEVR_train_010840", "size: small", 4)],
    )


def operators(directory: Path, task: str = "operator_induction") -> Path:
    def entry(part: str, name: str, digits: str, answer: Any) -> dict[str, Any]:
        return {
            "id": f"{task}_{part}_{name}",
            "image": [f"{task}/{part}/{digits}.png"],
            "question": "What is the result of the following mathematical expression?",
            "answer": answer,
        }

    query = [
        entry("query", f"1_5_{operator}", "1_5", answer) | {"operator": operator}
        for operator, answer in (("+", 6), ("-", -4), ("x", 5))
    ]
    support = [entry("support", "0_9", "0_9", [9, -9, 0]), entry("support", "2_3", "2_3", [5, -1, 6])]
    return vl_icl(directory, task, query, support)


def test_a_plain_task(tmp_path: Path) -> None:
    assert read_vl_icl(clevr(tmp_path), "clevr") == Published(
        [
            Example(
                "clevr_support_CLEVR_train_010840",
                (tmp_path / "clevr/support/CLEVR_train_010840.png",),
                "size: small",
                ("4",),
            )
        ],
        [
            Example(
                "clevr_query_CLEVR_val_000649",
                (tmp_path / "clevr/query/CLEVR_val_000649.png",),
                "material: rubber",
                ("2",),
            )
        ],
    )


def test_what_else_an_entry_says(tmp_path: Path) -> None:
    entry = {
        "id": "textocr_query_c01928d2bc823bae_1",
        "image": ["textocr/query/c01928d2bc823bae_1.png"],
        "question": "What text is shown in the red box?",
        "answer": "M",
        "width": 4608,
        "box": [169.26, 2501.55],
    }
    (query,) = read_vl_icl(vl_icl(tmp_path, "textocr", [entry], [entry]), "textocr").queries
    assert query.answers == ("M",)
    assert query.info == {"width": 4608, "box": [169.26, 2501.55]}


@pytest.mark.parametrize(
    ("operator", "answers", "asked"), [("+", ["9", "5"], "6"), ("-", ["-9", "-1"], "-4"), ("x", ["0", "6"], "5")]
)
@pytest.mark.parametrize("task", ["operator_induction", "operator_induction_interleaved"])
def test_a_data_set_for_each_operator(tmp_path: Path, task: str, operator: str, answers: list[str], asked: str) -> None:
    published = read_vl_icl(operators(tmp_path, task), task, operator=operator)
    assert [example.answer for example in published.pool] == answers
    assert [example.answers for example in published.queries] == [(asked,)]
    assert {example.info["operator"] for example in published.pool + published.queries} == {operator}


@pytest.mark.parametrize(
    ("task", "operator", "words"),
    [
        ("operator_induction", None, r"must be \+ or - or x, not None"),
        ("operator_induction", "/", r"must be \+ or - or x, not /"),
        ("clevr", "+", r"operator of clevr must be left out, not \+"),
        ("clever", None, "did you mean clevr"),
        ("open_mi", None, "read_open_mi"),
    ],
)
def test_a_request_that_vl_icl_has_no_answer_to(tmp_path: Path, task: str, operator: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_vl_icl(tmp_path, task, operator=operator)


def test_pairs(tmp_path: Path) -> None:
    def half(number: int, kind: str) -> dict[str, Any]:
        images = [f"matching_mi/support/{number}_{kind}_{place}.jpg" for place in (1, 2)]
        return {"image": images, "question": "Do they match?", "answer": "Yes" if kind == "same" else "No"}

    query = {"image": ["matching_mi/query/a.jpg", "matching_mi/query/b.jpg"], "question": "And they?", "answer": "No"}
    support = [{kind: half(number, kind) for kind in ("same", "diff")} for number in (1, 2)]
    published = read_vl_icl(vl_icl(tmp_path, "matching_mi", [query], support), "matching_mi")
    assert [(example.id, example.answer, example.info) for example in published.pool] == [
        ("matching_mi-support-1-same", "Yes", {"pair": 1, "kind": "same"}),
        ("matching_mi-support-1-diff", "No", {"pair": 1, "kind": "diff"}),
        ("matching_mi-support-2-same", "Yes", {"pair": 2, "kind": "same"}),
        ("matching_mi-support-2-diff", "No", {"pair": 2, "kind": "diff"}),
    ]
    assert published.pool[1].images == tuple(tmp_path / f"matching_mi/support/1_diff_{place}.jpg" for place in (1, 2))
    assert published.queries[0].id == "matching_mi-query-1"
    assert len(published.queries[0].images) == 2


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("support", lambda c: c[1].update(answer=5), "support.json, entry 2, id .*_2_3: 'answer' must be a list"),
        ("support", lambda c: c[1].update(answer=[5, 6]), r"must have one for each of \+, -, x, found 2"),
        ("support", lambda c: c[1].update(answer=[5.5, 1, 2]), "'answer' must be a string or a whole number"),
        ("support", lambda c: c[1].update(id=c[0]["id"]), "entry 2, id .*_0_9: entry 1 has this id too"),
        ("query", lambda c: c[2].update(operator="*"), r"query.json, entry 3, id .*_1_5_x: 'operator' is '\*'"),
        ("query", lambda c: c[2].pop("operator"), "entry 3, .*: there is no 'operator'"),
        ("query", lambda c: c[0].update(image=[]), "entry 1, .*: image is empty"),
        ("query", lambda c: c[0].update(image=["a.png"]), "entry 1, .*: the image .*a.png does not exist"),
        ("query", lambda c: c[0].update(answer=True), "'answer' must be a string or a whole number, found true"),
        ("query", lambda c: c[0].update(answer=" "), "entry 1, .*: answer is empty"),
    ],
)
def test_a_broken_vl_icl_file(tmp_path: Path, part: str, change: Change, words: str) -> None:
    edit(operators(tmp_path) / "operator_induction" / f"{part}.json", change)
    with pytest.raises(ProbeError, match=words):
        read_vl_icl(tmp_path, "operator_induction", operator="+")


# -------------------------------------------------------------------------------------------------------------- open_mi

CLASSES = ["blicket", "dax", "shously", "perpo", "slation"]


def open_mi(directory: Path, queries: int = 12) -> Path:
    def entry(number: int) -> dict[str, Any]:
        stem = f"open_ended_mi_shots_5_ways_5_id_{number:04d}"
        return {
            "id": f"open_mi_query_{number:04d}",
            "image": [f"open_mi/query/{stem}_question.jpg"],
            "question": "This is a",
            "answer": CLASSES[number % 5],
            "classes": CLASSES,
            "support": {
                name: {
                    "images": [f"open_mi/support/{stem}_image_{place + 5 * shot + 1}.jpg" for shot in range(5)],
                    "caption": f"This is a {name}",
                }
                for place, name in enumerate(CLASSES[::-1])
            },
        }

    return vl_icl(directory, "open_mi", [entry(number + 1) for number in range(queries)], [])


def shot_of(example: Example) -> int:
    """Which image of its class a demonstration shows, by the numbers in the names of the files."""
    (image,) = example.images
    assert isinstance(image, Path)
    number = int(image.stem.rpartition("_")[2]) - 1
    assert CLASSES[::-1][number % 5] == example.answer
    return number // 5


def test_open_mi(tmp_path: Path) -> None:
    """Each shot shows every class once, and the query's own is among them."""
    episodes = read_open_mi(open_mi(tmp_path), shots_per_class=2)
    assert len(episodes) == 12
    for number, episode in enumerate(episodes, start=1):
        query, classes = episode.query, episode.info["classes"]
        assert query.id == f"open_mi_query_{number:04d}"
        assert query.info == {"classes": CLASSES}
        assert len(classes) == 2
        assert query.answer in classes
        assert [example.answer for example in episode.demonstrations] == classes * 2
        assert [shot_of(example) for example in episode.demonstrations] == [0, 0, 1, 1]
        assert {example.question for example in episode.demonstrations} == {"This is a"}
        assert all(f"_id_{number:04d}_" in str(example.images[0]) for example in episode.demonstrations)
        assert (episode.strategy, episode.seed, episode.info["shots_per_class"]) == ("vl-icl:open_mi", 0, 2)
    assert {episode.info["classes"].index(episode.query.answer) for episode in episodes} == {0, 1}
    assert len({episode.id for episode in episodes}) == 12


def test_open_mi_is_drawn_from_the_seed(tmp_path: Path) -> None:
    open_mi(tmp_path)
    episodes = read_open_mi(tmp_path, shots_per_class=1, seed=3)
    assert episodes == read_open_mi(tmp_path, shots_per_class=1, seed=3)
    longer = read_open_mi(tmp_path, shots_per_class=5, seed=3)
    assert [episode.demonstrations for episode in episodes] == [episode.demonstrations[:2] for episode in longer]
    others = read_open_mi(tmp_path, shots_per_class=1, seed=4)
    assert [episode.info["classes"] for episode in episodes] != [episode.info["classes"] for episode in others]


def test_open_mi_with_all_classes_or_no_shots(tmp_path: Path) -> None:
    open_mi(tmp_path, queries=1)
    (episode,) = read_open_mi(tmp_path, shots_per_class=1, ways=5)
    assert sorted(example.answer for example in episode.demonstrations) == sorted(CLASSES)
    assert read_open_mi(tmp_path, shots_per_class=0)[0].demonstrations == ()


@pytest.mark.parametrize(
    "asked", [{"shots_per_class": 6}, {"shots_per_class": 1, "ways": 6}, {"shots_per_class": 1, "ways": 1}]
)
def test_more_than_open_mi_has(tmp_path: Path, asked: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"5 classes of 5 images or more|2 or more ways"):
        read_open_mi(open_mi(tmp_path, queries=1), **asked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[0].update(answer="wug"), "id open_mi_query_0001: the answer 'wug' is not among the classes"),
        (lambda c: c[0].pop("support"), "there is no 'support'"),
        (lambda c: c[0]["support"].update(dax=[]), "'dax' of 'support' must be an object"),
        (lambda c: c[0]["support"]["dax"].update(images=[3]), "'images' of 'dax' must be"),
    ],
)
def test_a_broken_open_mi_file(tmp_path: Path, change: Change, words: str) -> None:
    edit(open_mi(tmp_path, queries=1) / "open_mi" / "query.json", change)
    with pytest.raises(ProbeError, match=words):
        read_open_mi(tmp_path, shots_per_class=1)


def test_episodes_can_be_written(tmp_path: Path) -> None:
    episodes = read_open_mi(open_mi(tmp_path, queries=2), shots_per_class=1)
    write_manifest(episodes, tmp_path / "episodes.jsonl")
    assert read_manifest(tmp_path / "episodes.jsonl") == episodes


# -------------------------------------------------------------------------------------------------------------- by name


def lay_out(name: str, directory: Path) -> None:
    """Put a data set where its authors have it, each in another of the places that are looked into."""
    if name == "vqav2":
        for split in ("train2014", "val2014"):
            questions, annotations, _ = vqa(directory, split, images=f"Images/mscoco/{split}")
            for file, below in ((questions, "Questions"), (annotations, "Annotations")):
                (directory / below).mkdir(exist_ok=True)
                file.rename(directory / below / file.name)
    elif name == "okvqa":
        for split in ("train2014", "val2014"):
            for file in vqa(directory, split, images=split)[:2]:
                file.rename(directory / file.name.removeprefix("v2_"))
    elif name == "vizwiz":
        for split in ("train", "val"):
            vizwiz(directory, split, file=f"annotations/{split}.json")
        (directory / "images").mkdir()
        (directory / "val").rename(directory / "images" / "val")
    elif name == "vizwiz-openflamingo":
        for split in ("train", "val"):
            picture(directory / split / f"VizWiz_{split}_00000000.jpg")
            entry = {"question_id": 0, "image_id": f"VizWiz_{split}_00000000.jpg"}
            questions = {"questions": [entry | {"question": "What?"}], "data_subtype": "VizWiz-validation"}
            answered = entry | {"question_type": "other", "answers": annotators(NET), "multiple_choice_answer": "net"}
            dump(directory / f"{split}_questions_vqa_format.json", questions)
            dump(directory / f"{split}_annotations_vqa_format.json", {"annotations": [answered]})
    elif "operator" in name:
        operators(directory, name.split(":")[1])
    else:
        entry = {"image": f"{name[7:]}/a.png", "question": "?", "answer": "b"}
        vl_icl(directory, name[7:], [entry], [{"same": entry, "diff": entry} if "matching" in name else entry])


@pytest.mark.parametrize("name", NAMES)
def test_every_name(tmp_path: Path, name: str) -> None:
    lay_out(name, tmp_path)
    published = read_published(name, tmp_path)
    assert published.pool
    assert published.queries
    names = [example.id for example in published.pool + published.queries]
    assert len(set(names)) == len(names)
    parts = ("train", "val") if not name.startswith("vl-icl") else ("support", "query")
    for part, examples in zip(parts, (published.pool, published.queries), strict=True):
        assert all(part in example.id for example in examples)


def test_the_annotators_order_by_name(tmp_path: Path) -> None:
    lay_out("vqav2", tmp_path)
    assert read_published("vqav2", tmp_path, shown="first").queries[0].answer == "netting"


@pytest.mark.parametrize(
    ("name", "missing", "words"),
    [
        ("vqav2", "Questions/v2_OpenEnded_mscoco_train2014_questions.json", "put the questions of VQAv2, split train2"),
        ("vqav2", "Annotations/v2_mscoco_val2014_annotations.json", "put the answers of VQAv2, split val2014"),
        ("vqav2", "Images/mscoco/val2014", "put the images of VQAv2, split val2014 there"),
        ("vizwiz", "annotations/val.json", "put the questions and answers of VizWiz, split val"),
        ("vl-icl:clevr", "clevr/support.json", "put the support file of VL-ICL's clevr"),
    ],
)
def test_a_missing_file_by_name(tmp_path: Path, name: str, missing: str, words: str) -> None:
    lay_out(name, tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(ProbeError, match=f"There is no .*{Path(missing).name} in {tmp_path}.*{words}"):
        read_published(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vqa2", "did you mean vqav2"),
        ("vl-icl:operator_induction", r"vl-icl:operator_induction:[+x-]"),
        ("vl-icl:open_mi", "read_open_mi"),
    ],
)
def test_an_unknown_name(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_published(name, tmp_path)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"no directory .*nowhere"):
        read_published("vqav2", tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------------- disjoint


def about(name: str, *images: Path | Image.Image) -> Example:
    return Example(name, images, "?", ("x",))


def test_a_pool_without_the_queries_images_passes(tmp_path: Path) -> None:
    red, blue = picture(tmp_path / "red.png"), picture(tmp_path / "blue.png", "blue")
    for pixels in (False, True):
        check_disjoint([about("a", red), about("b", red), about("text")], [about("c", blue)], pixels=pixels)
        check_disjoint([], [about("c", blue)], pixels=pixels)


def test_the_same_file_in_both(tmp_path: Path) -> None:
    red, blue = picture(tmp_path / "red.png"), picture(tmp_path / "blue.png", "blue")
    link = tmp_path / "link.png"
    link.symlink_to(red)
    for same in (red, link, tmp_path / "." / "red.png"):
        with pytest.raises(ProbeError, match=r"1 of 2 queries: q \(with b of the pool\); take"):
            check_disjoint([about("a", blue), about("b", blue, red)], [about("q", same), about("r")])


def test_the_same_pixels_in_both(tmp_path: Path) -> None:
    red, copy = picture(tmp_path / "train" / "red.png"), picture(tmp_path / "val" / "copy.bmp")
    pool, queries = [about("a", red)], [about("q", copy)]
    check_disjoint(pool, queries)  # as documented: not looked at
    with pytest.raises(ProbeError, match=r"q \(with a of the pool\)"):
        check_disjoint(pool, queries, pixels=True)
    with pytest.raises(ProbeError, match=r"q \(with a of the pool\)"):
        check_disjoint([about("a", Image.new("RGB", (3, 2), "red"))], queries, pixels=True)
    with pytest.raises(ProbeError, match=r"q \(with a of the pool\)"):
        check_disjoint([about("a", Image.new("RGB", (1, 1)))], [about("q", Image.new("RGB", (1, 1)))])


def test_many_that_are_shared(tmp_path: Path) -> None:
    red = picture(tmp_path / "red.png")
    with pytest.raises(ProbeError, match=r"9 of 9 queries: q0 .*, q4 \(with a of the pool\) and 4 more;"):
        check_disjoint([about("a", red)], [about(f"q{number}", red) for number in range(9)])


def test_a_broken_image_is_found_by_its_example(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"?")
    with pytest.raises(ProbeError, match="example a"):
        check_disjoint([about("a", tmp_path / "a.png")], [], pixels=True)


def test_published_examples_can_be_told_apart_and_hashed(tmp_path: Path) -> None:
    """An example with info, which is a dictionary, still goes into a set."""
    net, tied = read_vqa(*vqa(tmp_path))
    assert len({net, tied, replace(net)}) == 2
    assert replace(net, info={}) != net


# ------------------------------------------------------------------------------------------------------------ TrueMICL


def truemicl(directory: Path) -> Path:
    """Paths relative to the task's directory in one file, to that of all tasks in the other."""
    task = directory / "sudoku"
    for name in ("a", "b", "q"):
        picture(task / "images" / f"{name}.png")
    support = [
        {"id": 1, "image": ["images/a.png"], "question": "What is missing?", "answer": 3, "difficulty": "easy"},
        {"image": "images/b.png", "question": "What is missing?", "answer": "4"},
    ]
    query = [{"id": "q", "image": ["sudoku/images/q.png"], "question": "What is missing?", "answer": "2"}]
    (task / "support.json").write_text(json.dumps(support))
    (task / "query.json").write_text(json.dumps(query))
    return directory


def test_truemicl(tmp_path: Path) -> None:
    found = read_published("truemicl:sudoku", truemicl(tmp_path))
    images = tmp_path / "sudoku" / "images"
    assert found == Published(
        [
            Example("1", (images / "a.png",), "What is missing?", ("3",), {"difficulty": "easy"}),
            Example("sudoku-support-2", (images / "b.png",), "What is missing?", ("4",)),
        ],
        [Example("q", (images / "q.png",), "What is missing?", ("2",))],
    )


def test_truemicl_of_another_kind_is_refused(tmp_path: Path) -> None:
    directory = truemicl(tmp_path)
    with pytest.raises(ProbeError, match=r"the support file of TrueMICL's clocks"):
        read_published("truemicl:clocks", directory)
    path = directory / "sudoku" / "query.json"
    for record, words in (
        ({"image": ["nowhere.png"], "question": "?", "answer": "2"}, "nowhere.png"),
        ({"image_path": "images/q.png", "question": "?", "answer": "2"}, "image"),
        ({"image": "images/q.png", "prompt": "?", "answer": "2"}, "question"),
        ({"image": "images/q.png", "question": "?", "label": "2"}, "answer"),
    ):
        path.write_text(json.dumps([record]))
        with pytest.raises(ProbeError, match=rf"query\.json, entry 1.*{words}"):
            read_published("truemicl:sudoku", directory)
