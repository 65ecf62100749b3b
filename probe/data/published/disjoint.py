"""Whether pool and queries share images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from probe.data.example import Example, Picture
from probe.data.images import image_identity, open_image
from probe.errors import ProbeError

NAMED_AT_MOST = 5
"""How many queries the message names."""


def check_disjoint(pool: Sequence[Example], queries: Sequence[Example], *, pixels: bool = False) -> None:
    """Refuse a pool that shows an image of a query.

    A model could look the picture up among the demonstrations and copy what stands there.

    Parameters
    ----------
    pool
        From which demonstrations are chosen.
    queries
        What is asked.
    pixels
        Compare the pixels, which opens every image, once. Otherwise the same image is the same file, links followed,
        and copies of a file are not noticed: where each split has a directory of its own, as in VQAv2, this finds
        nothing, whatever the images show. Images in memory are compared by their pixels in any case.

    Raises
    ------
    ProbeError
        With the ids, if an image is in both; or if an image cannot be opened.
    """
    known: dict[Path, str] = {}

    def identity(image: Picture, example: Example) -> str:
        where = f"example {example.id}"
        if not pixels or isinstance(image, Image.Image):
            return image_identity(image, where=where)
        if image not in known:
            known[image] = image_identity(open_image(image, where=where), where=where)
        return known[image]

    shown: dict[str, str] = {}
    for example in pool:
        for image in example.images:
            shown.setdefault(identity(image, example), example.id)
    shared = {
        query.id: shown[picture]
        for query in queries
        for picture in (identity(image, query) for image in query.images)
        if picture in shown
    }
    if shared:
        pairs = [f"{query} (with {example} of the pool)" for query, example in shared.items()]
        more = f" and {len(pairs) - NAMED_AT_MOST} more" if len(pairs) > NAMED_AT_MOST else ""
        raise ProbeError(
            f"The pool shows an image of {len(pairs)} of {len(queries)} queries: {', '.join(pairs[:NAMED_AT_MOST])}"
            f"{more}; take such examples out of the pool, or give another split."
        )
