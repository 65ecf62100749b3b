"""Log-probabilities of given answers, against one plain forward for each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import probe
from probe.data.example import Episode
from probe.errors import UsageError
from probe.models.model import Model
from probe.trace.likelihood import Likelihood, _readers, likelihoods

CANDIDATES = ("two red stars", "two red circles", "two", "three blue rings", "two red")


@pytest.fixture(scope="module")
def toy() -> Model:
    return probe.load("toy")


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return [
        probe.synthetic_episodes("describe", shots=shots, n=4, seed=3)[shots] for shots in (0, 2, 3, 1)
    ]  # of unequal lengths: the batch is padded


def naive(model: Model, episode: Episode, answer: str) -> tuple[float, int]:
    """Sum of log p over the answer's tokens by transformers' own forward on this episode alone."""
    encoding = model.encode(replace(episode, query=replace(episode.query, answers=(answer,))))
    batch = model.batch([encoding])
    with torch.no_grad():
        logits = model.module(**model.inputs(batch)).logits[0].double()
    total = 0.0
    for position in encoding.token_map.answer.tolist():
        scores = logits[position - 1]
        total += float(scores[encoding.ids[position]] - torch.logsumexp(scores, 0))
    return total, len(encoding.token_map.answer)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_as_one_plain_forward_for_each(toy: Model, episodes: list[Episode], batch_size: int) -> None:
    found = likelihoods(toy, episodes, [CANDIDATES] * 4, batch_size=batch_size)
    for episode, likelihood in zip(episodes, found, strict=True):
        expected = [naive(toy, episode, answer) for answer in CANDIDATES]
        np.testing.assert_allclose(likelihood.total, [total for total, _ in expected], atol=2e-4)
        assert likelihood.n_tokens.tolist() == [n for _, n in expected] == [3, 3, 1, 3, 2]
        assert likelihood.candidates == CANDIDATES
        assert likelihood.share_first_token


def test_the_toy_prefers_the_truth_and_one_forward_serves_single_tokens(toy: Model) -> None:
    episodes = probe.synthetic_episodes("vqa", shots=2, n=12, seed=5)
    colours = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan")
    asked = [e for e in episodes if e.query.question == "colour?"]
    assert len(_readers(toy.encode_answers(asked[0], colours))) == 1
    for episode, likelihood in zip(asked, likelihoods(toy, asked, [colours] * len(asked)), strict=True):
        assert likelihood.choice() == likelihood.choice(normalised=True) == episode.query.answer
        assert not likelihood.share_first_token
        assert 0.9 < np.exp(likelihood.total).sum() <= 1 + 1e-9


def test_few_readers(toy: Model, episodes: list[Episode]) -> None:
    readers = _readers(toy.encode_answers(episodes[1], CANDIDATES))
    assert len(readers) == 2  # "two red …" serves all but "three blue …"


def test_length_changes_the_choice() -> None:
    likelihood = Likelihood(("long answer", "short"), np.array([-2.0, -1.5]), np.array([4, 1]), np.array([7, 8]))
    assert likelihood.choice() == "short"
    assert likelihood.choice(normalised=True) == "long answer"
    assert likelihood.mean.tolist() == [-0.5, -1.5]


def test_candidates_that_cannot_be(toy: Model, episodes: list[Episode]) -> None:
    with pytest.raises(UsageError, match="one or more, each once"):
        likelihoods(toy, episodes[:1], [()])
    with pytest.raises(UsageError, match="one or more, each once"):
        likelihoods(toy, episodes[:1], [("red", "red")])
