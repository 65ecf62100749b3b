"""In-context vectors beside what they stand for: the same queries, without demonstrations, with them, with vectors.

What a *way* to answer is, is in :mod:`probe.experiments.ways`. Each batch is read in all of them; its pictures are
processed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from probe.data.example import Episode
from probe.data.manifest import content_key, query_keys
from probe.errors import UsageError
from probe.experiments.answering import answer_limit, check_words, facts, units, within_memory
from probe.experiments.ways import FEW, IN_CONTEXT, ORACLE, ORACLES, ZERO, Way, describe_ways, oracle_ways
from probe.models.encoding import Batch
from probe.models.model import Model
from probe.scoring import cut_answer, exact_match
from probe.store import Keep, key
from probe.trace.edit import Output, Site
from probe.trace.likelihood import total_log_probability
from probe.trace.read import LayerValues, read
from probe.trace.steer import check_plain
from probe.vectors.oracle import Oracle
from probe.vectors.pairs import Pair, encode_pair
from probe.vectors.teacher import flat_places, stack
from probe.vectors.vector import InContextVector

DISTANCE_SITE: Output = "layer_output"


def compare(
    model: Model,
    episodes: Sequence[Episode],
    ways: Sequence[Way],
    *,
    oracle: bool = False,
    distances: int = 128,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Answer the same queries in several ways.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        With demonstrations; ways that do not show them read the query alone. Those whose queries a vector was fitted on
        are left out, and counted (``n_left_out``).
    ways
        Such as :func:`ways_for` makes; zero-shot and few-shot must be among them.
    oracle
        Add :data:`ORACLES`: each query's own shift of attention, and what is left of it when its size, its direction or
        the kind of tokens that it comes from is not its own. All episodes' shifts are held in memory.
    distances
        For how many of the first episodes to measure how far states are from those with demonstrations.
    batch_size
        Episodes in one forward.
    max_new_tokens
        Length at which an answer is cut; default :func:`~probe.experiments.answering.answer_limit`.
    keep
        Keeps finished batches, such as the ``part`` of a run directory.
    progress
        Called with the number of episodes done after every batch.

    Returns
    -------
    xarray.Dataset
        Over (way, episode): ``correct`` (the greedy answer is right), ``forced`` (each token of the answer and its end
        is the most probable one behind those before it), ``log_probability`` (nats, of the gold answer), ``copied``
        (the answer is that of one of the episode's demonstrations, shown or not), ``prompt_tokens`` and
        ``prediction``. An oracle knows the positions of the gold answer and no others, so it cannot generate: its
        ``correct`` is ``forced``, and ``copied`` is NaN. Over (way, episode, layer): ``distance``, the mean over the
        query's and the answer's positions of the norm of the difference to the state with demonstrations, at the
        layer's output; NaN beyond the first ``distances`` episodes. On ``way``: ``kind``, ``shown``, ``scale``,
        ``where`` (layers, heads and rows, if not all), ``like``, ``method``, ``vector`` (the same where two ways use
        one vector), ``training`` (all options but the seed), ``training_data``, ``training_seed``,
        ``training_episodes``, ``training_shots``, ``n_parameters``, ``n_bytes``.

    Raises
    ------
    UsageError
        If there is nothing to compare, labels or ids repeat, or a vector was made for another model.
    ProbeError
        If an episode cannot be read.
    """
    check_plain(model)
    _check(episodes, ways, batch_size)
    steered = {way.label: way.put_into(model) for way in ways}
    asked = len(episodes)
    episodes = unseen(episodes, [way.fitted for way in ways if way.fitted is not None])
    check_words(model, episodes)
    limit = answer_limit(model, episodes) if max_new_tokens is None else max_new_tokens
    # Read when it is first needed: a run that goes on may need it no more.
    oracles = cache(partial(oracle_ways, model, episodes, batch_size))
    plan = key(
        {
            "oracle": content_key(episodes) if oracle else "",
            "ways": [way.identity for way in ways],
            "limit": limit,
            "distances": distances,
        }
    )
    done: list[xr.Dataset] = []
    n = 0
    for unit in units(model, episodes, batch_size):
        n_distances = max(0, min(distances - n, len(unit)))

        def compute(unit: Sequence[Episode] = unit, n_distances: int = n_distances) -> xr.Dataset:
            with within_memory(model, len(unit)):
                added = oracles() if oracle else []
                runs = {**steered, **{way.label: way.put_into(model) for way in added}}
                return _measure(model, unit, [*ways, *added], runs, limit, n_distances)

        done.append(keep(f"{n:06d}-{plan}-{content_key(unit)}", compute) if keep else compute())
        n += len(unit)
        if progress:
            progress(n)
    result = xr.concat(done, "episode", data_vars="minimal", coords="minimal", compat="equals", join="exact")
    result = result.assign_coords(describe_ways([*ways, *(Way(name, kind=ORACLE) for name in ORACLES if oracle)]))
    result["log_probability"].attrs["units"] = "nats"
    result["distance"].attrs = {
        "site": DISTANCE_SITE,
        "positions": "those of the query and its answer, which is given",
        "units": "norm in the residual stream",
    }
    result.attrs = {
        **facts(model),
        "experiment": "compare",
        "max_new_tokens": limit,
        "n_attempted": len(episodes),
        "n_left_out": asked - len(episodes),
        "n_done": result.sizes["episode"],
        "n_failed": 0,
    }
    return result


