"""What methods share that try several vectors on episodes that validate: the best is kept.

Best is the one under which the gold answers of queries without demonstrations are most probable on average. The
episodes that validate are split off as in training (:func:`probe.vectors.training.split`), and nothing else is learned
from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from probe.data.example import Episode
from probe.errors import UsageError
from probe.models.model import Model
from probe.trace.likelihood import answer_log_probability
from probe.trace.steer import check_plain
from probe.vectors.method import Method, Steps
from probe.vectors.pairs import alone
from probe.vectors.teacher import Teacher
from probe.vectors.training import Training, describe, split
from probe.vectors.vector import InContextVector


@dataclass(frozen=True)
class Searched(Method):
    """A method that finds several vectors and keeps one.

    Attributes
    ----------
    choice
        What validation chooses, for messages.
    """

    choice: ClassVar[str]

    @property
    def n_candidates(self) -> int | None:
        """How many there are at most: 1 if an option leaves no choice, ``None`` if as many as the model has layers."""
        raise NotImplementedError

    def n_readings(self, model: Model, n_episodes: int) -> int:
        """How many episodes :meth:`candidates` reads."""
        raise NotImplementedError

    def candidates(
        self, model: Model, episodes: Sequence[Episode], training: Training, steps: Steps
    ) -> tuple[list[InContextVector], dict[str, Any]]:
        """The vectors to choose from, and what the card says of them."""
        raise NotImplementedError

    def check(self, model: Model) -> None:
        """Refuse options that the model does not allow, before anything is read.

        Raises
        ------
        UsageError
            If it does not.
        """

    def fit(
        self,
        model: Model,
        episodes: Sequence[Episode],
        *,
        training: Training | None = None,
        teacher: Teacher | None = None,
        directory: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> InContextVector:
        """Find the candidates, and try them; ``teacher`` and ``directory`` are not used.

        Raises
        ------
        UsageError
            If the model does not allow the options, or there are no episodes to choose by.
        """
        check_plain(model)
        self.check(model)
        options = training or Training()
        learn, validate = split(episodes, options)
        n = self.n_candidates or model.n_layers
        if n > 1 and not validate:
            raise UsageError(
                f"There are no episodes to choose {self.choice} by; give more, or let some validate (--validation)."
            )
        steps = Steps(progress, self.n_readings(model, len(learn)) + (n * len(validate) if n > 1 else 0))
        found, about = self.candidates(model, learn, options, steps)
        best = 0
        if n > 1:
            steps.add((n - len(found)) * len(validate))  # fewer may be worth a try
            scores = [_probability(model, validate, each, options.batch_size, steps) for each in found]
            best = int(torch.tensor(scores).argmax())
            about = {**about, f"by_{self.choice.split()[-1]}": [round(score, 4) for score in scores]}
        card = {**describe(model, self, episodes, options), **({"fitted": about} if about else {})}
        return replace(found[best], card=card)


def _probability(
    model: Model, episodes: Sequence[Episode], vector: InContextVector, batch_size: int, steps: Steps
) -> float:
    """Mean log-probability of the gold answers of queries without demonstrations."""
    found: list[float] = []
    for start in range(0, len(episodes), batch_size):
        encodings = [model.encode(alone(episode)) for episode in episodes[start : start + batch_size]]
        found += answer_log_probability(model, model.batch(encodings), vector.edits()).tolist()
        steps.add(len(encodings))
    return sum(found) / len(found)
