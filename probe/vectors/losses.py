"""The losses of trained vectors, on what a batch of students and their teacher computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation(student: Tensor, teacher: Tensor, temperature: float, *, floor: float = 0.0) -> Tensor:
    """``T² KL(teacher ‖ student)``, mean over rows.

    Parameters
    ----------
    student, teacher
        Logits, ``[row, vocabulary]``.
    temperature
        T.
    floor
        Added to every probability before the logarithm (the released LIVE: 1e-6).
    """
    s, t = (logits.float() / temperature for logits in (student, teacher))
    if floor:
        log_s, log_t = ((logits.softmax(-1) + floor).log() for logits in (s, t))
    else:
        log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    return temperature**2 * (t.softmax(-1) * (log_t - log_s)).sum(-1).mean()


def cross_entropy(logits: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
    """Of tokens, mean over each episode's and then over episodes; ``[n, vocabulary]`` and ``[n]`` each."""
    each = [F.cross_entropy(row.float(), target.to(row.device)) for row, target in zip(logits, ids, strict=True)]
    return torch.stack(each).mean()


def distance(student: Tensor, teacher: Tensor, lengths: Sequence[int], reduction: str) -> Tensor:
    """Square distance of states, mean over layers and episodes.

    Parameters
    ----------
    student, teacher
        ``[layer, row, hidden]``, the rows of one episode after those of another.
    lengths
        How many rows each episode has.
    reduction
        Over an episode's rows and features: ``mean`` or ``sum``.
    """
    square = (student.float() - teacher.float()).square()
    by_row = square.mean(-1) if reduction == "mean" else square.sum(-1)
    parts = by_row.split(list(lengths), dim=1)
    each = [part.mean() if reduction == "mean" else part.sum(1).mean() for part in parts]
    return torch.stack(each).mean()


def synergy(attention: Tensor, mlp: Tensor, off_diagonal: float) -> Tensor:
    """How far the cross-correlation of two branches is from the identity (Barlow Twins), mean over layers and features.

    ``M = z_aᵀ z_m / n`` with both branches standardised over the n rows;
    ``sum_i (1 - M_ii)² + gamma sum_{i≠j} M_ij²``, divided by the number of features.

    Parameters
    ----------
    attention, mlp
        ``[layer, row, hidden]``.
    off_diagonal
        gamma.
    """

    def standard(x: Tensor) -> Tensor:
        x = x.float()
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0).clamp_min(1e-6)

    m = standard(attention).transpose(1, 2) @ standard(mlp) / attention.shape[1]
    diagonal = m.diagonal(dim1=1, dim2=2)
    off = m.square().sum((1, 2)) - diagonal.square().sum(1)
    return (((1 - diagonal).square().sum(1) + off_diagonal * off) / m.shape[-1]).mean()
