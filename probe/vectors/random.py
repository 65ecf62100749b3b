"""Random vectors of the size of a given one: what putting anything of that size into a model does."""

from __future__ import annotations

import torch

from probe.vectors.vector import InContextVector


def random_like(vector: InContextVector, *, seed: int = 0) -> InContextVector:
    """The same vector with its directions drawn at random (:meth:`probe.vectors.method.Method.random`).

    Parameters
    ----------
    vector
        Of any method.
    seed
        Of the draw.
    """
    parameters = vector.method.random(vector.parameters, torch.Generator().manual_seed(seed))
    card = {**vector.card, "label": f"random like {vector.label}", "random_seed": seed}
    return InContextVector(vector.method, parameters, card)
