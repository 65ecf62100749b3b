"""What a vector costs when a model answers with it: the time to the first token, and that of every further one.

All ways are timed in turn, again and again, each round in another order, so that whatever else the machine does meets
all alike. The first round, in which modules are wrapped and kernels chosen, does not count. Answers do not end early:
every way does the same number of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr

from probe.data.example import Episode
from probe.errors import UsageError
from probe.experiments.answering import facts, within_memory
from probe.experiments.compare import prompts_of
from probe.experiments.ways import Way
from probe.models.model import Model


def vector_cost(
    model: Model,
    episodes: Sequence[Episode],
    ways: Sequence[Way],
    *,
    rounds: int = 20,
    tokens: int = 8,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Time how long answers take.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        One batch of them.
    ways
        To answer; others are compared with the first.
    rounds
        How often each is timed.
    tokens
        How many tokens are decoded behind the first.
    progress
        Called with the number of rounds done.

    Returns
    -------
    xarray.Dataset
        Over (way, round): ``first`` and ``per_token``, seconds for the whole batch.

    Raises
    ------
    UsageError
        If a number is out of range.
    ProbeError
        If memory runs out.
    """
    if rounds < 1 or tokens < 1 or not ways or not episodes:
        raise UsageError("Timing needs one way, one episode, one round and one token, or more of each.")
    batches = {shown: prompts_of(model, episodes, shown=shown) for shown in {way.shown for way in ways}}
    steered = [way.put_into(model) for way in ways]

    def seconds(number: int, n: int) -> float:
        _wait(model)
        start = time.perf_counter()
        steered[number].generate(batches[ways[number].shown], max_new_tokens=n, stop=False)
        _wait(model)
        return time.perf_counter() - start

    found = np.empty((2, len(ways), rounds + 1))
    with within_memory(model, len(episodes)):
        for turn in range(rounds + 1):
            for number in np.random.default_rng(turn).permutation(len(ways)):
                first = seconds(number, 1)
                found[:, number, turn] = first, (seconds(number, 1 + tokens) - first) / tokens
            if progress:
                progress(turn)
    dims = ("way", "round")
    result = xr.Dataset(
        {"first": (dims, found[0, :, 1:]), "per_token": (dims, found[1, :, 1:])},
        coords={"way": [way.label for way in ways], "round": range(rounds)},
    )
    for name in ("first", "per_token"):
        result[name].attrs["units"] = f"seconds for a batch of {len(episodes)}"
    result.attrs = {**facts(model), "experiment": "vector_cost", "batch": len(episodes), "tokens": tokens}
    return result


def _wait(model: Model) -> None:
    """Until the device has done what it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
