"""What a model's answers rest on: the query's image, or its question.

The same episodes are read three times: as they are, with the query's image blurred, and with another question of the
same answer type in place of the query's. What the first change costs is visual recognition, what the second costs is
linguistic recognition, and the *modality reliance* is the share of the latter,

``R = Δ_linguistic / (Δ_linguistic + Δ_visual)``,

1 if the answers rest on the question alone and 0 if they rest on the image alone. It depends on the task: it is never
averaged over data sets. The probes are switches of the code of Li et al. (CVPR 2024); the index is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xarray as xr

from probe.data.example import Episode, Example
from probe.data.perturb import perturb
from probe.experiments.answering import answering
from probe.models.model import Model
from probe.store import Keep

READINGS: dict[str, tuple[str, ...]] = {
    "as-is": (),
    "blurred-image": ("blurred-query",),
    "other-question": ("other-question",),
}
"""What each reading changes, by :func:`probe.perturb`."""


def modality_reliance(
    model: Model,
    episodes: Sequence[Episode],
    *,
    pool: Sequence[Example] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Read episodes with the query's image blurred, and with another question.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        Whose queries show an image.
    pool
        From which other questions are taken; default all examples of the episodes.
    seed
        Of which question is taken.
    batch_size
        Episodes in one forward.
    keep
        Keeps finished batches.
    progress
        Called with the number of episodes read, three times that of the episodes in the end.

    Returns
    -------
    xarray.Dataset
        ``score`` and ``prediction`` over (reading, episode), judged by the query's own answers;
        :func:`probe.measures.reliance.reliance` makes the index of them.

    Raises
    ------
    UsageError
        If no other question is there to take.
    """
    parts = []
    for number, (name, changes) in enumerate(READINGS.items()):
        changed = perturb(episodes, changes, seed=seed, pool=pool)

        def onward(now: int, before: int = number * len(episodes)) -> None:
            if progress:
                progress(before + now)

        answers = answering(model, changed, batch_size=batch_size, keep=keep, name=f"{name}-", progress=onward)
        parts.append(answers[["score", "prediction"]].drop_vars("perturbations"))
    result = xr.concat(parts, xr.Variable("reading", list(READINGS)), join="override")
    result.attrs = {**answers.attrs, "experiment": "modality_reliance", "question_seed": seed}
    return result
