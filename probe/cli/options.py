"""Options that commands share, and what they mean."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from cyclopts import Parameter

from probe.errors import UsageError

if TYPE_CHECKING:
    from probe.data.example import Episode, Example


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Material:
    """Which model reads which examples.

    Parameters
    ----------
    model
        `toy` or `toy-no-binding` (bundled), an alias such as `qwen-vl`, a repository of the Hugging Face Hub
        (owner/name or owner/name@revision), or a directory with a checkpoint in Hugging Face layout.
    data
        Your own examples: a .jsonl file with lines like {"image": "cat.jpg", "question": "…", "answer": "…"}, or a
        folder of images with a metadata.jsonl. Each is asked once, the others are its demonstrations.
    pool
        More such examples, from which the demonstrations come instead.
    format
        The name of a published data set whose directory --data is: vqav2, okvqa, vizwiz, vl-icl:clevr, … Its training
        split is the pool, its validation split is asked.
    task
        A synthetic task instead: vqa, recognition, binding-cued, binding-uncued, operator, describe; with -text at the
        end (recognition-text) pictures are replaced by words, and with a colon a rule is the same in all episodes
        (operator:3, recognition:colour-italian, binding-uncued:kind-0). The default is recognition, of copy-rate vqa,
        of vector operator:3 or what a vector was fitted on.
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
    pool: Path | None = None
    format: str | None = None
    task: str | None = None
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
        if self.pool is not None:
            origin["pool"] = os.fsencode(self.pool.resolve()).decode("utf-8", "backslashreplace")
        if self.format is not None:
            origin["format"] = self.format
        return {**origin, "seed": self.seed}

    @property
    def what(self) -> str:
        """A short name of what is read, for directories."""
        return self.data.stem if self.data is not None else (self.task or self.default_task).replace(":", "-")

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises
        ------
        UsageError
            If both data and a task are given, or numbers do not fit.
        """
        if self.data is not None and self.task is not None:
            raise UsageError("--data and --task exclude each other; give one.")
        if self.data is None and (self.pool is not None or self.format is not None):
            raise UsageError("--pool and --format belong to --data; name the data too.")
        if self.pool is not None and self.format is not None:
            raise UsageError("A published data set has a pool of its own; leave out --pool or --format.")
        if self.episodes < 1 or self.seed < 0:
            raise UsageError(f"--episodes must be 1 or more and --seed 0 or more; got {self.episodes} and {self.seed}.")

    def read_data(self) -> tuple[list[Example], list[Example] | None]:
        """Read the pool and the queries from --data; ``None``: the pool itself is asked.

        Raises
        ------
        ProbeError
            If the data cannot be read, or pool and queries share an image.
        """
        if self.data is None:
            raise UsageError("There is no data to read; give --data.")
        from probe.data.published import check_disjoint, read_published
        from probe.data.readers import read_examples

        if self.format is not None:
            published = read_published(self.format, self.data)
            check_disjoint(published.pool, published.queries)
            return published.pool, published.queries
        if self.pool is not None:
            return read_examples(self.pool), read_examples(self.data)
        return read_examples(self.data), None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Source(Material):
    """Which model reads which episodes.

    Parameters
    ----------
    shots
        Demonstrations before each query.
    """

    shots: int = 4

    def describe(self) -> dict[str, object]:
        """Where the episodes come from, for a result's attributes."""
        return {**super().describe(), "shots": self.shots}

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises
        ------
        UsageError
            If both data and a task are given, or numbers do not fit.
        """
        super().check()
        if self.shots < 0:
            raise UsageError(f"--shots must be 0 or more; got {self.shots}.")

    def read_episodes(self) -> list[Episode]:
        """Draw or read the episodes, with demonstrations at random.

        Raises
        ------
        UsageError
            If options do not go together.
        ProbeError
            If the data cannot be read.
        """
        self.check()
        if self.data is not None:
            from probe.data.choose import choose

            pool, queries = self.read_data()
            return choose(pool, queries, shots=self.shots, n=self.episodes, seed=self.seed)
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


def parse_heads(text: str | None) -> list[tuple[int, int]] | None:
    """Read a choice of heads: ``3.2,4.0``, layer and head.

    >>> parse_heads("3.2, 4.0")
    [(3, 2), (4, 0)]
    """
    if text is None:
        return None
    try:
        pairs = [tuple(int(number) for number in part.split(".")) for part in text.split(",")]
        return list(dict.fromkeys((layer, head) for layer, head in pairs))
    except ValueError:
        raise UsageError(f"--heads {text!r} is not a choice of heads; write layer.head, such as 3.2,4.0.") from None


Json = Annotated[bool, Parameter(negative=())]
