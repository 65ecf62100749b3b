"""The partition function of attention: how much there is for a query to attend to.

    log Z(q) = log sum_{k visible to q} exp(scale q·k)

A key that is added with the logit z takes the mass ``exp(z) / (exp(z) + Z) = sigmoid(z - log Z)`` of the attention and
leaves the rest in its proportions. That is what MimIC's size is: the mass on one learned virtual key.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORES = 2**25
"""How many scores are held at a time (fp32: 128 MB)."""


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Products as they are, under autocast too.

    Entering a context that changes nothing takes as long as a product does when a single row is decoded.
    """
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


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
        kind = torch.promote_types(q.dtype, torch.float32)
        part = slice(start, start + width)
        grouped = q[:, :, part].to(kind).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        with full_precision(q.device):
            scores = (grouped @ k.to(kind).transpose(-1, -2)).view(batch, heads, -1, k.shape[2]) * scale
        least = torch.finfo(kind).min
        if mask is None:
            # A single row, which decoding has, sees all keys: nothing to hide.
            scores = scores.masked_fill(_later(n, k.shape[2], q.device)[part], least) if causal and n > 1 else scores
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, :, part], least)
        else:
            scores = (scores + mask[:, :, part].to(kind)).clamp_min(least)
        total: Tensor = scores.logsumexp(-1)
        return total

    if len(starts) == 1:
        return chunk(0, q, k)
    # Scores are computed again in the backward pass: kept, they would be the n x n array that nothing else here has.
    return torch.cat([checkpoint(chunk, start, q, k, use_reentrant=False) for start in starts], -1)


def _later(n: int, n_keys: int, device: torch.device) -> Tensor:
    """``[n, key]``, which keys come after a row."""
    return torch.arange(n_keys, device=device) > torch.arange(n_keys - n, n_keys, device=device)[:, None]
