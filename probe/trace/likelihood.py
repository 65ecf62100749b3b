"""How probable a model finds answers that are given: log p(answer), and which of several it would choose.

The log-probability of an answer is the sum over its tokens of log p(token | prompt, tokens before), without the end of
the turn. Longer answers have smaller sums, so the mean over tokens stands beside it. One forward can serve several
answers: all that begin as an answer that was read. Where every answer is one token, a single forward serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe.data.example import Episode
from probe.data.images import open_images
from probe.errors import UsageError
from probe.models.encoding import Batch, Encoding
from probe.models.model import Model
from probe.trace.edit import Edit
from probe.trace.read import read


@dataclass(frozen=True)
class Likelihood:
    """How probable the candidate answers of one episode are.

    Attributes
    ----------
    candidates
        The answers.
    total
        ``[candidate]``, the sum of log p over the tokens of each, in nats.
    n_tokens
        ``[candidate]``.
    first_token
        ``[candidate]``, the id of each answer's first token.
    """

    candidates: tuple[str, ...]
    total: NDArray[np.float64]
    n_tokens: NDArray[np.int64]
    first_token: NDArray[np.int64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """``[candidate]``, the mean of log p over the tokens of each."""
        return self.total / self.n_tokens

    @property
    def share_first_token(self) -> bool:
        """Whether two candidates begin with the same token, so that the first alone could not tell them apart."""
        return len(set(self.first_token.tolist())) < len(self.first_token)

    def choice(self, *, normalised: bool = False) -> str:
        """The most probable candidate, by the sum or (``normalised``) by the mean over tokens."""
        return self.candidates[int(np.argmax(self.mean if normalised else self.total))]


def likelihoods(
    model: Model, episodes: Sequence[Episode], candidates: Sequence[Sequence[str]], *, batch_size: int = 16
) -> list[Likelihood]:
    """Log-probabilities of candidate answers to the queries of episodes.

    Parameters
    ----------
    model
        The model.
    episodes
        Their queries' own answers play no part.
    candidates
        For each episode, one or more answers.
    batch_size
        Rows in one forward.

    Returns
    -------
    list of Likelihood
        One an episode.

    Raises
    ------
    UsageError
        If an episode has no candidate or the same twice.
    ProbeError
        If an episode cannot be encoded.
    """
    encoded: list[list[Encoding]] = []
    for episode, answers in zip(episodes, candidates, strict=True):
        if not answers or len(set(answers)) < len(answers):
            raise UsageError(
                f"Episode {episode.id}: the candidate answers must be one or more, each once; they are {list(answers)}."
            )
        encoded.append(model.encode_answers(episode, answers, open_images(episode)))
    rows = [(number, reader) for number, group in enumerate(encoded) for reader in _readers(group)]
    totals = [np.full(len(group), np.nan) for group in encoded]
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        keep = 1 + max(len(reader) - reader.n_prompt for _, reader in part)
        logits = read(model, model.batch([reader for _, reader in part]), logits_to_keep=keep).logits
        for (number, reader), row in zip(part, logits, strict=True):
            for index, encoding in enumerate(encoded[number]):
                if _serves(reader, encoding):
                    totals[number][index] = float(total_log_probability(row, encoding, reader))
    return [
        Likelihood(
            tuple(answers),
            total,
            np.array([len(encoding) - encoding.n_prompt for encoding in group]),
            np.array([int(encoding.ids[encoding.n_prompt]) for encoding in group]),
        )
        for answers, total, group in zip(candidates, totals, encoded, strict=True)
    ]


def answer_log_probability(model: Model, batch: Batch, edits: Sequence[Edit] = ()) -> NDArray[np.float64]:
    """Log-probability of the answer that each encoding of a batch ends with, ``[batch]``, in nats.

    Parameters
    ----------
    model
        The model.
    batch
        With answers.
    edits
        Changes to the forward.
    """
    keep = 1 + max(len(encoding) - encoding.n_prompt for encoding in batch.encodings)
    logits = read(model, batch, edits=edits, logits_to_keep=keep).logits
    return np.array([float(total_log_probability(*both)) for both in zip(logits, batch.encodings, strict=True)])


def _serves(reader: Encoding, encoding: Encoding) -> bool:
    """Whether a forward over ``reader`` predicts every token of the other's answer."""
    shared = len(encoding) - 1  # the last token is only predicted
    return (
        reader.n_prompt == encoding.n_prompt
        and len(reader) >= len(encoding)
        and torch.equal(reader.ids[:shared], encoding.ids[:shared])
    )


def _readers(encodings: Sequence[Encoding]) -> list[Encoding]:
    """Few encodings that serve all: the longest first, and each that none of them serves."""
    chosen: list[Encoding] = []
    for encoding in sorted(encodings, key=len, reverse=True):
        if not any(_serves(reader, encoding) for reader in chosen):
            chosen.append(encoding)
    return chosen


def total_log_probability(logits: Tensor, encoding: Encoding, read: Encoding | None = None) -> Tensor:
    """Sum of log p over an answer's tokens, in nats; it can be differentiated.

    Parameters
    ----------
    logits
        ``[kept, vocabulary]``, the last of which belongs to the last position that was read.
    encoding
        With the answer.
    read
        What was read, if that is longer; it begins as ``encoding`` does.
    """
    offset = logits.shape[0] - len(read if read is not None else encoding)
    places = torch.arange(encoding.n_prompt, len(encoding))
    chosen = logits[places - 1 + offset].double().log_softmax(-1)
    return chosen.gather(-1, encoding.ids[places].to(logits.device)[:, None]).sum()
