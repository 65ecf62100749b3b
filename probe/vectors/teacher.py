"""What the frozen model says and thinks when it reads demonstrations: read once, and then remembered.

What is remembered is found again by what was read: token ids, pixels and the model's fingerprint (positions follow from
these). Logits of the answer are always kept; states of layers only as far as a budget of memory goes, and those beyond
it are read again whenever they are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.errors import UsageError
from probe.models.encoding import Batch, Encoding
from probe.models.model import Model
from probe.trace.edit import Output
from probe.trace.read import LayerValues, Reading, read
from probe.vectors.pairs import Pair, encode_pair

BUDGET = 2 * 2**30
"""Bytes of layers' states that are remembered."""


@dataclass
class Lesson:
    """What one episode teaches.

    Attributes
    ----------
    episode
        With its demonstrations.
    student
        The query alone, encoded, with the answer.
    end
        The token that ends an answer.
    logits
        ``[n of the answer + 1, vocabulary]``: the teacher's predictions of every token of the answer, and of what
        follows it; ``None`` where nobody asked for them, and the demonstrations were not read.
    states
        By site, ``[layer, n of the query, hidden]``, of the query's and the answer's positions; as far as remembered.
    """

    episode: Episode
    student: Encoding
    end: int
    logits: Tensor | None
    states: dict[Output, Tensor] = field(default_factory=dict)

    @property
    def n_predictions(self) -> int:
        """Tokens of the answer, and its end."""
        return len(self.student) - self.student.n_prompt + 1


