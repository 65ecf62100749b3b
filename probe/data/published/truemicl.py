"""TrueMICL: tasks that need what the demonstrations show, and not only what they say."""

from __future__ import annotations

from pathlib import Path

from probe.data.example import Example
from probe.data.published.split import Published
from probe.data.published.vl_icl import task_entries, task_example


def read_truemicl(directory: Path, task: str) -> Published:
    """Read a task of TrueMICL, with its support set as the pool.

    ``<task>/support.json`` and ``<task>/query.json`` are its documented layout. What stands in them is not documented:
    they are read as VL-ICL's, lists of ``{"id", "image": path or [path, …], "question", "answer"}``, which TrueMICL
    builds on. Paths are relative to the task's directory, or to that of all tasks. Other fields go to ``info``; an
    entry that lacks one of these is an error that names it, so that nothing is read as something else.

    Parameters
    ----------
    directory
        TrueMICL's, with a directory for each task.
    task
        Such as ``operator_induction``, ``sudoku``, ``shapes_count``.

    Returns
    -------
    Published
        In the order of the files.

    Raises
    ------
    ProbeError
        With file, entry, id and field: if something is missing, doubled or of another type, or an image is not there.

    References
    ----------
    Chen et al. (2025), "True Multimodal In-Context Learning Needs Attention to the Visual Context", arXiv 2507.15807;
    the layout is that of the README of its training code and of https://huggingface.co/datasets/ShuoChen99/TrueMICL.
    """

    def read(part: str) -> list[Example]:
        examples = []
        for entry in task_entries(directory, task, part, "TrueMICL"):
            names = entry.record.get("image")
            first = names[0] if isinstance(names, list) and names else names
            inside = isinstance(first, str) and (directory / task / first).is_file()
            examples.append(task_example(entry, directory / task if inside else directory))
        return examples

    return Published(read("support"), read("query"))
