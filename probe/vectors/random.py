"""Random vectors of the size of a given one: what putting anything of that size into a model does."""

from __future__ import annotations

import torch
from torch import Tensor

from probe.vectors.vector import InContextVector


def random_like(vector: InContextVector, *, seed: int = 0) -> InContextVector:
    """The same vector with its directions drawn at random.

    Every vector of it (a layer's, or a head's) keeps its norm, and all else that the method has stays: alphas, and what
    MimIC sizes its shifts with.

    Parameters
    ----------
    vector
        Of any method.
    seed
        Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator)
        drawn: Tensor = noise / noise.norm(dim=-1, keepdim=True) * value.norm(dim=-1, keepdim=True)
        return drawn

    parameters = {
        name: draw(value) if name.split("_")[0] == "v" else value for name, value in sorted(vector.parameters.items())
    }
    card = {**vector.card, "label": f"random like {vector.label}", "random_seed": seed}
    return InContextVector(vector.method, parameters, card)
