"""Edits that take something away: attention to some keys, what tells keys apart, or heads.

=========================  =============================================================================================
:func:`hide_keys`          attention from chosen rows to chosen keys is exactly zero, the rest is renormalised
:func:`uniform_attention`  chosen rows attend alike to every key that they can see
:func:`mean_heads`         heads write their mean over many episodes, whatever they read
:func:`zero_head`          a head writes nothing
=========================  =============================================================================================

Rows and keys are named as in :func:`~probe.models.token_map.parse_selection`; ``answer`` as rows are the positions that
predict the query's answer: the last of the prompt, and those of the answer but its last. While the model generates,
every new position is such a row. Only keys of the prompt are hidden: an answer always sees what it has said.

The heads' outputs of these rows are computed again from the model's own q, k, v and mask, with a mask that hides the
keys: softmax over what is left, in the type of the weights, as the kernel does it. A row that loses no key that it can
see keeps its output to the bit. A row that loses every key has nothing to attend to, and its heads write nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from probe.errors import UsageError
from probe.measures.mass import row_visibility
from probe.models.encoding import Encoding
from probe.models.sites import Axis
from probe.models.token_map import ROLES, Selection, parse_selection
from probe.segments import QUERY
from probe.trace.edit import Attention, Context, Edit
from probe.trace.rows import ANSWER, Asked, meant, parse_rows

Keys = str | Callable[[Encoding], NDArray[np.bool_]]
"""A name, or for an encoding which of its positions on the axis are meant, ``[n]``."""


def hide_keys(
    layers: Sequence[int],
    keys: Keys,
    rows: str = ANSWER,
    heads: Sequence[int] | None = None,
    axis: Axis = "text",
) -> list[Edit]:
    """Hide keys from rows (attention knockout; Geva et al., EMNLP 2023).

    Parameters
    ----------
    layers
        Where.
    keys
        What is hidden.
    rows
        From whom.
    heads
        In which heads; default all.
    axis
        Where the keys stand.

    Returns
    -------
    list of Edit
        One a layer.

    Raises
    ------
    UsageError
        If a name does not exist.
    """
    hidden, asked = parse_selection(keys) if isinstance(keys, str) else keys, parse_rows(rows)

    def fn(value: Tensor, context: Context) -> Tensor:
        blocked = _blocked(hidden, context)[:, None]
        changed, positions, visible = _rows(asked, context)
        left = visible & ~blocked
        alive = left.any(-1, keepdim=True)
        # A softmax over nothing is undefined: such a row is computed as it was, and then set to zero.
        new = attend(context.attention, positions, torch.where(alive, left, visible))
        lost = changed & (visible & blocked).any(-1)
        return _put(value, new.masked_fill(~alive[:, None], 0), positions, lost, heads, context)

    return [Edit("heads", layer, fn, axis) for layer in layers]


def count_hidden(context: Context, keys: Keys, rows: str = ANSWER) -> Tensor:
    """How many keys a knockout takes from a row of each episode in one attention call, ``[batch]``.

    Only keys that the row can see count; of several rows, the one that loses most.
    """
    blocked = _blocked(parse_selection(keys) if isinstance(keys, str) else keys, context)[:, None]
    changed, _, visible = _rows(parse_rows(rows), context)
    return ((visible & blocked).sum(-1) * changed).amax(-1)


def uniform_attention(
    layers: Sequence[int], rows: str = ANSWER, heads: Sequence[int] | None = None, axis: Axis = "text"
) -> list[Edit]:
    """Let rows attend alike to every key that they can see: their heads write the mean of the values.

    Parameters
    ----------
    layers, rows, heads, axis
        As in :func:`hide_keys`.

    Returns
    -------
    list of Edit
        One a layer.
    """
    asked = parse_rows(rows)

    def fn(value: Tensor, context: Context) -> Tensor:
        at = context.attention
        changed, positions, visible = _rows(asked, context)
        weights = visible.float() / visible.sum(-1, keepdim=True).clamp(min=1)
        new = weights[:, None] @ at.v.repeat_interleave(at.q.shape[1] // at.v.shape[1], dim=1).float()
        return _put(value, new, positions, changed & visible.any(-1), heads, context)

    return [Edit("heads", layer, fn, axis) for layer in layers]


def mean_heads(means: Mapping[tuple[int, int], Tensor], rows: str = "all") -> list[Edit]:
    """Let heads write fixed vectors, such as their means over many episodes.

    Parameters
    ----------
    means
        By layer and head, ``[kind, head_dim]``: before the output projection, one for each of the :func:`kinds` of
        positions.
    rows
        Where.

    Returns
    -------
    list of Edit
        One a layer.
    """
    asked = parse_rows(rows)

    def edit(layer: int) -> Edit:
        own = {head: mean for (at, head), mean in means.items() if at == layer}

        def fn(value: Tensor, context: Context) -> Tensor:
            _check_heads(list(own), value, layer)
            changed, positions, _ = _rows(asked, context)
            kind = _kinds(context).to(value.device).gather(1, positions)
            new = value.new_zeros(len(value), value.shape[2], positions.shape[1], value.shape[3])
            for head, mean in own.items():
                new[:, head] = mean.to(value)[kind]
            if bool((changed[:, None] & new[:, list(own)].isnan().any(-1)).any()):
                raise UsageError(
                    "There is no mean of what heads write at some kind of position: the episodes that it was taken "
                    "from have none like it. Take episodes that are built alike."
                )
            return _put(value, new, positions, changed, list(own), context)

        return Edit("heads", layer, fn)

    return [edit(layer) for layer in sorted({layer for layer, _ in means})]


N_KINDS = 1 + 2 * len(ROLES)


def kinds(encoding: Encoding) -> NDArray[np.int64]:
    """For a mean, which positions are alike, ``[n]``: by role, the query's apart, and the rows that answer (0)."""
    token_map = encoding.token_map
    found = 1 + 2 * token_map.role.astype(np.int64) + (token_map.demonstration == QUERY)
    found[token_map.answer - 1] = 0
    return found


