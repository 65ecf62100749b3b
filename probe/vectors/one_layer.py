"""Vectors that act in one layer, at the position that predicts the answer's first token: what they have in common.

An early layer's vector is there to be worked with, that of the last can only choose among answers. Which layer, unless
given, is chosen by the log-probability of the gold answers of validation episodes, read without demonstrations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.errors import UsageError
from probe.models.encoding import Encoding
from probe.models.model import Model
from probe.trace.edit import Edited, Output
from probe.trace.likelihood import answer_log_probability
from probe.trace.read import LayerValues, Reading, read
from probe.trace.steer import check_plain
from probe.vectors.method import Method, Steps
from probe.vectors.pairs import alone, encode_pair
from probe.vectors.teacher import Teacher, flat_places, stack
from probe.vectors.training import Training, describe, split
from probe.vectors.vector import InContextVector


@dataclass(frozen=True)
class OneLayer(Method):
    """Options of a vector in one layer.

    Attributes
    ----------
    layer
        Where it acts; -1 lets validation choose.
    """

    layer: int = -1
    rows: ClassVar[str] = "first"

    def find(
        self, model: Model, episodes: Sequence[Episode], training: Training, steps: Steps
    ) -> tuple[Tensor, dict[str, Any]]:
        """What each layer's vector is, ``[layer, hidden]``, float32, and what the card says of it."""
        raise NotImplementedError

    def n_readings(self, model: Model, n_episodes: int) -> int:
        """How many episodes :meth:`find` reads."""
        raise NotImplementedError

    def fit(
        self,
        model: Model,
        episodes: Sequence[Episode],
        *,
        training: Training | None = None,
        teacher: Teacher | None = None,
        directory: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> InContextVector:
        """Read the episodes, and for the choice of a layer those that validate, once for each layer."""
        check_plain(model)
        options = training or Training()
        learn, validate = split(episodes, options)
        if not -1 <= self.layer < model.n_layers:
            raise UsageError(f"{model.name} has layers 0 to {model.n_layers - 1}; asked for {self.layer}.")
        if self.layer < 0 and not validate:
            raise UsageError("There are no episodes to choose a layer by; give more, or name a layer.")
        n_choices = model.n_layers * len(validate) if self.layer < 0 else 0
        steps = Steps(progress, self.n_readings(model, len(learn)) + n_choices)
        vectors, about = self.find(model, learn, options, steps)
        found = [InContextVector(replace(self, layer=at), {"v": v.clone()}) for at, v in enumerate(vectors)]
        layer = self.layer
        if layer < 0:
            layer, scores = best_of(model, validate, found, options.batch_size, steps)
            about = {**about, "by_layer": scores}
        card = {**describe(model, self, episodes, options), **({"fitted": about} if about else {})}
        return replace(found[layer], card=card)


def read_first(model: Model, encodings: Sequence[Encoding], site: Edited) -> Reading:
    """Read a site at the positions that predict the answers' first tokens: ``value [episode, …]``, float64."""
    batch = model.batch(encodings)
    places = flat_places(batch, [torch.tensor([encoding.n_prompt - 1]) for encoding in encodings])

    def reduce(values: LayerValues) -> Mapping[str, Tensor]:
        value: Tensor = getattr(values, site)
        return {"value": value[places].double()}

    return read(model, batch, (site,), reduce)


def first_states(model: Model, encodings: Sequence[Encoding], site: Output) -> Tensor:
    """What :func:`read_first` reads of every layer, ``[layer, episode, hidden]``, float64."""
    return stack(model, read_first(model, encodings, site), "value")


def states_of_pairs(
    model: Model, episodes: Sequence[Episode], site: Output, batch_size: int, steps: Steps | None = None
) -> list[tuple[Tensor, Tensor]]:
    """For each batch the states that predict the answers with demonstrations, and without (:func:`first_states`)."""
    found = []
    for start in range(0, len(episodes), batch_size):
        pairs = [encode_pair(model, episode) for episode in episodes[start : start + batch_size]]
        both = [[pair.teacher for pair in pairs], [pair.student for pair in pairs]]
        with_them, without = (first_states(model, encodings, site) for encodings in both)
        found.append((with_them, without))
        if steps:
            steps.add(2 * len(pairs))
    return found


def best_of(
    model: Model, episodes: Sequence[Episode], vectors: Sequence[InContextVector], batch_size: int, steps: Steps
) -> tuple[int, list[float]]:
    """Under which of several vectors queries without demonstrations are answered best.

    Returns
    -------
    tuple
        The place of the best, and of each the mean log-probability of the gold answers.
    """
    scores = [_probability(model, episodes, vector, batch_size, steps) for vector in vectors]
    return int(torch.tensor(scores).argmax()), [round(score, 4) for score in scores]


def _probability(
    model: Model, episodes: Sequence[Episode], vector: InContextVector, batch_size: int, steps: Steps
) -> float:
    """Mean log-probability of the gold answers of queries without demonstrations."""
    found: list[float] = []
    for start in range(0, len(episodes), batch_size):
        encodings = [model.encode(alone(episode)) for episode in episodes[start : start + batch_size]]
        found += answer_log_probability(model, model.batch(encodings), vector.edits()).tolist()
        steps.add(len(encodings))
    return sum(found) / len(found)
