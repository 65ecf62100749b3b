"""A data set as its authors split it."""

from __future__ import annotations

from dataclasses import dataclass

from probe.data.example import Example


@dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes
    ----------
    pool
        From which demonstrations are chosen.
    queries
        What is asked.
    """

    pool: list[Example]
    queries: list[Example]
