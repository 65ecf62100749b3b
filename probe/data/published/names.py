"""The table of data sets by name, with the files in which each comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from probe.data.example import Example
from probe.data.published.files import find
from probe.data.published.split import Published
from probe.data.published.truemicl import read_truemicl
from probe.data.published.vl_icl import TASKS, read_vl_icl
from probe.data.published.vqa import ShownAnswer, read_vizwiz, read_vqa
from probe.errors import ProbeError, UsageError, did_you_mean

TRUEMICL = "truemicl:"
"""Before the name of a task of TrueMICL, which are as many as it has directories."""

FILES_BELOW = ("annotations", "Annotations", "questions", "Questions")
"""Where else the files of a data set are looked for."""

IMAGES_BELOW = ("images", "Images", "Images/mscoco")
"""Where else directories of images are looked for; the last is that of the official evaluation of VQA."""


class Files(NamedTuple):
    """The names of a data set's files, with ``{}`` for the split; images are in a directory called like the split."""

    title: str
    questions: str
    annotations: str
    pool: str
    queries: str


VQA = {
    "vqav2": Files(
        *("VQAv2", "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"),
        *("train2014", "val2014"),
    ),
    "okvqa": Files(
        *("OK-VQA", "OpenEnded_mscoco_{}_questions.json", "mscoco_{}_annotations.json"),
        *("train2014", "val2014"),
    ),
    "vizwiz-openflamingo": Files(
        *("OpenFlamingo's VizWiz", "{}_questions_vqa_format.json", "{}_annotations_vqa_format.json"),
        *("train", "val"),
    ),
}


def read_published(name: str, directory: Path, *, shown: ShownAnswer = "majority") -> Published:
    """Read a published data set whose files have the names that their authors gave them.

    The training split is the pool and the validation split the queries, or VL-ICL's support set the pool. The files are
    looked for in the directory, and in :data:`FILES_BELOW` and :data:`IMAGES_BELOW` it.

    Parameters
    ----------
    name
        One of :data:`NAMES`, or ``truemicl:<task>``.
    directory
        Where the files are; for VL-ICL, the directory of all tasks.
    shown
        Where there are several annotators, whose answer a demonstration shows; see :func:`read_vqa`.

    Returns
    -------
    Published

    Raises
    ------
    ProbeError
        If a file is missing, or something in it is wrong.
    UsageError
        If the name is unknown, or the data set has no pool.
    """
    if name.startswith(TRUEMICL) and directory.is_dir():
        return read_truemicl(directory, name.removeprefix(TRUEMICL))
    if name not in READERS:
        known = did_you_mean(name, NAMES)
        instead = "read_open_mi gives its episodes, as it has no pool." if name == "vl-icl:open_mi" else known
        raise UsageError(f"No published data set is read by the name {name!r}; {instead}")
    if not directory.is_dir():
        raise ProbeError(f"There is no directory {directory} to read {name} from; correct the path.")
    return READERS[name](directory, shown)


def _read_vqa(files: Files, directory: Path, shown: ShownAnswer) -> Published:
    def split(name: str) -> list[Example]:
        of_split = f"of {files.title}, split {name}"
        return read_vqa(
            find(directory, files.questions.format(name), FILES_BELOW, f"the questions {of_split}"),
            find(directory, files.annotations.format(name), FILES_BELOW, f"the answers {of_split}"),
            find(directory, name, IMAGES_BELOW, f"the images {of_split}"),
            split=name,
            shown=shown,
        )

    return Published(split(files.pool), split(files.queries))


def _read_vizwiz(directory: Path, shown: ShownAnswer) -> Published:
    def split(name: str) -> list[Example]:
        of_split = f"of VizWiz, split {name}"
        return read_vizwiz(
            find(directory, f"{name}.json", FILES_BELOW, f"the questions and answers {of_split}"),
            find(directory, name, IMAGES_BELOW, f"the images {of_split}"),
            shown=shown,
        )

    return Published(split("train"), split("val"))


def _read_vl_icl(task: str, operator: str | None, directory: Path, _: ShownAnswer) -> Published:
    return read_vl_icl(directory, task, operator=operator)


READERS: dict[str, Callable[[Path, ShownAnswer], Published]] = {
    **{name: partial(_read_vqa, files) for name, files in VQA.items()},
    "vizwiz": _read_vizwiz,
    **{
        f"vl-icl:{task}" + (f":{operator}" if operator else ""): partial(_read_vl_icl, task, operator)
        for task, (_, operators) in TASKS.items()
        for operator in operators
    },
}

NAMES = tuple(READERS)
"""What :func:`read_published` knows."""
