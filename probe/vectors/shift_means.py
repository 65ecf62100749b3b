"""What stands in for the shifts of single rows: their means over many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.vectors.shifts import NOTHING, Shifts


@dataclass(frozen=True)
class Means:
    """What stands in for the rows' own, over one half of the episodes, of one attention.

    Attributes
    ----------
    mu, length
        ``[head]``.
    shift, direction
        ``[head, width]``.
    """

    mu: Tensor
    length: Tensor
    shift: Tensor
    direction: Tensor


def means_of(read: Sequence[Shifts], parts: Sequence[int]) -> Means:
    """Over all rows of some episodes that see demonstrations."""
    sums: dict[str, Tensor] = {}
    for shifts in read:
        odds, target = (x.double() for x in shifts.joined(parts))
        used = (odds > NOTHING).double()
        mu, d = odds.sigmoid() * used, (target - shifts.rest.double()) * used[..., None]
        square, length = mu.square(), d.norm(dim=-1)
        each = {
            "n": used.sum(-1),
            "mu": mu.sum(-1),
            "square": square.sum(-1),
            "length": (square * length).sum(-1),
            "shift": torch.einsum("hr,hrd->hd", square, d),
            "direction": torch.einsum("hr,hrd->hd", square * length, d),
        }
        sums = {name: value + sums.get(name, 0) for name, value in each.items()}
    tiny = torch.finfo(torch.float64).tiny
    square = sums["square"].clamp_min(tiny)
    direction = sums["direction"]
    return Means(
        mu=sums["mu"] / sums["n"].clamp_min(1),
        length=sums["length"] / square,
        shift=sums["shift"] / square[:, None],
        direction=direction / direction.norm(dim=-1, keepdim=True).clamp_min(tiny),
    )
