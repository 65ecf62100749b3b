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
from probe.models.model import Model
from probe.trace.edit import Edit, Output
from probe.vectors.method import Constant, Parameters, Steps, check_site, refuse_heads
from probe.vectors.one_layer import OneLayer, states_of_pairs
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
        return [Constant(self.site, self.layer, scale * parameters["v"]).edit()]

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
    pairs = states_of_pairs(model, episodes, site, batch_size, steps)
    total = torch.stack([(with_them - without).sum(1) for with_them, without in pairs]).sum(0)
    return (total / len(episodes)).float()
