"""What a model answers: generated text with its score, and how probable it finds the answers that are given.

Every behavioural experiment begins here. Greedy generation is what a user would see; the log-probabilities tell how
sure the model was, and which of a closed set of labels it would choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import torch
import xarray as xr

from probe.data.example import Episode, Example
from probe.data.images import open_images
from probe.data.manifest import content_key
from probe.errors import ProbeError, UsageError, did_you_mean
from probe.models.model import Model
from probe.scoring import cut_answer, exact_match, vqa_accuracy
from probe.store import Keep
from probe.trace.generate import generate
from probe.trace.likelihood import likelihoods

MAX_UNKNOWN_WORDS = 0.2

Probable = Literal["nothing", "gold", "labels"]
"""Whose log-probability is measured: nobody's, that of the gold answer, or that of every label of the episode's set."""


def answering(
    model: Model,
    episodes: Sequence[Episode],
    *,
    probable: Probable = "nothing",
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    keep: Keep | None = None,
    name: str = "",
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Let a model answer the queries of episodes.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        One or more; their ids may repeat where strategy or shots differ.
    probable
        What else to measure: the log-probability of the ``gold`` answer, or of all ``labels`` in the episode's
        ``info["label_set"]``, to choose among them.
    batch_size
        Episodes in one forward.
    max_new_tokens
        Length at which an answer is cut; default :func:`answer_limit`.
    keep
        Keeps finished batches, such as the ``part`` of a run directory.
    name
        Begins the names of these batches.
    progress
        Called with the number of episodes done after every batch.

    Returns
    -------
    xarray.Dataset
        Over ``episode``: ``prediction``, ``gold``, ``correct`` (exact match with any accepted answer), ``score`` (VQA
        accuracy where the data set has annotators, else the same as ``correct``). With ``gold``:
        ``log_probability`` (nats, summed over the tokens of the gold answer) and ``n_answer_tokens``. With ``labels``
        also ``choice`` and ``choice_normalised``, the most probable label by the sum and by the mean over tokens,
        ``n_labels``, and ``shared_first_token``: whether two labels begin with the same token. Coordinates:
        ``episode``, ``query``, ``strategy``, ``seed``, ``shots``, ``perturbations``.

    Raises
    ------
    UsageError
        If there are no episodes, a number is out of range, or too many words are unknown to the tokenizer.
    ProbeError
        If an image cannot be read or memory runs out.
    """
    if probable not in get_args(Probable):
        raise UsageError(f"There is no probability of {probable!r}; {did_you_mean(probable, get_args(Probable))}")
    if not episodes:
        raise UsageError("There are no episodes to answer.")
    if batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise UsageError(f"A batch and an answer hold at least one; asked for {batch_size} and {max_new_tokens}.")
    check_words(model, episodes)
    limit = answer_limit(model, episodes) if max_new_tokens is None else max_new_tokens
    done: list[xr.Dataset] = []
    n = 0
    for unit in units(model, episodes, batch_size):

        def compute(unit: Sequence[Episode] = unit) -> xr.Dataset:
            with within_memory(model, len(unit)):
                return _answer(model, unit, probable, limit)

        # By content: a part of other episodes, or read otherwise, is never taken for this one.
        part = f"{name}{n:06d}-{probable}-{limit}-{content_key(unit)}"
        done.append(keep(part, compute) if keep else compute())
        n += len(unit)
        if progress:
            progress(n)
    result = xr.concat(done, "episode", data_vars="all", coords="different", compat="equals", join="exact")
    result.attrs = {**facts(model), "max_new_tokens": limit, "n_attempted": len(episodes), "n_done": len(episodes)}
    return result


def units(model: Model, episodes: Sequence[Episode], batch_size: int) -> Iterator[Sequence[Episode]]:
    """Episodes that are read together, in their order; where the family asks for it, with equally many images."""
    unit: list[Episode] = []
    for episode in episodes:
        unlike = model.family.like_images and unit and _n_images(unit[-1]) != _n_images(episode)
        if len(unit) == batch_size or unlike:
            yield unit
            unit = []
        unit.append(episode)
    yield unit


def _n_images(episode: Episode) -> int:
    return sum(len(example.images) for example in episode.examples)