def zero_head(layer: int, head: int, axis: Axis = "text") -> Edit:
    """Remove one head: its output is zero at every position."""

    def fn(value: Tensor, context: Context) -> Tensor:
        _check_heads([head], value, layer)
        kept = torch.ones(value.shape[2], dtype=value.dtype, device=value.device)
        kept[head] = 0
        return value * kept[:, None]

    return Edit("heads", layer, fn, axis)


def _blocked(hidden: Selection | Callable[[Encoding], NDArray[np.bool_]], context: Context) -> Tensor:
    """``[batch, key]``, which keys of an attention call are meant."""
    batch, at = context.batch, context.attention
    width = at.k.shape[2]
    in_text = at.axis == "text"
    found = torch.zeros(len(batch), batch.length + context.step if in_text else width, dtype=torch.bool)
    for row, encoding, pad in zip(found, batch.encodings, batch.pads, strict=True):
        token_map = encoding.token_map if in_text else encoding.vision_map
        assert token_map is not None  # cross-attention runs only in families that map its axis
        meant = hidden.of(token_map) if isinstance(hidden, Selection) else hidden(encoding)
        if in_text:
            row[pad : pad + encoding.n_prompt] = torch.from_numpy(meant)[: encoding.n_prompt]
        else:
            row[: len(meant)] = torch.from_numpy(meant)
    return found[:, -width:].to(at.k.device)  # a layer with a window keeps the last keys


def _rows(asked: Asked, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of an attention call that are meant.

    Returns
    -------
    tuple of Tensor
        Whether each place is used ``[batch, row]``, its position ``[batch, row]``, and which keys it can see
        ``[batch, row, key]``.
    """
    batch, at = context.batch, context.attention
    n = at.q.shape[2]
    chosen = meant(asked, batch, context.step, n)
    positions = torch.full((len(batch), max(1, int(chosen.sum(1).max()))), n - 1)
    changed = torch.zeros_like(positions, dtype=torch.bool)
    for b, row in enumerate(chosen):
        places = row.nonzero()[:, 0]
        positions[b, : len(places)], changed[b, : len(places)] = places, True
    positions, changed = positions.to(at.q.device), changed.to(at.q.device)
    return changed, positions, row_visibility(at.mask, at.causal, positions, n, at.k.shape[2])


def _kinds(context: Context) -> Tensor:
    """``[batch, row]``, the kind of every row of an attention call; what is generated is a row that answers."""
    batch, n = context.batch, context.attention.q.shape[2]
    found = torch.zeros(len(batch), n, dtype=torch.int64)
    if not context.step:
        for row, encoding, pad in zip(found, batch.encodings, batch.pads, strict=True):
            row[pad:] = torch.from_numpy(kinds(encoding))[: n - pad]
    return found


def attend(at: Attention, positions: Tensor, visible: Tensor) -> Tensor:
    """Outputs of all heads at some rows that see some keys, ``[batch, head, row, head_dim]``."""
    groups = at.q.shape[1] // at.k.shape[1]
    q = at.q.gather(2, positions[:, None, :, None].expand(-1, at.q.shape[1], -1, at.q.shape[3]))
    k, v = at.k.repeat_interleave(groups, dim=1), at.v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], scale=at.scale)


def _put(
    value: Tensor, new: Tensor, positions: Tensor, changed: Tensor, heads: Sequence[int] | None, context: Context
) -> Tensor:
    """``value`` ``[batch, position, head, head_dim]`` with new outputs of the chosen heads at changed rows."""
    chosen = torch.ones(value.shape[2], dtype=torch.bool, device=value.device)
    if heads is not None:
        _check_heads(heads, value, context.layer)
        chosen[:] = False
        chosen[list(heads)] = True
    b, h, r = (changed[:, None] & chosen[None, :, None]).nonzero(as_tuple=True)
    replaced = value.clone()
    replaced[b, positions[b, r], h] = new[b, h, r].to(value.dtype)
    return replaced


def _check_heads(heads: Sequence[int], value: Tensor, layer: int) -> None:
    wrong = [head for head in heads if not 0 <= head < value.shape[2]]
    if wrong:
        raise UsageError(f"Layer {layer} has heads 0 to {value.shape[2] - 1}; asked for {', '.join(map(str, wrong))}.")
