"""The mean difference: what demonstrations add, on average, to the state that predicts the answer.

    v_l = mean over episodes of h_l(with demonstrations) - h_l(without),    h_l' = h_l + v_l

in one layer (:mod:`probe.vectors.one_layer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.models.encoding import Encoding
from probe.models.model import Model
from probe.trace.edit import Edit, Output
from probe.vectors.method import Parameters, Steps, add, check_site, refuse_heads
from probe.vectors.one_layer import OneLayer, read_first
from probe.vectors.pairs import encode_pair
from probe.vectors.teacher import stack
from probe.vectors.training import Training
from probe.vectors.vector import Head


@dataclass(frozen=True)
class MeanDifference(OneLayer):
    """Options of the mean difference.

    Attributes
    ----------
    site
        ``layer_output``, ``mlp_output`` or ``attention_output``.
    """

    site: Output = "layer_output"
    name: ClassVar[str] = "mean-difference"

    def __post_init__(self) -> None:
        check_site(self.site, ("layer_output", "mlp_output", "attention_output"))

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """One, in its layer."""
        refuse_heads(self, heads)
        return [add(self.site, self.layer, scale * parameters["v"])]

    def n_readings(self, model: Model, n_episodes: int) -> int:
        """With demonstrations and without."""
        return 2 * n_episodes

    def find(
        self, model: Model, episodes: Sequence[Episode], training: Training, steps: Steps
    ) -> tuple[Tensor, dict[str, Any]]:
        """Two forwards over the episodes."""
        return mean_differences(model, episodes, self.site, training.batch_size, steps), {}


def mean_differences(
    model: Model, episodes: Sequence[Episode], site: Output, batch_size: int, steps: Steps | None = None
) -> Tensor:
    """What demonstrations add on average to the state that predicts the answer, ``[layer, hidden]``, float32."""
    total = torch.zeros(())
    for start in range(0, len(episodes), batch_size):
        pairs = [encode_pair(model, episode) for episode in episodes[start : start + batch_size]]
        for sign, encodings in ((1, [pair.teacher for pair in pairs]), (-1, [pair.student for pair in pairs])):
            total = total + sign * sum_of_states(model, encodings, site)
            if steps:
                steps.add(len(pairs))
    return (total / len(episodes)).float()


def sum_of_states(model: Model, encodings: Sequence[Encoding], site: Output) -> Tensor:
    """``[layer, hidden]``, float64, at the positions that predict the answers' first tokens."""
    return stack(model, read_first(model, encodings, site), "value").sum(1)
