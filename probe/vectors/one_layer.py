"""Vectors that act in one layer, at the position that predicts the answer's first token: what they have in common.

An early layer's vector is there to be worked with, that of the last can only choose among answers. Which layer, unless
given, is chosen by episodes that validate (:mod:`probe.vectors.searched`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.errors import UsageError
from probe.models.encoding import Encoding
from probe.models.model import Model
from probe.trace.edit import Edited, Output
from probe.trace.read import LayerValues, Reading, read
from probe.vectors.method import Steps
from probe.vectors.pairs import encode_pair
from probe.vectors.searched import Searched
from probe.vectors.teacher import flat_places, stack
from probe.vectors.training import Training
from probe.vectors.vector import InContextVector


@dataclass(frozen=True)
class OneLayer(Searched):
    """Options of a vector in one layer.

    Attributes
    ----------
    layer
        Where it acts; -1 lets validation choose.
    """

    layer: int = -1
    rows: ClassVar[str] = "first"
    choice: ClassVar[str] = "a layer"

    @property
    def n_candidates(self) -> int | None:
        """One a layer."""
        return None if self.layer < 0 else 1

    def check(self, model: Model) -> None:
        """Refuse a layer that the model does not have."""
        if not -1 <= self.layer < model.n_layers:
            raise UsageError(f"{model.name} has layers 0 to {model.n_layers - 1}; asked for {self.layer}.")

    def find(
        self, model: Model, episodes: Sequence[Episode], training: Training, steps: Steps
    ) -> tuple[Tensor, dict[str, Any]]:
        """What each layer's vector is, ``[layer, hidden]``, float32, and what the card says of it."""
        raise NotImplementedError

    def candidates(
        self, model: Model, episodes: Sequence[Episode], training: Training, steps: Steps
    ) -> tuple[list[InContextVector], dict[str, Any]]:
        """One a layer, or that of the one that is named."""
        vectors, about = self.find(model, episodes, training, steps)
        found = [InContextVector(replace(self, layer=at), {"v": v.clone()}) for at, v in enumerate(vectors)]
        return found if self.layer < 0 else [found[self.layer]], about


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
