"""ICV: the direction in which demonstrations move the states of all layers at once, turned towards behind every MLP.

    v = mean of D_i + their first principal component,    D_i = h(with demonstrations) - h(without), of all layers
    m_l' = ‖m_l‖ u / ‖u‖,    u = m_l / ‖m_l‖ + strength (1 + max(0, -cos(m_l, v_l))) v_l / ‖v_l‖

with h the layers' outputs at the position that predicts the answer's first token, ``m_l`` the MLP's output, at all
positions. A state that points away from v_l is turned more. The strength, unless given, is chosen by the
log-probability of the gold answers of validation episodes, read without demonstrations.

What differs from the paper, which is on text: its pairs are a text before and after a change, each read by itself; ours
are the same query without demonstrations and with them. It takes five pairs and the strength 0.1. The component has
length 1 whatever the mean's is: where states are large, v is the mean difference and little else.

References
----------
Liu et al., "In-context Vectors: Making In Context Learning More Effective and Controllable Through Latent Space
Steering", ICML 2024, arXiv 2311.06668; its code (commit b187c63).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.errors import UsageError
from probe.models.model import Model
from probe.trace.edit import Edit
from probe.vectors.method import Parameters, Steps, refuse_heads, widen
from probe.vectors.one_layer import states_of_pairs
from probe.vectors.searched import Searched
from probe.vectors.training import Training
from probe.vectors.vector import Head, InContextVector

STRENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Among which validation chooses."""

FLOOR = 1e-6


@dataclass(frozen=True)
class Icv(Searched):
    """ICV's options.

    Attributes
    ----------
    strength
        Of the turn; -1 lets validation choose.
    """

    strength: float = -1.0
    name: ClassVar[str] = "icv"
    choice: ClassVar[str] = "a strength"

    def __post_init__(self) -> None:
        if self.strength < 0 and self.strength != -1:
            raise UsageError(f"A strength is 0 or more, or -1 to have it chosen; it is {self.strength:g}.")

    @property
    def n_candidates(self) -> int:
        """The strengths."""
        return len(STRENGTHS) if self.strength < 0 else 1

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """One a layer."""
        refuse_heads(self, heads)
        if self.strength < 0:
            raise UsageError("The strength of this ICV was not chosen; name one (icv:strength=0.1), or fit it.")
        unit = torch.nn.functional.normalize(parameters["v"], dim=-1, eps=FLOOR)
        return [self._edit(layer, v, scale * self.strength) for layer, v in enumerate(unit)]

    def _edit(self, layer: int, v: Tensor, strength: float) -> Edit:
        def fn(value: Tensor, _: object) -> Tensor:
            m = widen(value)
            direction = v.to(m)
            size = torch.linalg.vector_norm(m, dim=-1, keepdim=True)
            own = m / size.clamp_min(FLOOR)
            away = (-(own * direction).sum(-1, keepdim=True)).clamp_min(0)
            u = own + strength * (1 + away) * direction
            turned: Tensor = size * u / torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp_min(FLOOR)
            return turned.to(value.dtype)

        return Edit("mlp_output", layer, fn)

    def n_readings(self, model: Model, n_episodes: int) -> int:
        """With demonstrations and without."""
        return 2 * n_episodes

    def candidates(
        self, model: Model, episodes: Sequence[Episode], training: Training, steps: Steps
    ) -> tuple[list[InContextVector], dict[str, Any]]:
        """One direction at several strengths, or at that which is named."""
        pairs = states_of_pairs(model, episodes, "layer_output", training.batch_size, steps)
        v = principal_direction(torch.cat([a - b for a, b in pairs], 1).transpose(0, 1).flatten(1))
        parameters = {"v": v.unflatten(0, (model.n_layers, -1)).float().contiguous()}
        if self.strength >= 0:
            return [InContextVector(self, parameters)], {}
        found = [InContextVector(replace(self, strength=each), parameters) for each in STRENGTHS]
        return found, {"strengths": list(STRENGTHS)}


def principal_direction(differences: Tensor) -> Tensor:
    """The mean of ``[n, width]`` plus their first principal component, a unit vector, ``[width]``.

    Its sign is that in which the difference that lies farthest along it is positive, as in the released code. It is
    found from the n x n products of the differences: width is that of all layers together, and a solver that samples it
    would give another direction each time.
    """
    mean = differences.mean(0)
    centred = differences - mean
    size, weights = torch.linalg.eigh(centred @ centred.T)
    if size[-1] <= 0:  # one difference, or all the same
        return mean
    component = torch.nn.functional.normalize(weights[:, -1] @ centred, dim=0)
    along = centred @ component
    found: Tensor = mean + torch.sign(along[along.abs().argmax()]) * component
    return found
