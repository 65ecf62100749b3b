"""TV: the state that predicts the answer, as it is with demonstrations, in place of the one without.

    v_l = mean over episodes of h_l(with demonstrations),    h_l' = v_l

at the output of one layer (:mod:`probe.vectors.one_layer`), once, in the prompt: later layers are given nothing of the
query but what attention brings them. A scale goes part of the way, h + scale (v - h).

What differs from the paper: it takes one set of demonstrations and two dummy queries, and an answer is one token; here
the mean is over the training episodes, each with demonstrations and a query of its own, as any other method's here. Its
layer is chosen by accuracy; ours by the log-probability of the answer.

References
----------
Hendel, Geva and Globerson, "In-Context Learning Creates Task Vectors", Findings of EMNLP 2023, arXiv 2310.15916; its
code (commit 1da0db6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.models.model import Model
from probe.trace.edit import Edit
from probe.vectors.method import Parameters, Steps, refuse_heads, widen
from probe.vectors.one_layer import OneLayer, first_states
from probe.vectors.pairs import encode_pair
from probe.vectors.training import Training
from probe.vectors.vector import Head


@dataclass(frozen=True)
class TaskVector(OneLayer):
    """TV's options: those of :class:`~probe.vectors.one_layer.OneLayer`."""

    name: ClassVar[str] = "task-vector"

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """One, in its layer."""
        refuse_heads(self, heads)

        def fn(value: Tensor, _: object) -> Tensor:
            h = widen(value)
            # Exact at both ends, whatever the size of what is replaced.
            return torch.lerp(h, parameters["v"].to(h).expand_as(h), scale).to(value.dtype)

        return [Edit("layer_output", self.layer, fn)]

    def n_readings(self, model: Model, n_episodes: int) -> int:
        """With demonstrations."""
        return n_episodes

    def find(
        self, model: Model, episodes: Sequence[Episode], training: Training, steps: Steps
    ) -> tuple[Tensor, dict[str, Any]]:
        """One forward over the episodes."""
        total = torch.zeros(())
        for start in range(0, len(episodes), training.batch_size):
            pairs = [encode_pair(model, episode) for episode in episodes[start : start + training.batch_size]]
            total = total + first_states(model, [pair.teacher for pair in pairs], "layer_output").sum(1)
            steps.add(len(pairs))
        return (total / len(episodes)).float(), {}