class Teacher:
    """A model that reads demonstrations, without gradients.

    Parameters
    ----------
    model
        Also the student's, without what steers that.
    budget
        Bytes of layers' states to remember.
    """

    def __init__(self, model: Model, budget: int = BUDGET) -> None:
        self.model = model
        self.budget = budget
        self.used = 0
        self.full = False
        self.n_read = 0
        self._lessons: dict[str, Lesson] = {}
        self._seen: dict[int, tuple[Episode, str]] = {}  # the episode is held, so that its id stays its own

    def __str__(self) -> str:
        """How much is remembered."""
        n = sum(bool(lesson.states) for lesson in self._lessons.values())
        read = sum(lesson.logits is not None for lesson in self._lessons.values())
        return (
            f"{read} episodes read with their demonstrations; layers' states of {n} remembered "
            f"({self.used / 2**20:.0f} of {self.budget / 2**20:.0f} MB)"
        )

    def lessons(
        self,
        episodes: Sequence[Episode],
        site: Output | None = None,
        *,
        logits: bool = True,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
    ) -> list[Lesson]:
        """What episodes teach, in their order.

        Parameters
        ----------
        episodes
            With demonstrations.
        site
            Of the layers' states that will be asked for.
        logits
            Whether predictions will be asked for. Without them and without states, demonstrations are not read: a
            lesson is then the query, its answer and what ends it.
        batch_size
            Episodes in one forward.
        progress
            Called with the number of episodes done.
        """
        for start in range(0, len(episodes), batch_size):
            unit = episodes[start : start + batch_size]
            new = [e for e in unit if not self._knows(e, site, logits)]
            if new:
                self._read(new, site, logits)
            if progress:
                progress(start + len(unit))
        return [self._lessons[self._seen[id(episode)][1]] for episode in episodes]

    def states(self, lessons: Sequence[Lesson], site: Output) -> list[Tensor]:
        """The layers' states of lessons, remembered or read again, ``[layer, n of the query, hidden]`` each."""
        missing = [lesson for lesson in lessons if site not in lesson.states]
        again: dict[int, Tensor] = {}
        if missing:
            pairs = [encode_pair(self.model, lesson.episode) for lesson in missing]
            _, states = self._forward(pairs, site)
            again = {id(lesson): each for lesson, each in zip(missing, states, strict=True)}
        return [again[id(lesson)] if id(lesson) in again else lesson.states[site] for lesson in lessons]

    def _knows(self, episode: Episode, site: Output | None, logits: bool) -> bool:
        if id(episode) not in self._seen:
            return False
        return not self._lacks(self._seen[id(episode)][1], site, logits)

    def _lacks(self, name: str, site: Output | None, logits: bool) -> bool:
        """Whether a lesson is to be read, now and not only when its states are asked for."""
        lesson = self._lessons.get(name)
        if lesson is None or (logits and lesson.logits is None):
            return True
        return site is not None and site not in lesson.states and not self.full

    def _read(self, episodes: Sequence[Episode], site: Output | None, logits: bool) -> None:
        pairs = [encode_pair(self.model, episode) for episode in episodes]
        keys = [_key(self.model, pair.teacher) for pair in pairs]
        for episode, name in zip(episodes, keys, strict=True):
            self._seen[id(episode)] = episode, name
        new = {
            name: (episode, pair)
            for episode, pair, name in zip(episodes, pairs, keys, strict=True)
            if self._lacks(name, site, logits)
        }
        for name, (episode, pair) in new.items():
            self._lessons.setdefault(name, Lesson(episode, pair.student, pair.end, None))
        if not new or (site is None and not logits):
            return
        site = None if self.full else site
        predicted, states = self._forward([pair for _, pair in new.values()], site)
        for name, said, thought in zip(new, predicted, states, strict=True):
            lesson = self._lessons[name]
            lesson.logits = said if lesson.logits is None else lesson.logits
            self.full = self.full or self.used + thought.nbytes > self.budget
            if site is not None and not self.full:
                lesson.states[site] = thought
                self.used += thought.nbytes

    def _forward(self, pairs: Sequence[Pair], site: Output | None) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and states of episodes, on the CPU."""
        self.n_read += len(pairs)
        batch = self.model.batch([pair.teacher for pair in pairs])
        widths = [len(pair.teacher) - pair.teacher.n_prompt + 1 for pair in pairs]
        rows = [torch.from_numpy(pair.kept[pair.query]) for pair in pairs]
        reduce = None if site is None else _picker(batch, rows, site)
        reading = read(self.model, batch, () if site is None else (site,), reduce, logits_to_keep=max(widths))
        logits = [row[-width:].cpu().clone() for row, width in zip(reading.logits, widths, strict=True)]
        if site is None:
            return logits, [torch.empty(0)] * len(pairs)
        stacked = stack(self.model, reading, "states")
        return logits, [part.clone() for part in stacked.split([len(row) for row in rows], dim=1)]


def stack(model: Model, reading: Reading, name: str) -> Tensor:
    """One value of every decoder layer, ``[layer, …]``.

    Raises
    ------
    UsageError
        If a layer did not run.
    """
    by_layer = {**reading.cross, **reading.layers}  # some decoder layers have cross-attention alone
    idle = [str(layer) for layer in range(model.n_layers) if layer not in by_layer]
    if idle:
        raise UsageError(
            f"Without an image {model.name} leaves out its layers {', '.join(idle)}: they have no states to compare. "
            "Give every episode an image."
        )
    return torch.stack([by_layer[layer][name] for layer in range(model.n_layers)])


def flat_places(batch: Batch, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Episode and padded position of rows of each episode, one after the other, ``[all rows]`` each."""
    device = batch.inputs["input_ids"].device
    episode = torch.cat([torch.full_like(row, b) for b, row in enumerate(rows)])
    position = torch.cat([row + pad for row, pad in zip(rows, batch.pads, strict=True)])
    return episode.to(device), position.to(device)


def _picker(batch: Batch, rows: Sequence[Tensor], site: Output) -> Callable[[LayerValues], dict[str, Tensor]]:
    places = flat_places(batch, rows)

    def reduce(values: LayerValues) -> dict[str, Tensor]:
        value: Tensor = getattr(values, site)
        return {"states": value[places]}

    return reduce


def _key(model: Model, encoding: Encoding) -> str:
    """Names what a forward reads."""
    found = hashlib.sha256(model.fingerprint.encode())
    for name, value in (("ids", encoding.ids), *sorted(encoding.inputs.items())):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
