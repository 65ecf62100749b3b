"""VL-ICL: tasks that cannot be done without their demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from probe.data.example import Episode, Example, check_request
from probe.data.published.files import Entry, by_name, entries_of, find, read_json
from probe.data.published.split import Published
from probe.data.readers import image_file, texts
from probe.errors import UsageError, did_you_mean

OPERATORS = ("+", "-", "x")
"""What may be induced, in the order of the three answers of a support entry."""

KINDS_OF_PAIR = ("same", "diff")
"""The two examples of a support entry of ``matching_mi``."""


def read_vl_icl(directory: Path, task: str, *, operator: str | None = None) -> Published:
    """Read an image-to-text task of VL-ICL, with its support set as the pool.

    ``<task>/query.json`` and ``<task>/support.json`` are lists of ``{"id", "image": [path, …], "question", "answer"}``,
    with the paths relative to ``directory``. A number that is the answer becomes text.

    - In ``operator_induction`` and ``operator_induction_interleaved``, a support entry has one answer for each
      operator, and a query says which operator it is about. So there is a data set for each ``operator``: the queries
      about it, and the pool with its answers.
    - In ``matching_mi``, a support entry is a pair of examples, ``{"same": …, "diff": …}``. They become two examples of
      the pool whose ``info`` has the number of the ``pair`` and its ``kind``. (A shot in VL-ICL is a whole pair.)

    Parameters
    ----------
    directory
        VL-ICL's, with a directory for each task, in which ``support.zip`` and ``query.zip`` are unpacked.
    task
        One of the keys of :data:`TASKS`.
    operator
        One of :data:`OPERATORS`, for the two tasks that have operators.

    Returns
    -------
    Published
        In the order of the files; ``info`` holds the other fields. As ``operator_induction_interleaved`` comes without
        a ``query.zip``, ask :func:`check_disjoint` whether its queries show images of the pool.

    Raises
    ------
    ProbeError
        With file, entry, id and field: if something is missing, doubled or of another type, or an image is not there.
    UsageError
        If the task or operator is unknown, missing, or given where there is none.

    References
    ----------
    Zong et al. (2025), ICLR, "VL-ICL Bench: The Devil in the Details of Multimodal In-Context Learning";
    https://huggingface.co/datasets/ys-zong/VL-ICL. The entries of ``clevr``, ``textocr`` and ``operator_induction`` are
    as in the copies below ``data`` of UIUC-MONET/Cache-of-Thoughts; those of the other tasks, and the order of the
    operators, are as ``select_demonstration`` in ``utils/ICL_utils.py`` of ys-zong/VL-ICL uses them.
    """
    if task == "open_mi":
        raise UsageError("In open_mi each query has a support set of its own, so there is no pool; call read_open_mi.")
    if task not in TASKS:
        raise UsageError(f"There is no image-to-text task {task!r} in VL-ICL; {did_you_mean(task, tuple(TASKS))}")
    support, operators = TASKS[task]
    if operator not in operators:
        wanted = " or ".join(known or "left out" for known in operators)
        raise UsageError(f"The operator of {task} must be {wanted}, not {operator}.")
    pool = [
        example for entry in task_entries(directory, task, "support") for example in support(entry, directory, operator)
    ]
    queries = task_entries(directory, task, "query")
    if operator is not None:
        queries = [entry for entry in queries if _operator(entry) == operator]
    return Published(pool, [task_example(entry, directory) for entry in queries])


def read_open_mi(directory: Path, *, shots_per_class: int, ways: int = 2, seed: int = 0) -> list[Episode]:
    """Read VL-ICL's ``open_mi``: name a picture by a word that only the demonstrations explain.

    Each entry of ``open_mi/query.json`` has ``image``, ``question``, ``answer`` and ``classes`` as well as ``support``,
    ``{class: {"images": [path, …], "caption": …}}``: five pictures of each of five classes with invented names.

    The demonstrations are drawn as in VL-ICL: the query's class and, at random, ``ways - 1`` others, in random order;
    then the first image of each class, the second of each in the same order, and so on. They ask the query's question.

    Parameters
    ----------
    directory
        VL-ICL's, with ``open_mi`` and its images unpacked.
    shots_per_class
        What VL-ICL calls n-shot: there are ``ways`` times as many demonstrations.
    ways
        The number of classes; 2 in VL-ICL.
    seed
        Episode i of a seed is always the same; with more shots per class it begins with the same demonstrations.

    Returns
    -------
    list of Episode
        One for each query, in the order of the file; ``info`` has the ``classes`` in the order of the demonstrations.

    Raises
    ------
    ProbeError
        With file, entry, id and field: if something is missing, doubled or of another type, or an image that is drawn
        is not there.
    UsageError
        If there are not as many classes or images, or a number is out of range.

    References
    ----------
    As for :func:`read_vl_icl`; the entries are as in the copy in UIUC-MONET/Cache-of-Thoughts.
    """
    check_request(shots_per_class, 1, seed)
    if ways < 2:
        raise UsageError(f"An episode of open_mi needs 2 or more ways, asked for {ways}.")
    import numpy as np

    episodes = []
    for number, entry in enumerate(task_entries(directory, "open_mi", "query")):
        query = task_example(entry, directory, "support")
        pictures = _pictures(entry)
        if query.answer not in pictures:
            entry.refuse(f"the answer {query.answer!r} is not among the classes of 'support'; correct it.")
        others = [name for name in pictures if name != query.answer]
        fewest = min(map(len, pictures.values()))
        if ways > len(pictures) or shots_per_class > fewest:
            raise UsageError(
                f"{entry.where}: this query has {len(pictures)} classes of {fewest} images or more; asked for {ways} "
                f"ways with {shots_per_class} shots per class."
            )
        rng = np.random.default_rng((seed, number))
        classes = [query.answer, *(others[index] for index in rng.permutation(len(others))[: ways - 1])]
        classes = [classes[index] for index in rng.permutation(ways)]
        demonstrations = tuple(
            Example(
                id=f"{query.id}-{name}-{shot + 1}",
                images=(image_file(directory, pictures[name][shot], entry.where),),
                question=query.question,
                answers=(name,),
            )
            for shot in range(shots_per_class)
            for name in classes
        )
        info = {"classes": classes, "shots_per_class": shots_per_class}
        episodes.append(Episode(f"{query.id}-{seed}", demonstrations, query, "vl-icl:open_mi", seed, info=info))
    return episodes


def task_entries(directory: Path, task: str, part: str, whose: str = "VL-ICL") -> list[Entry]:
    """The entries of a file of a task, which are named after it where they have no id."""
    path = find(directory, f"{task}/{part}.json", (), f"the {part} file of {whose}'s {task}")
    entries = entries_of(read_json(path, f"{whose}'s {task}"), path, "the file", named_by="id")
    for entry in entries:
        entry.record.setdefault("id", f"{task}-{part}-{entry.number}")
    return list(by_name(entries).values())


def task_example(entry: Entry, directory: Path, *used: str) -> Example:
    """An entry with image, question and answer; ``used`` names fields that are no news."""
    return Example(
        id=entry.text_or_number("id"),
        images=entry.images("image", directory),
        question=entry.text("question"),
        answers=(entry.text_or_number("answer"),),
        info=entry.others("id", "image", "question", "answer", *used),
    )


def _plain(entry: Entry, directory: Path, _: str | None) -> list[Example]:
    return [task_example(entry, directory)]


def _with_operator(entry: Entry, directory: Path, operator: str | None) -> list[Example]:
    """The example with the answer that follows the operator."""
    answers = entry.value("answer", list)
    if len(answers) != len(OPERATORS):
        entry.refuse(f"'answer' must have one for each of {', '.join(OPERATORS)}, found {len(answers)}; correct it.")
    answer = dict(zip(OPERATORS, answers, strict=True))[str(operator)]
    return [task_example(entry.changed(answer=answer, operator=operator), directory)]


def _pair(entry: Entry, directory: Path, _: str | None) -> list[Example]:
    """Two examples, named after their pair."""
    name = entry.text_or_number("id")
    halves = {kind: replace(entry, record=entry.value(kind, dict)) for kind in KINDS_OF_PAIR}
    return [
        task_example(half.changed(id=f"{name}-{kind}", pair=entry.number, kind=kind), directory)
        for kind, half in halves.items()
    ]


class Task(NamedTuple):
    """What becomes of a support entry, and the operators that a task is about."""

    support: Callable[[Entry, Path, str | None], list[Example]]
    operators: tuple[str | None, ...] = (None,)


TASKS = {
    "clevr": Task(_plain),
    "textocr": Task(_plain),
    "matching_mi": Task(_pair),
    "operator_induction": Task(_with_operator, OPERATORS),
    "operator_induction_interleaved": Task(_with_operator, OPERATORS),
}
"""The tasks with a pool."""


def _operator(entry: Entry) -> str:
    operator = entry.text("operator")
    if operator not in OPERATORS:
        entry.refuse(f"'operator' is {operator!r}; known are {', '.join(OPERATORS)}.")
    return operator


def _pictures(entry: Entry) -> dict[str, tuple[str, ...]]:
    """The paths of the images of each class that a query of ``open_mi`` brings along."""
    pictures = {}
    for name, found in entry.value("support", dict).items():
        if not isinstance(found, dict) or not isinstance(found.get("images"), list):
            entry.refuse(f"{name!r} of 'support' must be an object with a list of 'images'; correct it.")
        pictures[name] = texts(found["images"], f"'images' of {name!r}", entry.where)
    return pictures