def unseen(episodes: Sequence[Episode], vectors: Sequence[InContextVector]) -> list[Episode]:
    """The episodes whose queries no vector was fitted on; others would flatter it.

    Raises
    ------
    UsageError
        If there are none.
    """
    fitted_on = {name for vector in vectors for name in vector.card.get("data", {}).get("queries", ())}
    left = [e for e, name in zip(episodes, query_keys(episodes), strict=True) if name not in fitted_on]
    if not left:
        raise UsageError(
            f"All {len(episodes)} queries are among those that a vector was fitted on: answers to them would flatter "
            "it. Ask others, with another --seed or, of your own data, another file (--data)."
        )
    return left


def _check(episodes: Sequence[Episode], ways: Sequence[Way], batch_size: int) -> None:
    if not episodes:
        raise UsageError("There are no episodes to answer.")
    if batch_size < 1:
        raise UsageError(f"A batch holds at least one episode; asked for {batch_size}.")
    if len({episode.id for episode in episodes}) != len(episodes):
        raise UsageError("Two episodes have the same id; results could not be told apart.")
    labels = [way.label for way in ways]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise UsageError(f"Two ways to answer have the same label: {', '.join(sorted(repeated))}; name them apart.")
    if not {ZERO, FEW} <= {way.kind for way in ways}:
        raise UsageError("A comparison needs the answers without and with demonstrations: add zero-shot and few-shot.")


@dataclass(frozen=True)
class _Material:
    """A batch of pairs, as the ways read it."""

    pairs: list[Pair]
    shown: Batch
    alone: Batch
    shown_prompts: Batch
    alone_prompts: Batch

    @classmethod
    def of(cls, model: Model, episodes: Sequence[Episode]) -> _Material:
        pairs = [encode_pair(model, episode) for episode in episodes]
        with_them, without = [pair.teacher for pair in pairs], [pair.student for pair in pairs]
        return cls(
            pairs,
            model.batch(with_them),
            model.batch(without),
            model.batch(with_them, with_answer=False),
            model.batch(without, with_answer=False),
        )


@dataclass(frozen=True)
class _Reading:
    """What was predicted when the answer was given: ``[batch]`` each, and states ``[layer, row, hidden]``."""

    log_probability: NDArray[np.float64]
    forced: NDArray[np.float64]
    states: list[Tensor]


