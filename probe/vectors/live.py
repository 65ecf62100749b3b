"""LIVE: one vector a layer, added to the layer's output, which keeps its norm.

    s = h + alpha_l v_l,    h' = s ‖h‖ / ‖s‖

at all positions. Found by distilling a teacher that reads demonstrations: KL + 0.5 cross-entropy.

What differs from the released code: the norm has a floor, without which 0 / 0 at padding, whose states may be zero,
would spread; and, unless ``released``, the losses are those of the positions that predict the answer
(:class:`~probe.vectors.method.Objective`). Sites, in the released code: the layer's output for Idefics, the MLP's for
Idefics2.

References
----------
Peng et al., "LIVE: Learnable In-Context Vector for Visual Question Answering", NeurIPS 2024, arXiv 2406.13185; start
and step sizes as in the README of its code (commit 83e8491).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probe.models.model import Model
from probe.trace.edit import Edit, Edited
from probe.vectors.method import Objective, Parameters, Trained, check_site, refuse_heads, widen
from probe.vectors.vector import Head

FLOOR = 1e-6


@dataclass(frozen=True)
class Live(Trained):
    """LIVE's options.

    Attributes
    ----------
    site
        ``layer_output``, ``mlp_output`` or ``attention_output``.
    alpha
        Where every alpha starts.
    kl, ce
        Weights of the losses.
    released
        Losses as in the released code.
    """

    site: Edited = "layer_output"
    alpha: float = 0.1
    kl: float = 1.0
    ce: float = 0.5
    released: bool = False
    name: ClassVar[str] = "live"

    def __post_init__(self) -> None:
        check_site(self.site, ("layer_output", "mlp_output", "attention_output"))

    @property
    def objective(self) -> Objective:
        """KL to the teacher and cross-entropy."""
        return Objective(kl=self.kl, ce=self.ce, released=self.released)

    def start(self, model: Model, generator: torch.Generator) -> dict[str, Tensor]:
        """Vectors of standard deviation 0.01."""
        shape = model.n_layers, int(model.text_config.hidden_size)
        return {
            "v": 0.01 * torch.randn(shape, generator=generator),
            "alpha": torch.full((model.n_layers,), self.alpha),
        }

    def step_size(self, name: str) -> float:
        """As published for VQAv2."""
        return {"v": 1e-3, "alpha": 1e-2}[name]

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """One a layer."""
        refuse_heads(self, heads)
        # Once, and not in every forward: of what a vector costs in decoding, most is the number of small operations.
        shifts = scale * parameters["alpha"][:, None] * parameters["v"]
        return [self._edit(layer, shift) for layer, shift in enumerate(shifts)]

    def _edit(self, layer: int, shift: Tensor) -> Edit:
        def fn(value: Tensor, _: object) -> Tensor:
            h = widen(value)
            moved = h + shift.to(h.device)
            size, new = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (h, moved))
            kept: Tensor = moved * (size / new.clamp_min(FLOOR))
            return kept.to(value.dtype)

        return Edit(self.site, layer, fn)
