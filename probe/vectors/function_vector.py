"""FV: what a few heads write on average where demonstrations are right, added to the state that predicts the answer.

    v = sum over chosen heads of W_O a_h,    h_l' = h_l + v

with ``a_h`` the head's mean output at the position that predicts the answer's first token, over episodes with
demonstrations. Chosen are the heads with the largest causal indirect effect: in other episodes, whose demonstrations
have exchanged their answers, the head writes ``a_h`` at that position; how much that raises the probability of the
answer's first token, on average. v is the same for all layers; where it is added is chosen as for the others
(:mod:`probe.vectors.one_layer`).

What differs from the released code: means and effects come from different episodes; biases of the output projection are
left out (it adds them once a head); a norm behind attention (Gemma 3) is applied as if the heads of a layer wrote their
means together. The paper's ten heads are for GPT-J, which has 448. A model that has fewer than ``heads`` is refused.

References
----------
Todd et al., "Function Vectors in Large Language Models", ICLR 2024, arXiv 2310.15213, equations 2 to 5; numbers as in
its code (commit fb9eac7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.data.perturb import perturb
from probe.errors import UsageError
from probe.models.encoding import Batch
from probe.models.model import Model
from probe.trace.ablate import N_KINDS, mean_heads
from probe.trace.edit import Edit
from probe.trace.read import read
from probe.trace.rows import FIRST
from probe.vectors.method import Constant, Parameters, Steps, refuse_heads
from probe.vectors.one_layer import OneLayer, read_first
from probe.vectors.training import Training
from probe.vectors.vector import Head


@dataclass(frozen=True)
class FunctionVector(OneLayer):
    """FV's options.

    Attributes
    ----------
    heads
        How many are chosen.
    prompts
        In how many episodes with exchanged answers effects are measured, at most half of those learned from.
    """

    heads: int = 10
    prompts: int = 25
    name: ClassVar[str] = "function-vector"

    def __post_init__(self) -> None:
        if self.heads < 1 or self.prompts < 1:
            raise UsageError(f"FV takes one head and one prompt, or more; got {self.heads} and {self.prompts}.")

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """One, in its layer."""
        refuse_heads(self, heads)
        return [Constant("layer_output", self.layer, scale * parameters["v"]).edit()]

    def n_readings(self, model: Model, n_episodes: int) -> int:
        """Once for the means, and for effects once and once for each head."""
        n = self._n_prompts(n_episodes)
        return n_episodes - n + n * (1 + len(model.choose_layers(None)) * model.n_heads)

    def _n_prompts(self, n_episodes: int) -> int:
        return min(self.prompts, n_episodes // 2)

    def find(
        self, model: Model, episodes: Sequence[Episode], training: Training, steps: Steps
    ) -> tuple[Tensor, dict[str, Any]]:
        """Means of some episodes, effects in the others."""
        places = [(layer, head) for layer in model.choose_layers(None) for head in range(model.n_heads)]
        if self.heads > len(places):
            raise UsageError(
                f"{model.name} has {len(places)} heads that attend to text, and FV was to take {self.heads} of them; "
                "give fewer (function-vector:heads=3)."
            )
        n = self._n_prompts(len(episodes))
        if n < 1:
            raise UsageError(
                "FV takes its means and its effects from different episodes, and there is only one to learn from; give "
                "more."
            )
        own, exchanged = episodes[:-n], perturb(episodes[-n:], "permuted-answers", seed=training.seed)
        means = mean_heads_first(model, own, training.batch_size, steps)
        effects = indirect_effects(model, exchanged, means, training.batch_size, steps)
        order = sorted(places, key=effects.__getitem__, reverse=True)[: self.heads]
        v = torch.stack([written(model, layer, means[layer])[head] for layer, head in order]).sum(0)
        chosen = [[layer, head, round(effects[layer, head], 4)] for layer, head in order]
        about = {"heads": chosen, "mean_episodes": len(own), "effect_episodes": n}
        return v.float().cpu().expand(model.n_layers, -1), about


def mean_heads_first(
    model: Model, episodes: Sequence[Episode], batch_size: int, steps: Steps | None = None
) -> dict[int, Tensor]:
    """What heads write on average at the position that predicts the answer's first token.

    Returns
    -------
    dict
        By layer with attention to the text, ``[head, head_dim]``, float64 on the CPU.
    """
    total: dict[int, Tensor] = {}
    for start in range(0, len(episodes), batch_size):
        encodings = [model.encode(episode) for episode in episodes[start : start + batch_size]]
        reading = read_first(model, encodings, "heads")
        for layer, values in reading.layers.items():
            total[layer] = total.get(layer, torch.zeros(())) + values["value"].sum(0)
        if steps:
            steps.add(len(encodings))
    return {layer: value / len(episodes) for layer, value in total.items()}


def indirect_effects(
    model: Model,
    episodes: Sequence[Episode],
    means: dict[int, Tensor],
    batch_size: int,
    steps: Steps | None = None,
) -> dict[Head, float]:
    """How much more probable the answer's first token is when a head writes its mean at the position before it.

    Parameters
    ----------
    model
        The model.
    episodes
        Whose demonstrations exchanged their answers.
    means
        By layer, ``[head, head_dim]``.
    batch_size
        Episodes in one forward.
    steps
        To count.

    Returns
    -------
    dict
        By layer and head, the mean over episodes, a difference of probabilities.
    """
    total: dict[Head, float] = {(layer, head): 0.0 for layer, own in means.items() for head in range(len(own))}
    for start in range(0, len(episodes), batch_size):
        encodings = [model.encode(episode) for episode in episodes[start : start + batch_size]]
        batch = model.batch(encodings, with_answer=False)
        wanted = torch.tensor([int(encoding.ids[encoding.n_prompt]) for encoding in encodings])
        before = _probability(model, batch, wanted, [])
        if steps:
            steps.add(len(encodings))
        for layer, head in total:
            mean = means[layer][head].float().expand(N_KINDS, -1)
            after = _probability(model, batch, wanted, mean_heads({(layer, head): mean}, FIRST))
            total[layer, head] += float((after - before).sum())
            if steps:
                steps.add(len(encodings))
    return {place: value / len(episodes) for place, value in total.items()}


def _probability(model: Model, batch: Batch, wanted: Tensor, edits: Sequence[Edit]) -> Tensor:
    """Of a token behind each prompt, ``[batch]``."""
    last = read(model, batch, edits=edits).logits[:, -1].double().softmax(-1).cpu()
    return last.gather(-1, wanted[:, None])[:, 0]


def written(model: Model, layer: int, heads: Tensor) -> Tensor:
    """What heads write into the residual stream, ``[head, hidden]``, from ``[head, head_dim]``; without biases."""
    weight = model.output_weight(layer).detach().double().cpu().unflatten(1, (len(heads), -1))
    found = torch.einsum("ohd,hd->ho", weight, heads.double())
    size = model.output_size(layer, heads[None, :, None].to(model.device))
    return found if size is None else found / size.detach().double().cpu()
