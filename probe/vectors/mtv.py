"""MTV: some heads write what they write on average with demonstrations, whatever they read.

    o_h' = a_h for the chosen heads

at every position that predicts a token of the answer, with ``a_h`` the head's mean output at the position that predicts
the answer's first token, over episodes with demonstrations. Which heads is found by REINFORCE: every head has its own
probability of being chosen; in each step several choices are drawn for one query without demonstrations, and those
under which the answer's first token is more probable become likelier. Of some choices drawn at the end, the one that
makes the gold answers of validation episodes most probable is kept. ``scale`` goes part of the way from o_h to a_h.

What differs from the released code: the choice at the end is validated on episodes that REINFORCE did not see.

References
----------
Huang et al., "Multimodal Task Vectors Enable Many-Shot Multimodal In-Context Learning", NeurIPS 2024, arXiv 2406.15334;
numbers as in its code (commit b2698c4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from probe.data.example import Episode
from probe.errors import ProbeError, UsageError
from probe.models.model import Model
from probe.trace.edit import Context, Edit
from probe.trace.read import read
from probe.trace.rows import FIRST
from probe.vectors.function_vector import mean_heads_first
from probe.vectors.method import Parameters, Steps, head_factors, widen
from probe.vectors.pairs import alone
from probe.vectors.searched import Searched
from probe.vectors.training import Training
from probe.vectors.vector import Head, InContextVector, at_rows

FIRST_LOGIT, STEP_SIZE, FLOOR = -1.0, 0.1, 1e-3
"""Of the probabilities of heads, and what is added to the spread of rewards, as released."""


@dataclass(frozen=True)
class Mtv(Searched):
    """MTV's options.

    Attributes
    ----------
    steps
        Of REINFORCE; each reads one query.
    samples
        Choices of heads drawn in each.
    choices
        Drawn at the end, among which validation chooses.
    """

    steps: int = 600
    samples: int = 32
    choices: int = 10
    name: ClassVar[str] = "mtv"
    rows: ClassVar[str] = "answer"
    choice: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.samples < 2 or self.choices < 1:
            raise UsageError("MTV takes 0 steps, 2 samples in each and 1 choice at the end, or more.")

    @property
    def n_candidates(self) -> int:
        """The choices of heads."""
        return self.choices

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """One a layer in which a head was chosen."""
        v, chosen = parameters["v"], parameters["chosen"]
        factors = head_factors(heads, v.shape[0], v.shape[1], scale)
        if idle := [place for place in heads or () if not chosen[place]]:
            raise UsageError(
                f"MTV does not replace {', '.join(f'{a}.{b}' for a, b in idle)}; it does "
                f"{', '.join(f'{a}.{b}' for a, b in self.acting_heads(parameters))}."
            )
        return [
            _replace(layer, v[layer], f * chosen[layer]) for layer, f in factors.items() if bool(chosen[layer].any())
        ]

    def acting_heads(self, parameters: Parameters) -> list[Head]:
        """Those that were chosen."""
        return [(layer, head) for layer, head in parameters["chosen"].nonzero().tolist()]

    def n_readings(self, model: Model, n_episodes: int) -> int:
        """For the means, and for the choices of each step."""
        return n_episodes + self.steps * self.samples

    def candidates(
        self, model: Model, episodes: Sequence[Episode], training: Training, steps: Steps
    ) -> tuple[list[InContextVector], dict[str, Any]]:
        """Means of heads, and some choices of which of them to use."""
        means = mean_heads_first(model, episodes, training.batch_size, steps)
        v = torch.zeros(model.n_layers, model.n_heads, model.head_dim)
        for layer, mean in means.items():
            v[layer] = mean.float()
        generator = torch.Generator().manual_seed(training.seed)
        logits = self._reinforce(model, episodes, v, list(means), generator, steps)
        drawn = [mask for mask in (_draw(logits, generator) for _ in range(self.choices)) if mask.any()]
        if not drawn:
            raise ProbeError(
                "REINFORCE chose no head at all: answers are most probable as the model gives them by itself. Try "
                "other episodes, or another method."
            )
        found = [InContextVector(self, {"v": v, "chosen": _on_layers(mask, list(means), v)}) for mask in drawn]
        probabilities = [[round(x, 3) for x in row] for row in logits.sigmoid().tolist()]
        return found, {"layers": list(means), "probabilities": probabilities}

    def _reinforce(
        self,
        model: Model,
        episodes: Sequence[Episode],
        v: Tensor,
        layers: Sequence[int],
        generator: torch.Generator,
        steps: Steps,
    ) -> Tensor:
        """Logits of the probabilities of heads, ``[layer with attention to the text, head]``."""
        logits = torch.full((len(layers), model.n_heads), FIRST_LOGIT, requires_grad=True)
        optimiser = torch.optim.Adam([logits], lr=STEP_SIZE)
        for _ in range(self.steps):
            episode = episodes[int(torch.randint(len(episodes), (1,), generator=generator))]
            masks = torch.stack([_draw(logits, generator) for _ in range(self.samples)])
            reward = _log_probability(model, episode, v, masks, layers)
            reward = (reward - reward.mean()) / (reward.std() + FLOOR)
            likely = -F.binary_cross_entropy_with_logits(logits.expand_as(masks), masks, reduction="none").sum((1, 2))
            loss = -(likely * reward).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps.add(self.samples)
        return logits.detach()


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A choice of heads, ``[layer, head]`` of 0 and 1."""
    return torch.bernoulli(logits.detach().sigmoid(), generator=generator)


def _on_layers(mask: Tensor, layers: Sequence[int], v: Tensor) -> Tensor:
    """A choice among the heads of all layers of the model."""
    found = torch.zeros(v.shape[:2])
    found[layers] = mask
    return found


def _log_probability(model: Model, episode: Episode, v: Tensor, masks: Tensor, layers: Sequence[int]) -> Tensor:
    """Of the answer's first token, without demonstrations, under each choice of heads, ``[choice]``."""
    encoding = model.encode(alone(episode))
    batch = model.batch([encoding] * len(masks), with_answer=False)
    edits = [at_rows(_replace(layer, v[layer], masks[:, at]), FIRST) for at, layer in enumerate(layers)]
    last = read(model, batch, edits=edits).logits[:, -1].double().log_softmax(-1)
    return last[:, int(encoding.ids[encoding.n_prompt])].float().cpu()


def _replace(layer: int, v: Tensor, weight: Tensor) -> Edit:
    """Heads write v, ``[head, head_dim]``, as far as ``weight`` says: ``[head]``, or ``[batch, head]``."""

    def fn(value: Tensor, _: Context) -> Tensor:
        own = widen(value)
        share = weight.to(own).view(-1, 1, own.shape[2], 1).expand_as(own)
        return torch.lerp(own, v.to(own).expand_as(own), share).to(value.dtype)

    return Edit("heads", layer, fn)
