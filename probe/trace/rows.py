"""Which positions of a running batch are meant by the name of rows."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

from probe.models.encoding import Batch
from probe.models.token_map import Selection, parse_selection
from probe.segments import QUERY

ANSWER: Final = "answer"
"""The positions that predict the tokens of the query's answer."""

FIRST: Final = "first"
"""The one that predicts the first of them."""

Asked = Selection | Literal["answer", "first"]


def parse_rows(rows: str) -> Asked:
    """Read the name of rows: :data:`ANSWER`, :data:`FIRST`, or a selection."""
    return ANSWER if rows == ANSWER else FIRST if rows == FIRST else parse_selection(rows)


def meant(asked: Asked, batch: Batch, step: int, n: int) -> Tensor:
    """``[batch, n]``, which of n positions are meant; a generated one counts as one of the query's answer."""
    found = torch.zeros(len(batch), n, dtype=torch.bool)
    if step:
        found[:] = asked == ANSWER or (isinstance(asked, Selection) and asked.holds("answer", QUERY))
        return found
    for row, encoding, pad in zip(found, batch.encodings, batch.pads, strict=True):
        if not isinstance(asked, Selection):
            places = encoding.token_map.answer - 1 + pad
            row[places[:1] if asked == FIRST else places[places < n]] = True
        else:
            row[pad:] = torch.from_numpy(asked.of(encoding.token_map))[: n - pad]
    return found
