"""Attention sinks, found by rule in the residual stream: positions that hold a massive dimension.

A few dimensions of the residual stream are larger by orders of magnitude at a few positions, and heads rest their
attention on these positions whatever stands there. At the first position it happens in most language models (Sun et
al., "Massive Activations in Large Language Models", COLM 2024, arXiv 2402.17762), and the same dimensions mark image
tokens that attract attention without showing anything of the image (Kang et al., "See What You Are Told: Visual
Attention Sink in Large Multimodal Models", ICLR 2025, arXiv 2503.03321). So the first position tells which dimensions
these are, and the dimensions tell which other positions are sinks.

The rule, for the stream x that enters a layer, with D the two dimensions that are largest at the first position of the
episode:

    size_d(position) = |x_d| / rms(x without D),        a sink holds one d in D with size_d > 20,

where d counts only if the first position holds it too, and no more than half of the episode's positions do: what most
positions hold sets none apart. Kang et al. divide by the root mean square of all of x, know D by name for two models,
and take the same 20 for widths of 4096 and 5120. There the two rules agree: what is at the threshold of theirs has a
size of 21 here. In narrow models theirs finds nothing (in a width below 400 no dimension is 20 times the root mean
square of all), and a share of the stream's energy instead of it (20² / 4096, a tenth) is often reached by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

THRESHOLD = 20.0
"""Size beyond which a dimension is massive."""

N_DIMENSIONS = 2
"""How many dimensions may mark a sink."""


@dataclass(frozen=True)
class Sinks:
    """The sinks of one layer.

    Attributes
    ----------
    positions
        ``[batch, position]``, which positions are sinks.
    dimensions
        ``[batch, 2]``, the dimensions that are largest at the first position; -1 where they mark no sink.
    sizes
        ``[batch, 2]``, their sizes at the first position, whether they mark a sink or not.
    """

    positions: Tensor
    dimensions: Tensor
    sizes: Tensor


def find_sinks(residual: Float[Tensor, "batch position hidden"], there: Bool[Tensor, "batch position"]) -> Sinks:
    """The positions whose residual stream holds a massive dimension of the first position.

    Parameters
    ----------
    residual
        The stream that enters the layer.
    there
        Which positions are no padding.

    Returns
    -------
    Sinks
        No position in layers whose first position holds no massive dimension.
    """
    first = there.int().argmax(1)[:, None, None]
    opening = residual.gather(1, first.expand(-1, 1, residual.shape[2]))[:, 0]
    dimensions = opening.abs().topk(N_DIMENSIONS, -1).indices
    sizes = dimension_sizes(residual, dimensions)
    massive = (sizes > THRESHOLD) & there[..., None]  # beside what is not finite, nothing is
    at_first = first.expand(-1, 1, N_DIMENSIONS)
    marks = massive.gather(1, at_first)[:, 0] & (2 * massive.sum(1) <= there.sum(1, keepdim=True))
    return Sinks(
        (massive & marks[:, None]).any(-1),
        dimensions.where(marks, torch.full_like(dimensions, -1)),
        sizes.gather(1, at_first)[:, 0],
    )


def dimension_sizes(
    residual: Float[Tensor, "batch position hidden"], dimensions: Int[Tensor, "batch dimension"]
) -> Float[Tensor, "batch position dimension"]:
    """Each dimension relative to the root mean square of all dimensions but these.

    The stream is not copied: its energy is added up, and only the given dimensions are picked.
    """
    index = dimensions[:, None].expand(-1, residual.shape[1], -1)
    # In double precision: what a massive dimension leaves of the energy would be lost in its rounding.
    precision = torch.float32 if residual.device.type == "mps" else torch.float64
    held = residual.gather(2, index).to(precision).square()
    energy = torch.linalg.vector_norm(residual, dim=-1, dtype=precision).square()
    rest = (energy - held.sum(-1)).clamp_min(0) / (residual.shape[2] - dimensions.shape[1])
    return cast(Tensor, (held / rest[..., None]).sqrt().float())
