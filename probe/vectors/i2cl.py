"""I2CL: what examples leave behind at their last token, added behind attention and MLP with learned coefficients.

    a_l' = beta^a_l a_l + lambda^a_l c^a_l,    m_l' = beta^m_l m_l + lambda^m_l c^m_l

at all positions, with c the mean over examples, each read by itself with its answer, of what attention and the MLP
write at the last token of the answer. Only the 4 coefficients of a layer are learned, by cross-entropy on the same
examples. The examples are here the queries of the training episodes; their demonstrations are not read.

What differs from the released code: no noise is added in training (there 0.001 of a state's norm), cross-entropy is
that of the whole answer and its end, not of a label's first token, and how long and in which batches it trains is said
by :class:`~probe.vectors.training.Training` (there 100 epochs in batches of 2, and nothing validates).

References
----------
Li et al., "Implicit In-context Learning", ICLR 2025, arXiv 2405.14660; start and step size as in its code (commit
c2c6dd9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.models.model import Model
from probe.trace.edit import Edit
from probe.trace.read import LayerValues, read
from probe.vectors.m2iv import SITES
from probe.vectors.method import Constant, Objective, Parameters, Trained, refuse_heads
from probe.vectors.pairs import alone
from probe.vectors.teacher import flat_places, stack
from probe.vectors.vector import Head


@dataclass(frozen=True)
class I2cl(Trained):
    """I2CL's options.

    Attributes
    ----------
    strength
        Where every lambda starts.
    """

    strength: float = 0.1
    name: ClassVar[str] = "i2cl"
    extracted: ClassVar[tuple[str, ...]] = ("v_attention", "v_mlp")

    @property
    def objective(self) -> Objective:
        """Cross-entropy."""
        return Objective(ce=1.0)

    def extract(self, model: Model, episodes: Sequence[Episode], batch_size: int) -> dict[str, Tensor]:
        """The mean states c, which are not trained."""
        total = {f"v_{branch}": torch.zeros(()) for branch in SITES}
        for start in range(0, len(episodes), batch_size):
            encodings = [model.encode(alone(episode)) for episode in episodes[start : start + batch_size]]
            batch = model.batch(encodings)
            places = flat_places(batch, [torch.tensor([len(encoding) - 1]) for encoding in encodings])

            def reduce(values: LayerValues, places: tuple[Tensor, Tensor] = places) -> Mapping[str, Tensor]:
                return {branch: getattr(values, site)[places].double().sum(0) for branch, site in SITES.items()}

            reading = read(model, batch, tuple(SITES.values()), reduce)
            for branch in SITES:
                total[f"v_{branch}"] = total[f"v_{branch}"] + stack(model, reading, branch)
        return {name: (value / len(episodes)).float() for name, value in total.items()}

    def start(self, model: Model, generator: torch.Generator) -> dict[str, Tensor]:
        """The published start: a little of c, and all of what is there."""
        names = [f"{what}_{branch}" for branch in SITES for what in ("lambda", "beta")]
        return {
            name: torch.full((model.n_layers,), self.strength if name.startswith("lambda") else 1.0) for name in names
        }

    def step_size(self, name: str) -> float:
        """As published."""
        return 1e-2

    def constants(self, parameters: Parameters, *, scale: float = 1.0) -> list[Constant]:
        """Two a layer; a scale goes part of the way."""
        found = []
        for layer in range(len(parameters["v_mlp"])):
            for branch, site in SITES.items():
                shift = scale * parameters[f"lambda_{branch}"][layer] * parameters[f"v_{branch}"][layer]
                found.append(Constant(site, layer, shift, 1 + scale * (parameters[f"beta_{branch}"][layer] - 1)))
        return found

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """Two a layer."""
        refuse_heads(self, heads)
        return [constant.edit() for constant in self.constants(parameters, scale=scale)]
