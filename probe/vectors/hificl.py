"""HiFICL: virtual demonstrations, keys and values that are learned in every head and attended to like any others.

    o_h' = alpha SA_h + sum_j beta_j V_hj,    log Z1_j = scale q·K_hj,    Z1 = sum_j Z1_j
    alpha = Z2 / (Z1 + Z2),    beta_j = Z1_j / (Z1 + Z2)

Z2 is the head's own partition function over the keys that the row can see. This is attention to the model's keys and
values with n more of each, which no rotary embedding turns and every row sees. Both are of low rank, K = K_A K_B and
V = V_A V_B. Found by cross-entropy alone: there is no teacher. It follows MimIC, whose one virtual key has a mass and a
constant shift in place of a value: with one pair, o_h' = SA_h + mu (V - SA_h).

V starts at zero and K does not, so training does not start at zero-shot: alpha < 1 makes what heads write smaller.
Where V_A starts is our reading (as K_A). ``scale`` of an injection goes part of the way from SA to o'.

References
----------
HiFICL, arXiv 2603.12760; start, sizes and step size as in its code (commit 198c21b).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probe.errors import UsageError
from probe.measures.partition import full_precision, log_partition
from probe.models.model import Model
from probe.trace.edit import Context, Edit
from probe.vectors.method import (
    Objective,
    Parameters,
    Trained,
    all_heads,
    check_self_attention,
    head_factors,
    turned,
    widen,
)
from probe.vectors.vector import Head


@dataclass(frozen=True)
class Hificl(Trained):
    """HiFICL's options.

    Attributes
    ----------
    pairs
        n, virtual keys and values in a head.
    rank_k, rank_v
        Of all keys of a head, and of all values; 0 leaves them free.
    merge
        False keeps alpha at 1: values are added, and nothing is taken from what the head attends to.
    ce, kl
        Weights of the losses; with a weight of KL there is a teacher after all.
    """

    pairs: int = 8
    rank_k: int = 8
    rank_v: int = 8
    merge: bool = True
    ce: float = 1.0
    kl: float = 0.0
    name: ClassVar[str] = "hificl"

    def __post_init__(self) -> None:
        if self.pairs < 1 or min(self.rank_k, self.rank_v) < 0:
            raise UsageError("HiFICL has one pair in a head or more, and ranks are 1 or more, or 0 for free ones.")

    @property
    def objective(self) -> Objective:
        """Cross-entropy."""
        return Objective(ce=self.ce, kl=self.kl)

    def check(self, model: Model) -> None:
        """Refuse layers without self-attention."""
        check_self_attention(model)

    def start(self, model: Model, generator: torch.Generator) -> dict[str, Tensor]:
        """Small keys, and values of zero."""
        heads = model.n_layers, model.n_heads
        found = {}
        for name, rank, spread in (("k", self.rank_k, 0.01), ("v", self.rank_v, 0.0)):
            if rank:
                found[f"{name}_a"] = torch.randn(*heads, self.pairs, rank, generator=generator)
            rows, size = (rank, spread) if rank else (self.pairs, spread * self.pairs**0.5)
            found[f"{name}_b"] = size * torch.randn(*heads, rows, model.head_dim, generator=generator)
        return found

    def step_size(self, name: str) -> float:
        """As published."""
        return 5e-3

    def acting_heads(self, parameters: Parameters) -> list[Head]:
        """All."""
        return all_heads(parameters["v_b"])

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """One a layer."""
        k, v = (whole(parameters, name) for name in ("k", "v"))
        factors = head_factors(heads, k.shape[0], k.shape[1], scale)
        return [self._edit(layer, k[layer], v[layer], factor) for layer, factor in factors.items()]

    def random(self, parameters: Parameters, generator: torch.Generator) -> dict[str, Tensor]:
        """The same keys, and the values of each head turned together."""
        return {**parameters, "v_b": turned(parameters["v_b"], generator)}

    def _edit(self, layer: int, k: Tensor, v: Tensor, factor: Tensor) -> Edit:
        def fn(value: Tensor, context: Context) -> Tensor:
            at, own = context.attention, widen(value)
            q = widen(at.q)
            log_z2 = log_partition(q, at.k, at.mask, at.scale, at.causal)
            with full_precision(own.device):
                logits = at.scale * (q @ k.to(own).mT)  # [batch, head, position, pair]
                total = torch.logaddexp(logits.logsumexp(-1), log_z2)
                change = ((logits - total[..., None]).exp() @ v.to(own)).transpose(1, 2)
            if self.merge:
                change = change + (log_z2 - total).expm1().transpose(1, 2)[..., None] * own  # alpha - 1
            return (own + factor.to(own)[:, None] * change).to(value.dtype)

        return Edit("heads", layer, fn)


def whole(parameters: Parameters, name: str) -> Tensor:
    """All keys (``k``) or values (``v``), ``[layer, head, pair, head_dim]``."""
    own = parameters[f"{name}_b"]
    return parameters[f"{name}_a"] @ own if f"{name}_a" in parameters else own
