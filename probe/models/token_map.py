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
A *selection* (:func:`parse_selection`) names several at once: ``demos/image``, ``demo0``, ``sink+query``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probe.errors import UsageError
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


ROLES_BY_WORD = {
    "image": ("image",),
    "question": ("question",),
    "answer": ("answer",),
    "text": ("question", "answer"),
    "delimiter": ("delimiter",),
    "": TURN_ROLES,
}
"""What may follow an owner in a selection."""


@dataclass(frozen=True)
class Selection:
    """Some of an episode's positions, by role and owner.

    Attributes
    ----------
    parts
        Each an owner (a demonstration, :data:`QUERY`, :data:`NEITHER`, or ``None`` for all demonstrations) and roles.
    """

    parts: tuple[tuple[int | None, tuple[str, ...]], ...]

    def holds(self, role: str, demonstration: int) -> bool:
        """Whether positions of this role and owner are meant."""
        return any(
            role in roles and (demonstration == owner if owner is not None else demonstration >= 0)
            for owner, roles in self.parts
        )

    def of(self, token_map: TokenMap) -> NDArray[np.bool_]:
        """``[n]``, which positions of an episode are meant."""
        meant = np.zeros(len(token_map), dtype=bool)
        for owner, roles in self.parts:
            owned = token_map.demonstration >= 0 if owner is None else token_map.demonstration == owner
            meant |= owned & np.isin(token_map.role, [ROLES.index(role) for role in roles])
        return meant


def parse_selection(name: str) -> Selection:
    """Read the name of a selection.

    Parameters
    ----------
    name
        ``OWNER/ROLE`` or ``OWNER`` (the whole turn), or several joined by ``+``. Owners: ``demos`` (all of them),
        ``demo0``, ``demo1`` …, ``query``. Roles: ``image``, ``question``, ``answer``, ``text`` (question and answer),
        ``delimiter``. Beside them ``sink``, ``template``, and ``all``.

    Returns
    -------
    Selection

    Raises
    ------
    UsageError
        If it is no such name.

    Examples
    --------
    >>> parse_selection("demos/image+sink").parts
    ((None, ('image',)), (-2, ('sink',)))
    """
    parts: list[tuple[int | None, tuple[str, ...]]] = []
    for part in name.replace(" ", "").split("+"):
        found = re.fullmatch(r"(demos|query|demo(\d+))(?:/(\w+))?", part)
        if part in ("sink", "template"):
            parts.append((NEITHER, (part,)))
        elif part == "all":
            parts += [(None, TURN_ROLES), (QUERY, TURN_ROLES), (NEITHER, ("sink", "template"))]
        elif found and (found[3] or "") in ROLES_BY_WORD:
            owner = {"demos": None, "query": QUERY}[found[1]] if not found[2] else int(found[2])
            parts.append((owner, ROLES_BY_WORD[found[3] or ""]))
        else:
            roles = ", ".join(role for role in ROLES_BY_WORD if role)
            raise UsageError(
                f"There are no tokens {part!r}. Write an owner (demos, demo0, demo1 …, query), with a role after a "
                f"slash if not all are meant ({roles}), or sink, template, all; join several by +: demos/image+sink."
            )
    return Selection(tuple(parts))
