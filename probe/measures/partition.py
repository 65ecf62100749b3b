"""The partition function of attention: how much there is for a query to attend to.

    log Z(q) = log sum_{k visible to q} exp(scale q·k)

A key that is added with the logit z takes the mass ``exp(z) / (exp(z) + Z) = sigmoid(z - log Z)`` of the attention and
leaves the rest in its proportions. That is what MimIC's size is: the mass on one learned virtual key.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from probe.measures.mass import row_visibility

SCORES = 2**25
"""How many scores are held at a time (fp32: 128 MB)."""


def log_partition(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch kv key width"],
    mask: Bool[Tensor, "_ _ query key"] | Float[Tensor, "_ _ query key"] | None,
    scale: float,
    causal: bool,
) -> Float[Tensor, "batch head query"]:
    """``log Z`` of every row, in fp32 (fp64 if q is); it can be differentiated.

    Parameters
    ----------
    q, k, mask, scale, causal
        As the kernel gets them.

    Returns
    -------
    Tensor
        Rows that see nothing (padding) get the smallest finite number: an infinity would make gradients NaN.
    """
    batch, heads, n, _ = q.shape
    width = max(1, SCORES // max(1, batch * heads * k.shape[2]))
    starts = range(0, n, width)

    def chunk(start: int, q: Tensor, k: Tensor) -> Tensor:
        rows = torch.arange(start, min(start + width, n), device=q.device)
        kind = torch.promote_types(q.dtype, torch.float32)
        grouped = q[:, :, rows].to(kind).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        scores = (grouped @ k.to(kind).transpose(-1, -2)).view(batch, heads, len(rows), -1) * scale
        if mask is not None and mask.dtype != torch.bool:
            scores = scores + mask[:, :, rows].to(kind)
        seen = row_visibility(mask, causal, rows.expand(batch, -1), n, k.shape[2])[:, None]
        total: Tensor = scores.masked_fill(~seen, torch.finfo(kind).min).logsumexp(-1)
        return total

    if len(starts) == 1:
        return chunk(0, q, k)
    # Scores are computed again in the backward pass: kept, they would be the n x n array that nothing else here has.
    return torch.cat([checkpoint(chunk, start, q, k, use_reentrant=False) for start in starts], -1)
