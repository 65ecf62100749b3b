"""What every position of a rendered episode is.

A token map is a partition: every position has exactly one role.

=============  ======================================================================================================
role           positions
=============  ======================================================================================================
``sink``       the first position, whatever its token
``image``      image tokens
``question``   the question's text
``answer``     the answer's text
``delimiter``  the rest of a demonstration's or the query's turn: role markers, vision start and end, newlines
``template``   the rest: what the template writes before the first turn, such as a system prompt
=============  ======================================================================================================

``demonstration`` says whose: 0 to k-1 in reading order, :data:`QUERY` for the query, :data:`NEITHER` for sink and
template. The modality follows from the role: ``visual`` (image), ``textual`` (question, answer), ``structural``
(template, delimiter), ``sink``. So textual mass never contains structural tokens.

A *segment* is all positions of one role and one owner; its label is ``demo0/image``, ``query/question``, ``sink`` …
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probe.segments import NEITHER, QUERY

MODALITY_OF_ROLE = {
    "sink": "sink",
    "template": "structural",
    "image": "visual",
    "question": "textual",
    "answer": "textual",
    "delimiter": "structural",
}
ROLES = tuple(MODALITY_OF_ROLE)
PADDING = -1
"""In place of a role: a key on the vision axis that stands for nothing (an unused tile)."""
TURN_ROLES = ("image", "question", "answer", "delimiter")


@dataclass(frozen=True)
class Segment:
    """One role of one owner."""

    role: str
    demonstration: int

    @property
    def label(self) -> str:
        """Name on the ``segment`` axis of results."""
        if self.demonstration == NEITHER:
            return self.role
        return f"{'query' if self.demonstration == QUERY else f'demo{self.demonstration}'}/{self.role}"

    @property
    def modality(self) -> str:
        """``visual``, ``textual``, ``structural`` or ``sink``."""
        return MODALITY_OF_ROLE[self.role]


def segments_for(shots: int) -> list[Segment]:
    """All segments that an episode with up to ``shots`` demonstrations can have, in reading order.

    >>> [segment.label for segment in segments_for(0)]
    ['sink', 'template', 'query/image', 'query/question', 'query/answer', 'query/delimiter']
    """
    owners = [*range(shots), QUERY]
    turns = [Segment(role, owner) for owner in owners for role in TURN_ROLES]
    return [Segment("sink", NEITHER), Segment("template", NEITHER), *turns]


@dataclass(frozen=True)
class TokenMap:
    """The roles of the n positions of one rendered episode (without padding).

    Attributes
    ----------
    role
        ``[n]``, indices into :data:`ROLES`, or :data:`PADDING`.
    demonstration
        ``[n]``, 0..k-1, :data:`QUERY` or :data:`NEITHER`.
    image
        ``[n]``, which image of the episode in reading order, -1 where the position is none. Where images stand on an
        axis of their own, the markers that stand for them in the text.
    tile
        ``[n]``, which tile of that image; 0 in families without tiles, -1 where the position is no image token.
    row, column
        ``[n]``, place in the image's grid of tokens, -1 where there is none.
    shots
        Number of demonstrations.
    n_straddling
        Tokens whose characters belong to two roles; they take that of their first non-space character.
    """

    role: NDArray[np.int8]
    demonstration: NDArray[np.int16]
    image: NDArray[np.int16]
    tile: NDArray[np.int16]
    row: NDArray[np.int16]
    column: NDArray[np.int16]
    shots: int
    n_straddling: int

    def __len__(self) -> int:
        return len(self.role)

    def where(self, role: str, demonstration: int | None = None) -> NDArray[np.intp]:
        """The positions of one role, of one owner if given, in order."""
        chosen = self.role == ROLES.index(role)
        if demonstration is not None:
            chosen = chosen & (self.demonstration == demonstration)
        return np.flatnonzero(chosen)

    def segment_index(self, segments: list[Segment]) -> NDArray[np.int64]:
        """``[n]``: for every position, the index of its segment in ``segments``, -1 on padding."""
        index = {(ROLES.index(s.role), s.demonstration): i for i, s in enumerate(segments)}
        pairs = zip(self.role.tolist(), self.demonstration.tolist(), strict=True)
        return np.array([-1 if pair[0] == PADDING else index[pair] for pair in pairs], dtype=np.int64)

    @property
    def answer(self) -> NDArray[np.intp]:
        """The positions of the query's answer."""
        return self.where("answer", QUERY)
