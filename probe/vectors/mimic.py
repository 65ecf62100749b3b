"""MimIC: one vector a head, added before the output projection, sized by the query.

    o_h' = o_h + mu_h(q) v_h,    mu_h(q) = sigmoid(log Z1_h(q) - log Z2_h(q)),    log Z1_h(q) = w_h·q + b_h

Z2 is the head's own partition function, so mu is the attention mass that one virtual key with the learned logit
``w·q + b`` would take. It stands for the mass of the demonstrations, and v for SA_D - SA_Q, which is taken to be the
same for all queries. q is after rotary embedding and not scaled. Found by aligning the student's states with those of a
teacher that reads demonstrations, + 0.5 cross-entropy.

What differs from the released code, unless ``released``: Z2 is summed over the keys that the row can see (the released
one sums over later keys and padding too, in training and prefill but not in decoding), and cross-entropy is that of the
answer. Not reproduced in either case: the padding tokens with which the released code separates query and answer.

References
----------
Jiang et al., "Mimic In-Context Learning for Multimodal Tasks", CVPR 2025, arXiv 2504.08851; start, losses and step
sizes as in its code (commit 9eda50b).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from probe.errors import UsageError, did_you_mean
from probe.measures.partition import log_partition
from probe.models.model import Model
from probe.trace.edit import Attention, Context, Edit, Output
from probe.vectors.method import (
    Constant,
    Objective,
    Parameters,
    Trained,
    all_heads,
    check_self_attention,
    head_factors,
    widen,
)
from probe.vectors.vector import Head

Size = Literal["head", "shared", "constant"]


@dataclass(frozen=True)
class Mimic(Trained):
    """MimIC's options.

    Attributes
    ----------
    size
        ``head``: every head has its own mu. ``shared``: one for a layer, from all its queries and the mean of log Z2
        ("head-sharing"). ``constant``: mu is 1 ("query-sharing").
    align_site
        What is aligned: ``mlp_output`` (as released), ``attention_output`` or ``layer_output``.
    align, ce, kl
        Weights of the losses.
    reduction
        Of the distance (:class:`~probe.vectors.method.Objective`).
    released
        Z2 and cross-entropy as in the released code.
    """

    size: Size = "head"
    align_site: Output = "mlp_output"
    align: float = 1.0
    ce: float = 0.5
    kl: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"
    released: bool = False
    name: ClassVar[str] = "mimic"

    def __post_init__(self) -> None:
        if self.size not in get_args(Size):
            raise UsageError(f"There is no size {self.size!r} of MimIC; {did_you_mean(self.size, get_args(Size))}")

    @property
    def objective(self) -> Objective:
        """Distance to the teacher's states and cross-entropy."""
        return Objective(
            kl=self.kl,
            ce=self.ce,
            align=self.align,
            align_site=self.align_site,
            reduction=self.reduction,
            released=self.released,
        )

    def check(self, model: Model) -> None:
        """Refuse layers without self-attention."""
        check_self_attention(model)

    def start(self, model: Model, generator: torch.Generator) -> dict[str, Tensor]:
        """Nearly nothing: vectors of standard deviation 0.001."""
        layers, heads, width = model.n_layers, model.n_heads, model.head_dim
        found = {"v": 1e-3 * torch.randn(layers, heads, width, generator=generator)}
        if self.size != "constant":
            found["w"] = 0.02 * torch.randn(layers, heads, width, generator=generator)
            found["b"] = torch.zeros((layers, heads) if self.size == "head" else (layers,))
        return found

    def step_size(self, name: str) -> float:
        """As published."""
        return 5e-3

    def acting_heads(self, parameters: Parameters) -> list[Head]:
        """All."""
        return all_heads(parameters["v"])

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """One a layer."""
        n_layers, n_heads, _ = parameters["v"].shape
        factors = head_factors(heads, n_layers, n_heads, scale)
        return [self._edit(layer, parameters, factor) for layer, factor in factors.items()]

    def constants(self, parameters: Parameters, *, scale: float = 1.0) -> list[Constant]:
        """With mu = 1 for all queries, one a layer."""
        if self.size != "constant":
            return super().constants(parameters, scale=scale)
        return [Constant("heads", layer, scale * v) for layer, v in enumerate(parameters["v"])]

    def _edit(self, layer: int, parameters: Parameters, factor: Tensor) -> Edit:
        v = factor[:, None].to(parameters["v"]) * parameters["v"][layer]
        learned = None
        if self.size != "constant":
            learned = parameters["w"][layer][:, None], parameters["b"][layer][..., None]

        def fn(value: Tensor, context: Context) -> Tensor:
            shift = v.to(value.device)
            if learned is not None:
                shift = self._mu(context.attention, *learned).transpose(1, 2)[..., None] * shift
            return (widen(value) + shift).to(value.dtype)

        return Edit("heads", layer, fn)

    def _mu(self, at: Attention, w: Tensor, b: Tensor) -> Tensor:
        """``[batch, head, position]``; one for all heads if shared."""
        q = widen(at.q)
        logit = (q * w.to(q)).sum(-1)
        mask, causal = (None, False) if self.released else (at.mask, at.causal)
        log_z2 = log_partition(q, at.k, mask, at.scale, causal)
        if self.size == "shared":
            logit, log_z2 = logit.sum(1, keepdim=True), log_z2.mean(1, keepdim=True)
        return torch.sigmoid(logit + b.to(q) - log_z2)