def _read(steered: Model, at: _Material, way: Way, n_states: int) -> _Reading:
    """Read one batch in one way, its answers given; the states of the first episodes, ``[layer, n, hidden]`` each."""
    batch = at.shown if way.shown else at.alone
    if isinstance(way.vector, Oracle) and way.label == IN_CONTEXT:
        batch = way.vector.as_in_context(batch)
    rows = [torch.from_numpy(pair.kept[pair.query] if way.shown else pair.query) for pair in at.pairs]
    places = flat_places(batch, rows)
    lengths = [len(row) for row in rows]
    n_rows = sum(lengths[:n_states])

    def reduce(values: LayerValues) -> dict[str, Tensor]:
        assert values.layer_output is not None  # asked for
        return {"states": values.layer_output[places][:n_rows].float()}

    keep = 1 + max(len(encoding) - encoding.n_prompt for encoding in batch.encodings)
    sites: tuple[Site, ...] = (DISTANCE_SITE,) if n_states else ()
    reading = read(steered, batch, sites, reduce if sites else None, logits_to_keep=keep)
    forced, total = [], []
    for pair, row, encoding in zip(at.pairs, reading.logits, batch.encodings, strict=True):
        wanted = torch.cat([encoding.ids[encoding.n_prompt :], torch.tensor([pair.end])])
        forced.append(float(torch.equal(row[-len(wanted) :].argmax(-1).cpu(), wanted)))
        total.append(float(total_log_probability(row, encoding)))
    states = list(stack(steered, reading, "states").split(lengths[:n_states], dim=1)) if sites else []
    return _Reading(np.array(total), np.array(forced), states)


def _say(steered: Model, at: _Material, way: Way, limit: int) -> list[str]:
    """What is answered in one way."""
    prompts = at.shown_prompts if way.shown else at.alone_prompts
    return [cut_answer(text) for text in steered.generate(prompts, max_new_tokens=limit)]


def prompts_of(model: Model, episodes: Sequence[Episode], *, shown: bool) -> Batch:
    """Prompts that stop before the answer, with or without their demonstrations."""
    pairs = [encode_pair(model, episode) for episode in episodes]
    return model.batch([pair.teacher if shown else pair.student for pair in pairs], with_answer=False)


def _measure(
    model: Model,
    episodes: Sequence[Episode],
    ways: Sequence[Way],
    steered: Mapping[str, Model],
    limit: int,
    n_states: int,
) -> xr.Dataset:
    """All ways on one batch, each with its model; images are processed once."""
    at = _Material.of(model, episodes)
    target = _read(model, at, Way(FEW, shown=True), n_states).states
    far = np.full((len(ways), len(episodes), model.n_layers), np.nan)
    readings: list[_Reading] = []
    said: list[list[str] | None] = []
    for number, way in enumerate(ways):
        reading = _read(steered[way.label], at, way, n_states)
        for b, (own, wanted) in enumerate(zip(reading.states, target, strict=True)):
            far[number, b] = (own - wanted).norm(dim=-1).mean(-1).numpy()
        readings.append(reading)
        said.append(None if way.kind == ORACLE else _say(steered[way.label], at, way, limit))

    def judge(accepted: Sequence[Sequence[str]], otherwise: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        rows = [
            instead if row is None else np.array([exact_match(y, a) for y, a in zip(row, accepted, strict=True)])
            for row, instead in zip(said, otherwise, strict=True)
        ]
        return np.array(rows, dtype=np.float64)

    tokens = [[e.n_prompt for e in (at.shown if way.shown else at.alone).encodings] for way in ways]
    nothing = np.full(len(episodes), np.nan)
    dims = ("way", "episode")
    return xr.Dataset(
        {
            "correct": (dims, judge([e.query.answers for e in episodes], [r.forced for r in readings])),
            "copied": (dims, judge([[x.answer for x in e.demonstrations] for e in episodes], [nothing] * len(ways))),
            "forced": (dims, np.array([reading.forced for reading in readings])),
            "log_probability": (dims, np.array([reading.log_probability for reading in readings])),
            "distance": (("way", "episode", "layer"), far),
            "prompt_tokens": (dims, tokens),
            "prediction": (dims, np.array([row or [""] * len(episodes) for row in said], dtype=str)),
        },
        coords={
            "way": [way.label for way in ways],
            "episode": [episode.id for episode in episodes],
            "query": ("episode", [episode.query.id for episode in episodes]),
            "shots": ("episode", [episode.shots for episode in episodes]),
            "layer": range(model.n_layers),
        },
    )
