"""Where a head looks in a sequence that is shown twice.

Of a sequence of S tokens shown twice, r_1 … r_S r_1 … r_S, three scores tell kinds of heads apart. Each is the mean
over rows of the attention that the row pays to one key:

=================== ========================== ===========================================
score               rows                       key
=================== ========================== ===========================================
``previous_token``  every one behind another   the position before the row
``duplicate_token`` the second copy            the same token in the first copy
``induction``       the second copy            what followed that token (prefix matching)
=================== ========================== ===========================================

In a sequence without a gap these are q - 1, q - S and q - S + 1. Positions are given, not computed from S, so that the
repeated tokens may stand anywhere among others, as those of images in a chat template do; all rows and keys are then
tokens of one kind, because attention that goes to another kind would be counted as attention not paid.

References
----------
Olsson et al. (2022), "In-context Learning and Induction Heads"; the scores are those of TransformerLens's demos.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PATTERNS = ("previous_token", "duplicate_token", "induction")
"""In the order in which :func:`repeat_keys` gives them."""


def repeat_keys(
    first: Int[Tensor, "token"], second: Int[Tensor, "token"]
) -> tuple[Int[Tensor, "row"], Int[Tensor, "row pattern choice"]]:
    """The rows to read of a sequence that is shown twice, and each row's key in each of the patterns.

    Parameters
    ----------
    first, second
        Where its tokens stand when they are shown first, and again; -1 in ``first`` for one that is no row and no key.

    Returns
    -------
    tuple of Tensor
        Rows, which are all these positions, and for each its key in each of :data:`PATTERNS`; -1 where it has none.
        What followed the last token of the first copy is the first of the second.
    """
    rows = torch.cat([first, second])
    keys = rows.new_full((len(rows), len(PATTERNS), 1), -1)
    behind = torch.isin(rows - 1, rows)
    keys[behind, 0, 0] = rows[behind] - 1
    keys[len(first) :, 1, 0] = first
    keys[len(first) :, 2, 0] = torch.cat([first[1:], second[:1]])
    return rows[rows >= 0], keys[rows >= 0]


def batch_rows(
    pairs: Sequence[tuple[Int[Tensor, "_"], Int[Tensor, "_ pattern choice"]]], pads: Sequence[int]
) -> tuple[Int[Tensor, "batch row"], Int[Tensor, "batch row pattern choice"]]:
    """Rows and keys of sequences that are padded on the left, side by side.

    Parameters
    ----------
    pairs
        Rows and keys of each sequence, such as those of :func:`repeat_keys`.
    pads
        How many positions of padding stand before it.

    Returns
    -------
    tuple of Tensor
        The same, padding counted. A sequence with fewer rows than others is filled up with rows that have no key.
    """
    rows = [own + pad for (own, _), pad in zip(pairs, pads, strict=True)]
    keys = [own.where(own < 0, own + pad) for (_, own), pad in zip(pairs, pads, strict=True)]
    return pad_sequence(rows, batch_first=True), pad_sequence(keys, batch_first=True, padding_value=-1)


def attention_to(
    attention: Float[Tensor, "batch head row key"], keys: Int[Tensor, "batch row pattern choice"]
) -> Float[Tensor, "batch head row pattern"]:
    """The attention that each row pays to its keys in each pattern.

    Parameters
    ----------
    attention
        Rows of attention.
    keys
        For each row, its keys in each pattern; a place with -1 holds none.

    Returns
    -------
    Tensor
        The sum over its keys; NaN where a row has none in a pattern.
    """
    batch, heads, rows, _ = attention.shape
    patterns, choices = keys.shape[2:]
    there = (keys >= 0)[:, None]
    index = keys.clamp_min(0).reshape(batch, 1, rows, patterns * choices).expand(-1, heads, -1, -1)
    paid = attention.gather(3, index).view(batch, heads, rows, patterns, choices)
    total = paid.masked_fill(~there, 0).sum(-1)
    return total.masked_fill(~there.any(-1), float("nan"))


def mean_over_rows(paid: Float[Tensor, "batch head row pattern"]) -> Float[Tensor, "batch head pattern"]:
    """The mean over the rows that have a key in a pattern; NaN if none has."""
    return paid.nanmean(2)
