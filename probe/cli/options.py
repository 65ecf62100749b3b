"""Options that commands share, and what they mean."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from cyclopts import Parameter

from probe.errors import UsageError

if TYPE_CHECKING:
    from probe.data.example import Episode


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model reads which episodes.

    Parameters
    ----------
    model
        `toy` or `toy-no-binding` (bundled), an alias such as `qwen-vl`, a repository of the Hugging Face Hub
        (owner/name or owner/name@revision), or a directory with a checkpoint in Hugging Face layout.
    data
        Your own examples: a .jsonl file with lines like {"image": "cat.jpg", "question": "…", "answer": "…"}, or a
        folder of images with a metadata.jsonl. Demonstrations are drawn at random for each query.
    task
        A synthetic task instead: vqa, recognition, binding-cued, binding-uncued, operator, describe; with -text at the
        end (recognition-text) pictures are replaced by words. The default is recognition.
    shots
        Demonstrations before each query.
    episodes
        How many episodes; with --data at most one for each example.
    seed
        Decides episodes and demonstrations.
    dtype
        float32, bfloat16 or float16; the default is float32 on a CPU, else the checkpoint's.
    prompt
        How demonstrations are laid out: live, mimic, flamingo, pair, or a file with a chat template; the default is the
        checkpoint's chat template, or for base models the format of its family.
    device
        Such as cpu or cuda:0; the default is the first GPU, else the CPU.
    """

    model: str = "toy"
    data: Path | None = None
    task: str | None = None
    shots: int = 4
    episodes: int = 64
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    prompt: str | None = None

    default_task: ClassVar[str] = "recognition"

    def describe(self) -> dict[str, object]:
        """Where the episodes come from, for a result's attributes."""
        if self.data is not None:
            # A name that is not UTF-8 is shown with its bytes escaped: results are JSON and Zarr.
            name, path = (
                os.fsencode(p).decode("utf-8", "backslashreplace") for p in (self.data.name, self.data.resolve())
            )
            origin = {"data": name, "data_path": path}
        else:
            origin = {"task": self.task or self.default_task}
        return {**origin, "shots": self.shots, "seed": self.seed}

    def read_episodes(self) -> list[Episode]:
        """Draw or read the episodes.

        Raises
        ------
        UsageError
            If both data and a task are given, or numbers do not fit.
        ProbeError
            If the data cannot be read.
        """
        if self.data is not None and self.task is not None:
            raise UsageError("--data and --task exclude each other; give one.")
        if self.shots < 0 or self.episodes < 1:
            raise UsageError(
                f"--shots must be 0 or more and --episodes 1 or more; got {self.shots} and {self.episodes}."
            )
        if self.data is not None:
            from probe.data.choose import choose
            from probe.data.readers import read_examples

            return choose(read_examples(self.data), shots=self.shots, n=self.episodes, seed=self.seed)
        from probe.data.tasks import synthetic_episodes

        return synthetic_episodes(self.task or self.default_task, shots=self.shots, n=self.episodes, seed=self.seed)


MOST_LAYERS = 10_000


def parse_layers(text: str | None) -> list[int] | None:
    """Read a choice of layers: ``3``, ``0,2,5``, ``0:4`` (0 to 3).

    >>> parse_layers("0:3,7")
    [0, 1, 2, 7]
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        start, colon, stop = part.strip().partition(":")
        try:
            first, last = (int(start or 0), int(stop) - 1) if colon else (int(start), int(start))
        except ValueError:
            raise UsageError(
                f"--layers {text!r} is not a choice of layers; write 3, or 0,2,5, or 0:4 for 0 to 3."
            ) from None
        if last > MOST_LAYERS:
            raise UsageError(f"--layers {text!r}: no model has {last + 1} layers.")
        layers += range(first, last + 1)
    if not layers:
        raise UsageError(f"--layers {text!r} chooses none; write 3, or 0,2,5, or 0:4 for 0 to 3.")
    return layers


Json = Annotated[bool, Parameter(negative=())]
