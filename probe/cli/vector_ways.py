"""In which ways ``probe vector compare`` answers the same queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from probe.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from probe.experiments.ways import Way
    from probe.vectors.vector import InContextVector

PARTS = ("layers", "heads", "rows")
ROWS = ("sink+template", "query/image", "query/question", "answer")
"""By which positions a vector is taken apart."""


def ways_of(
    vectors: Mapping[str, InContextVector],
    *,
    random: int,
    put_back: bool,
    parts: str | None,
    seed: int,
) -> list[Way]:
    """The ways that the options name.

    Raises
    ------
    UsageError
        If there are no such parts.
    """
    from probe.experiments.ways import ways_for

    found = ways_for(vectors, random=random, put_back=put_back, seed=seed)
    if parts is not None:
        if parts not in PARTS:
            raise UsageError(f"Vectors have no parts {parts!r}; {did_you_mean(parts, PARTS)}")
        for label, vector in vectors.items():
            found += _parts(label, vector, parts)
    return found


def _parts(label: str, vector: InContextVector, parts: str) -> list[Way]:
    from probe.experiments.ways import Way

    layers = vector.layers
    if parts == "layers":
        return [Way(f"{label}, layer {layer}", vector, layers=(layer,)) for layer in layers]
    if parts == "heads":
        pairs = vector.method.acting_heads(vector.parameters)
        return [Way(f"{label}, head {layer}.{head}", vector, heads=((layer, head),)) for layer, head in pairs]
    if vector.method.rows != "all":
        return []  # it acts at chosen positions; others are no part of it
    return [Way(f"{label}, at {rows}", vector, rows=rows) for rows in ROWS]