def _answer(model: Model, episodes: Sequence[Episode], probable: Probable, max_new_tokens: int) -> xr.Dataset:
    encodings = [model.encode(episode, open_images(episode)) for episode in episodes]
    said = generate(model, model.batch(encodings, with_answer=False), max_new_tokens=max_new_tokens)
    predictions = [cut_answer(text) for text in said]
    values: dict[str, tuple[str, object]] = {
        "prediction": ("episode", np.array(predictions, dtype=str)),
        "gold": ("episode", np.array([episode.query.answer for episode in episodes], dtype=str)),
        "correct": ("episode", [exact_match(p, e.query.answers) for p, e in zip(predictions, episodes, strict=True)]),
        "score": ("episode", [score(p, e.query) for p, e in zip(predictions, episodes, strict=True)]),
    }
    if probable != "nothing":
        values |= _probabilities(model, episodes, closed=probable == "labels")
    return xr.Dataset(
        values,
        coords={
            "episode": [episode.id for episode in episodes],
            "query": ("episode", [episode.query.id for episode in episodes]),
            "strategy": ("episode", [episode.strategy for episode in episodes]),
            "seed": ("episode", [episode.seed for episode in episodes]),
            "shots": ("episode", [episode.shots for episode in episodes]),
            "perturbations": ("episode", ["; ".join(episode.perturbations) for episode in episodes]),
        },
    )


def _probabilities(model: Model, episodes: Sequence[Episode], *, closed: bool) -> dict[str, tuple[str, object]]:
    candidates = [label_set(episode) if closed else [episode.query.answer] for episode in episodes]
    found = likelihoods(model, episodes, candidates, batch_size=len(episodes))
    gold = [x.candidates.index(e.query.answer) for x, e in zip(found, episodes, strict=True)]
    values: dict[str, tuple[str, object]] = {
        "log_probability": ("episode", [float(x.total[at]) for x, at in zip(found, gold, strict=True)]),
        "n_answer_tokens": ("episode", [int(x.n_tokens[at]) for x, at in zip(found, gold, strict=True)]),
    }
    if closed:
        values |= {
            "choice": ("episode", np.array([x.choice() for x in found], dtype=str)),
            "choice_normalised": ("episode", np.array([x.choice(normalised=True) for x in found], dtype=str)),
            "n_labels": ("episode", [len(x.candidates) for x in found]),
            "shared_first_token": ("episode", [x.share_first_token for x in found]),
        }
    return values


def label_set(episode: Episode) -> list[str]:
    """The closed set of answers that belongs to an episode.

    Raises
    ------
    UsageError
        If it has none, or its query's answer is not in it.
    """
    labels = episode.info.get("label_set")
    if not labels or episode.query.answer not in labels:
        raise UsageError(
            f"Episode {episode.id} has no set of labels with its answer {episode.query.answer!r} in it; make episodes "
            'with labelled_episodes, or fill info["label_set"].'
        )
    return list(labels)


def score(prediction: str, query: Example) -> float:
    """VQA accuracy where the answers are those of annotators (``info["annotated"]``), else exact match; 0 to 1.

    Where all annotators wrote the same, the official accuracy compares as it is written, and ``Yes`` gets 0 for
    ``yes``. Here it is normalised there too: how a model writes is not what is measured.
    """
    right = exact_match(prediction, query.answers)
    if not query.info.get("annotated"):
        return float(right)
    return 1.0 if right and len(set(query.answers)) == 1 else vqa_accuracy(prediction, query.answers)


def answer_limit(model: Model, episodes: Sequence[Episode]) -> int:
    """Tokens to generate: 8 more than the longest answer that could be accepted or copied, so that none is cut."""
    answers = {answer for episode in episodes for answer in episode.query.answers}
    answers |= {example.answer for episode in episodes for example in episode.demonstrations}
    return 8 + max(len(ids) for ids in model.tokenizer(sorted(answers), add_special_tokens=False)["input_ids"])


def check_words(model: Model, episodes: Sequence[Episode]) -> tuple[int, int]:
    """Count unknown words; refuse data that the model cannot read.

    Returns
    -------
    tuple of int
        Unknown and all tokens of the questions and shown answers.
    """
    unknown, words = model.unknown_words(episodes)
    if unknown > MAX_UNKNOWN_WORDS * words:
        raise UsageError(
            f"{unknown} of {words} words of the questions and answers ({unknown / words:.0%}) are unknown to "
            f"{model.name}, more than {MAX_UNKNOWN_WORDS:.0%}: it would read noise. Choose a model that knows them, "
            "such as --model DIR."
        )
    return unknown, words


@contextmanager
def within_memory(model: Model, n: int) -> Iterator[None]:
    """Say in a sentence that a batch of ``n`` does not fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ProbeError(
            f"A batch of {n} does not fit into the memory of {model.device}; lower the batch size (--batch-size)."
        ) from error


def facts(model: Model) -> dict[str, object]:
    """What every result says about the model that it comes from."""
    known: dict[str, object] = {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "model_origin": model.origin,
        "model_family": model.family.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.attention_implementation,
        "prompt": model.prompt,
    }
    if model.caveat:
        known["caveat"] = model.caveat
    return known
