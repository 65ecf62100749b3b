"""The mean difference: what demonstrations add, on average, to the state that predicts the answer.

    v_l = mean over episodes of h_l(with demonstrations) - h_l(without),    h_l' = h_l + v_l

at the position that predicts the answer's first token, in one layer: an early layer's difference is there to be worked
with, that of the last can only choose among answers. Which layer, unless given, is chosen by the log-probability of the
gold answers of validation episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.errors import UsageError
from probe.models.encoding import Encoding
from probe.models.model import Model
from probe.trace.edit import Edit, Output
from probe.trace.likelihood import answer_log_probability
from probe.trace.read import LayerValues, read
from probe.trace.steer import unsteered
from probe.vectors.method import Method, Parameters, add, check_site, refuse_heads
from probe.vectors.pairs import alone, encode_pair
from probe.vectors.teacher import Teacher, flat_places, stack
from probe.vectors.training import Training, describe, split
from probe.vectors.vector import Head, InContextVector


@dataclass(frozen=True)
class MeanDifference(Method):
    """Options of the mean difference.

    Attributes
    ----------
    layer
        Where it is added; -1 lets validation choose.
    site
        ``layer_output``, ``mlp_output`` or ``attention_output``.
    """

    layer: int = -1
    site: Output = "layer_output"
    name: ClassVar[str] = "mean-difference"
    rows: ClassVar[str] = "first"

    def __post_init__(self) -> None:
        check_site(self.site, ("layer_output", "mlp_output", "attention_output"))

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """One, in its layer."""
        refuse_heads(self, heads)
        return [add(self.site, self.layer, scale * parameters["v"])]

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
        """Two forwards over the episodes, and for the choice of a layer one over those that validate for each layer."""
        if unsteered(model, ())[1]:
            raise UsageError("A vector is fitted to a model as it is; give the one that was steered.")
        options = training or Training()
        learn, validate = split(episodes, options)
        if not -1 <= self.layer < model.n_layers:
            raise UsageError(f"{model.name} has layers 0 to {model.n_layers - 1}; asked for {self.layer}.")
        if self.layer < 0 and not validate:
            raise UsageError("There are no episodes to choose a layer by; give more, or name a layer.")
        differences = mean_differences(model, learn, self.site, options.batch_size)
        layer = self.layer
        found = [InContextVector(replace(self, layer=at), {"v": v.clone()}) for at, v in enumerate(differences)]
        if layer < 0:
            layer = int(torch.tensor([_probability(model, validate, v, options.batch_size) for v in found]).argmax())
        card = describe(model, self, episodes, options)
        return replace(found[layer], card=card)


def mean_differences(model: Model, episodes: Sequence[Episode], site: Output, batch_size: int) -> Tensor:
    """What demonstrations add on average to the state that predicts the answer, ``[layer, hidden]``, float32."""
    total = torch.zeros(0)
    for start in range(0, len(episodes), batch_size):
        pairs = [encode_pair(model, episode) for episode in episodes[start : start + batch_size]]
        with_them = _states(model, [pair.teacher for pair in pairs], site)
        added = (with_them - _states(model, [pair.student for pair in pairs], site)).sum(1)
        total = added if start == 0 else total + added
    return (total / len(episodes)).float()


def _states(model: Model, encodings: Sequence[Encoding], site: Output) -> Tensor:
    """``[layer, episode, hidden]``, float64, at the position that predicts the answer's first token."""
    batch = model.batch(encodings)
    places = flat_places(batch, [torch.tensor([encoding.n_prompt - 1]) for encoding in encodings])

    def reduce(values: LayerValues) -> Mapping[str, Tensor]:
        value: Tensor = getattr(values, site)
        return {"state": value[places].double()}

    reading = read(model, batch, (site,), reduce)
    return stack(model, reading, "state")


def _probability(model: Model, episodes: Sequence[Episode], vector: InContextVector, batch_size: int) -> float:
    """Mean log-probability of the gold answers of queries without demonstrations."""
    found: list[float] = []
    for start in range(0, len(episodes), batch_size):
        encodings = [model.encode(alone(episode)) for episode in episodes[start : start + batch_size]]
        found += answer_log_probability(model, model.batch(encodings), vector.edits()).tolist()
    return sum(found) / len(found)
