"""Visual question answering with several annotators: VQAv2, OK-VQA, VizWiz."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from probe.data.example import Example
from probe.data.published.files import Entry, by_name, entries_of, read_json
from probe.data.readers import image_file, texts
from probe.errors import ProbeError, UsageError, did_you_mean
from probe.scoring import majority_answer

ShownAnswer = Literal["majority", "first"]
"""Whose answer a demonstration shows."""

PER_ANNOTATOR = ("answer_confidence", "raw_answer")
"""What is kept of an annotation besides the answer."""


def read_vqa(
    questions: Path, annotations: Path, images: Path, *, split: str | None = None, shown: ShownAnswer = "majority"
) -> list[Example]:
    """Read a data set in the format of VQA: VQAv2, OK-VQA, or VizWiz as OpenFlamingo has it.

    The questions are ``{"data_subtype": …, "questions": [{"question_id", "image_id", "question"}]}``, the annotations
    ``{"annotations": [{"question_id", "image_id", "answers": [{"answer", "answer_confidence"}], …}]}``. An image is the
    file that ``image_id`` names (VizWiz); a number stands for ``COCO_<split>_<twelve digits>.jpg``.

    All that the annotators answered is kept, ten answers as a rule, since VQA accuracy counts how many agree. Only
    their order changes: the answer that a demonstration shows comes first.

    Parameters
    ----------
    questions, annotations
        The two files, with one annotation for each question.
    images
        The directory of the images.
    split
        Part of the names of COCO's images, and of the examples' ids; ``data_subtype`` by default.
    shown
        ``"majority"``: the most common answer; of several, ``multiple_choice_answer`` if it is among them, else the one
        given first. (It is the most common one in VQAv2, but the first annotator's in OpenFlamingo's files, and OK-VQA
        has none.) ``"first"``: the order of the annotators stays, as in OpenFlamingo and in the code of Li et al. An
        empty answer counts as an answer and is never the one shown.

    Returns
    -------
    list of Example
        In the order of the questions. The id is ``<split>-<question_id>``; ``info`` is the rest of the annotation, with
        ``answer_confidence`` (and OK-VQA's ``raw_answer``, which is not stemmed) in the order of ``answers``.

    Raises
    ------
    ProbeError
        With file, entry, ``question_id`` and field: if something is missing, doubled or of another type, if a question
        has no annotation or an annotation no question, or if an image is not there.
    UsageError
        If ``shown`` is unknown.

    References
    ----------
    https://visualqa.org/download.html describes the fields. File names of images: ``VQADataset`` in
    ``open_flamingo/eval/eval_datasets.py`` of mlfoundations/open_flamingo. Li et al. (2024), CVPR, "How to Configure
    Good In-Context Sequence for Visual Question Answering".
    """
    _check_shown(shown)
    asked = _read_object(questions, "questions")
    entries = by_name(entries_of(asked.get("questions"), questions, "'questions'", named_by="question_id"))
    found = _read_object(annotations, "annotations").get("annotations")
    annotated = by_name(entries_of(found, annotations, "'annotations'", named_by="question_id"))
    for name, annotation in annotated.items():
        if name not in entries:
            annotation.refuse(f"this question is not in {questions}; give the two files of one split.")
    if split is None:
        split = asked.get("data_subtype")
        if not isinstance(split, str):
            raise ProbeError(f"{questions}: 'data_subtype' does not say which split this is; give the split.")
    examples = []
    files: dict[str | int, Path] = {}  # many questions are about one image, which is looked for once
    for name, entry in entries.items():
        if name not in annotated:
            entry.refuse(f"this question has no annotation in {annotations}; give the two files of one split.")
        annotation = annotated[name]
        image = entry.value("image_id", int, str)
        if annotation.value("image_id", int, str) != image:
            annotation.refuse(f"'image_id' is {image!r} in {questions}; give the two files of one split.")
        if image not in files:
            file_name = f"COCO_{split}_{image:012d}.jpg" if isinstance(image, int) else image
            files[image] = image_file(images, file_name, entry.where)
        answers, info = _answers(annotation, shown)
        examples.append(Example(f"{split}-{name}", (files[image],), entry.text("question"), answers, info))
    return examples


def read_vizwiz(annotations: Path, images: Path, *, shown: ShownAnswer = "majority") -> list[Example]:
    """Read VizWiz from its own files.

    They are lists of ``{"image", "question", "answers": [{"answer", "answer_confidence"}], "answer_type",
    "answerable"}``. A split without answers, such as the test split, is refused.

    Parameters
    ----------
    annotations
        ``train.json`` or ``val.json``.
    images
        The directory of the images.
    shown
        Whose answer comes first, as in :func:`read_vqa`.

    Returns
    -------
    list of Example
        In the order of the file. The id is the name of the image without suffix, as each has one question; ``info``
        holds the other fields, with ``answer_confidence`` in the order of ``answers``.

    Raises
    ------
    ProbeError
        With file, entry, image and field: if something is missing, doubled or of another type, or if an image is not
        there.
    UsageError
        If ``shown`` is unknown.

    References
    ----------
    https://vizwiz.org/tasks-and-datasets/vqa/; an entry is shown in ``mmpretrain/datasets/vizwiz.py`` of
    open-mmlab/mmpretrain.
    """
    _check_shown(shown)
    found = read_json(annotations, "VizWiz's questions and answers")
    examples = []
    for name, entry in by_name(entries_of(found, annotations, "the file", named_by="image")).items():
        answers, info = _answers(entry, shown)
        image = image_file(images, entry.text("image"), entry.where)
        examples.append(Example(Path(str(name)).stem, (image,), entry.text("question"), answers, info))
    return examples


def _check_shown(shown: str) -> None:
    if shown not in get_args(ShownAnswer):
        raise UsageError(
            f"A demonstration cannot show the answer {shown!r}; {did_you_mean(shown, get_args(ShownAnswer))}"
        )


def _read_object(path: Path, what: str) -> dict[str, Any]:
    found = read_json(path, f"the {what}")
    if not isinstance(found, dict):
        raise ProbeError(f'{path}: the file must hold {{"{what}": […]}}; check that it is in the format of VQA.')
    return found


def _answers(annotation: Entry, shown: ShownAnswer) -> tuple[tuple[str, ...], dict[str, Any]]:
    """All answers, the shown one first, and what else is known, in the same order."""
    annotators = annotation.value("answers", list)
    for place, annotator in enumerate(annotators, start=1):
        if not isinstance(annotator, dict) or "answer" not in annotator:
            annotation.refuse(f"number {place} of 'answers' is no object with an 'answer'; correct it.")
    written = texts([annotator["answer"] for annotator in annotators], "answer", annotation.where, blank=True)
    given = [answer.strip() for answer in written]
    showable = [answer for answer in given if answer]
    if not showable:
        annotation.refuse("none of the 'answers' has anything in it; take the question out.")
    first = given.index(showable[0] if shown == "first" else _majority(showable, annotation))
    order = sorted(range(len(given)), key=lambda place: place != first)  # the others stay in order
    info = {"annotated": True, **annotation.others("question", "image", "answers")}
    for key in PER_ANNOTATOR:
        if all(key in annotator for annotator in annotators):
            info[key] = [annotators[place][key] for place in order]
    return tuple(given[place] for place in order), info


def _majority(answers: list[str], annotation: Entry) -> str:
    majority = majority_answer(answers)
    # It decides ties alone: in OpenFlamingo's VizWiz it is the first annotator's, which 61 % of val have in common with
    # the majority.
    official = annotation.record.get("multiple_choice_answer")
    if isinstance(official, str) and answers.count(official) == answers.count(majority):
        return official
    return majority
