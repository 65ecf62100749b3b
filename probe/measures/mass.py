"""Attention mass on segments of the keys, and what the heads write because of them.

For a query row q and segments s that partition the keys, attention splits exactly:

    out(q) = sum_s z_s,   z_s = sum_{k in s} A(q, k) v_k,   mass_s = sum_{k in s} A(q, k),   sum_s mass_s = 1.

Through the output projection of its head, segment s writes ``z_s W_O`` into the residual stream; its norm is the
*contribution* of s (the norm of the sum, so that opposite values cancel). With two segments, the demonstrations D and
the rest, this is the identity ``SA = (1 - mu) SA_Q + mu SA_D`` that LIVE and MimIC build on: mu is the mass of D.

Two ways, none of which builds the n x n matrix:

* for selected rows, :func:`row_attention` computes the few rows of A directly, in fp32;
* for all rows, :func:`all_rows_mass` runs the attention kernel once with one-hot segments as values. ``sum_k A(q, k)
  1[k in s]`` is what it returns.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

RESIDUAL_BOUND = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest accepted residual for each type of weights: beyond it, what was recorded is not what the model computed.
In half precision about three times the largest that was found on random models (``analyses/calibrate_dtypes.py``)."""


def row_attention(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch kv key width"],
    mask: Bool[Tensor, "_ _ query key"] | Float[Tensor, "_ _ query key"] | None,
    scale: float,
    causal: bool,
    rows: Int[Tensor, "batch row"],
) -> Float[Tensor, "batch head row key"]:
    """Attention of selected rows, in fp32.

    Parameters
    ----------
    q, k
        As the kernel gets them.
    mask
        Boolean (True is visible) or additive, or ``None``.
    scale
        Factor on q·k.
    causal
        Whether the kernel hides later keys by itself.
    rows
        Query positions, for each episode of the batch.

    Returns
    -------
    Tensor
        Rows of the softmax; each sums to 1.
    """
    batch, heads, n_queries, width = q.shape
    kv, n_keys, n_rows = k.shape[1], k.shape[2], rows.shape[1]
    chosen = q.gather(2, rows[:, None, :, None].expand(batch, heads, n_rows, width)).float()
    grouped = chosen.reshape(batch, kv, heads // kv * n_rows, width)
    scores = (grouped @ k.float().transpose(-1, -2)).view(batch, heads, n_rows, n_keys) * scale
    if mask is not None:
        full = mask.expand(batch, *mask.shape[1:])
        part = full.gather(2, rows[:, None, :, None].expand(batch, mask.shape[1], n_rows, n_keys))
        scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part.float()
    elif causal:
        last = rows + n_keys - n_queries
        hidden = torch.arange(n_keys, device=q.device) > last[..., None]
        scores = scores.masked_fill(hidden[:, None], float("-inf"))
    return scores.softmax(-1)


def row_visibility(
    mask: Bool[Tensor, "_ _ query key"] | Float[Tensor, "_ _ query key"] | None,
    causal: bool,
    rows: Int[Tensor, "batch row"],
    n_queries: int,
    n_keys: int,
) -> Bool[Tensor, "batch row key"]:
    """Which keys selected rows can see, by the mask that the kernel gets.

    Parameters
    ----------
    mask, causal, rows
        As in :func:`row_attention`; a mask that differs between heads counts as its first head's.
    n_queries, n_keys
        Of the attention call.

    Returns
    -------
    Tensor
        True is visible.
    """
    keys = torch.arange(n_keys, device=rows.device)
    if mask is None:
        last = rows[..., None] + n_keys - n_queries
        return keys <= last if causal else torch.ones_like(keys <= last)
    full = mask[:, 0].expand(len(rows), n_queries, n_keys)
    part = full.gather(1, rows[..., None].expand(*rows.shape, n_keys))
    return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2


def one_hot_segments(index: Int[Tensor, "batch key"], n_segments: int) -> Float[Tensor, "batch key segment"]:
    """Indicators of the segments; an index of -1 (padding) belongs to none."""
    return F.one_hot(index + 1, n_segments + 1)[..., 1:].float()


def segment_mass(
    attention: Float[Tensor, "batch head row key"], segments: Float[Tensor, "batch key segment"]
) -> Float[Tensor, "batch head row segment"]:
    """Sum the attention of each row over each segment."""
    return attention @ segments[:, None]


def segment_outputs(
    attention: Float[Tensor, "batch head row key"],
    v: Float[Tensor, "batch kv key width"],
    segments: Float[Tensor, "batch key segment"],
) -> Float[Tensor, "batch head row segment width"]:
    """The part of each head's output that comes from each segment: ``z_s = sum_{k in s} A v``.

    One row at a time, so that memory stays at heads x segments x keys.
    """
    batch, heads, n_rows, n_keys = attention.shape
    kv, n_segments = v.shape[1], segments.shape[-1]
    values, indicators = v.float(), segments.transpose(1, 2)[:, None]
    parts = []
    for row in range(n_rows):
        split = attention[:, :, row, None] * indicators
        grouped = split.reshape(batch, kv, heads // kv * n_segments, n_keys)
        parts.append((grouped @ values).view(batch, heads, n_segments, -1))
    return torch.stack(parts, 2)


def output_factors(weight: Float[Tensor, "hidden width_of_heads"], n_heads: int) -> Float[Tensor, "head width width"]:
    """For each head h, a small R_h with ``‖W_O^h z‖ = ‖R_h z‖`` for every z (from the QR decomposition of W_O^h)."""
    by_head = weight.detach().float().unflatten(1, (n_heads, -1)).transpose(0, 1)
    return cast(Tensor, torch.linalg.qr(by_head, mode="r").R)


def contribution(
    outputs: Float[Tensor, "batch head row segment width"], factors: Float[Tensor, "head width width"]
) -> Float[Tensor, "batch head row segment"]:
    """``‖z_s W_O‖``: the size of what each head writes because of each segment."""
    return cast(Tensor, torch.einsum("bhrsd,hed->bhrse", outputs, factors).norm(dim=-1))


def residual(
    rebuilt: Float[Tensor, "batch head row width"], own: Float[Tensor, "batch head row width"]
) -> Float[Tensor, "batch head row"]:
    """How far rebuilt head outputs are from the model's own.

    The norm of the difference, relative to the root mean square of the norms of the heads' own outputs at that row: a
    head whose output happens to be tiny cannot raise an alarm by itself.
    """
    size = own.float().norm(dim=-1).square().mean(1, keepdim=True).sqrt()
    return cast(Tensor, (rebuilt - own.float()).norm(dim=-1) / size.clamp_min(torch.finfo(torch.float32).tiny))


def all_rows_mass(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch kv key width"],
    segments: Float[Tensor, "batch key segment"],
    mask: Bool[Tensor, "_ _ query key"] | Float[Tensor, "_ _ query key"] | None,
    scale: float,
    causal: bool,
) -> Float[Tensor, "batch head query segment"]:
    """Mass of every row on every segment, by the attention kernel itself with one-hot segments as values.

    Kernel precision with fp32 accumulation; memory grows with queries x segments. Rows of padding hold nothing of
    meaning. The indicators are padded to the width of a head: at another width the fused kernel of the CPU gives way to
    one that builds the n x n matrix.
    """
    batch, heads, _, width = q.shape
    n_keys = k.shape[2]
    repeated = k.repeat_interleave(heads // k.shape[1], 1) if k.shape[1] != heads else k
    chunks = []
    for start in range(0, segments.shape[-1], width):
        part = segments[..., start : start + width]
        values = F.pad(part, (0, width - part.shape[-1])).to(q.dtype)[:, None].expand(batch, heads, n_keys, width)
        out = F.scaled_dot_product_attention(q, repeated, values, attn_mask=mask, scale=scale, is_causal=causal)
        chunks.append(out[..., : part.shape[-1]].float())
    return torch.cat(chunks, -1)
