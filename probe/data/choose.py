"""Choosing demonstrations for queries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from PIL import Image

from probe.data.example import Episode, Example, Picture, check_request
from probe.data.images import open_image, pixel_hash
from probe.errors import UsageError


def random_episodes(examples: Sequence[Example], *, shots: int, n: int, seed: int = 0) -> list[Episode]:
    """Make episodes whose demonstrations are drawn at random.

    Each example is the query at most once, in an order drawn from ``seed``. Its demonstrations are drawn uniformly,
    without replacement, from the other examples that share no image with it: an identical image would leak the answer,
    since a model could look the picture up among the demonstrations and copy what stands there. The same image is the
    same file, or the same pixels in memory; copies under two names are not noticed.

    Parameters
    ----------
    examples
        From which queries and demonstrations come.
    shots
        Demonstrations in each episode.
    n
        Number of episodes at most; there are fewer if there are fewer examples.
    seed
        Episode i of a seed is always the same, whatever ``n``. With more shots it begins with the same demonstrations.

    Returns
    -------
    list of Episode

    Raises
    ------
    UsageError
        If a number is out of range, or there are too few examples, or too few that do not share the query's image.
    """
    check_request(shots, n, seed)
    if len(examples) < shots + 1:
        raise UsageError(
            f"{shots} shots and a query need {shots + 1} examples, but there are {len(examples)}; add examples or ask "
            "for fewer shots."
        )
    import numpy as np

    pictures = [{_identity(image, example) for image in example.images} for example in examples]
    showing: dict[str, set[int]] = defaultdict(set)
    for index, shown in enumerate(pictures):
        for picture in shown:
            showing[picture].add(index)
    episodes = []
    for number, query in enumerate(np.random.default_rng((seed, 0)).permutation(len(examples))[:n].tolist()):
        taken = {query}.union(*(showing[picture] for picture in pictures[query]))
        free = len(examples) - len(taken)
        if free < shots:
            raise UsageError(
                f"The query {examples[query].id!r} needs {shots} demonstrations, but only {free} other examples do not "
                "show its image; add examples or ask for fewer shots."
            )
        rng = np.random.default_rng((seed, 1, number))
        drawn: list[int] = []
        # One by one, and drawn again if taken: so the first demonstrations do not depend on how many follow.
        while len(drawn) < shots:
            candidate = int(rng.integers(len(examples)))
            if candidate not in taken:
                taken.add(candidate)
                drawn.append(candidate)
        episodes.append(
            Episode(
                id=f"random-{seed}-{number}",
                demonstrations=tuple(examples[index] for index in drawn),
                query=examples[query],
                strategy="random",
                seed=seed,
            )
        )
    return episodes


def _identity(picture: Picture, example: Example) -> str:
    """Give the same string for the same image."""
    if isinstance(picture, Image.Image):
        return f"pixels {pixel_hash(open_image(picture, where=f'example {example.id}'))}"
    return f"file {picture.resolve()}"
