"""M²IV-style: one vector behind attention and one behind the MLP in every layer.

    a_l' = a_l + alpha^a_l v^a_l,    m_l' = m_l + alpha^m_l v^m_l

at all positions, without a change of norms. Found by distilling a teacher that reads demonstrations (*mimicry*, KL),
by making what the two branches write agree feature by feature and nowhere else (*synergistic*, after Barlow Twins), and
by cross-entropy (*supervised*).

"Style", because the paper's choices are not all public. Ours, which the card records: the weights, the weight off the
diagonal, where vectors and alphas start, their step sizes, a temperature of 1; the branches' outputs are standardised
over all the query's positions of a batch, feature by feature, without a projection, and the term is a mean over layers
and features.

References
----------
Li et al., "M²IV: Towards Efficient and Fine-grained Multimodal In-Context Learning via Representation Engineering",
COLM 2025, arXiv 2504.04633, from its abstract and second-hand accounts; Zbontar et al., "Barlow Twins", ICML 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probe.models.model import Model
from probe.trace.edit import Edit, Output
from probe.vectors.method import Constant, Objective, Parameters, Trained, refuse_heads
from probe.vectors.vector import Head

SITES: dict[str, Output] = {"attention": "attention_output", "mlp": "mlp_output"}
"""The two branches."""


@dataclass(frozen=True)
class M2iv(Trained):
    """M²IV's options.

    Attributes
    ----------
    kl, synergy, ce
        Weights of the mimicry, synergistic and supervised losses.
    off_diagonal
        Weight of the correlations that should vanish, within the synergistic loss.
    alpha
        Where every alpha starts.
    spread
        Standard deviation of the vectors at the start.
    """

    kl: float = 1.0
    synergy: float = 0.1
    ce: float = 0.5
    off_diagonal: float = 5e-3
    alpha: float = 0.1
    spread: float = 0.01
    name: ClassVar[str] = "m2iv"

    @property
    def objective(self) -> Objective:
        """Mimicry, synergistic and supervised."""
        return Objective(kl=self.kl, ce=self.ce, synergy=self.synergy, off_diagonal=self.off_diagonal)

    def start(self, model: Model, generator: torch.Generator) -> dict[str, Tensor]:
        """Small vectors."""
        shape = model.n_layers, int(model.text_config.hidden_size)
        vectors = {name: self.spread * torch.randn(shape, generator=generator) for name in ("v_attention", "v_mlp")}
        return vectors | {name: torch.full((model.n_layers,), self.alpha) for name in ("alpha_attention", "alpha_mlp")}

    def step_size(self, name: str) -> float:
        """Ours."""
        return 1e-2 if name.startswith("alpha") else 5e-3

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """Two a layer."""
        refuse_heads(self, heads)
        return [constant.edit() for constant in self.constants(parameters, scale=scale)]

    def constants(self, parameters: Parameters, *, scale: float = 1.0) -> list[Constant]:
        """Two a layer."""
        found = []
        for layer in range(len(parameters["v_mlp"])):
            for branch, site in SITES.items():
                shift = parameters[f"alpha_{branch}"][layer] * parameters[f"v_{branch}"][layer]
                found.append(Constant(site, layer, scale * shift))
        return found
