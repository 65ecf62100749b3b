"""Weights of a module: as they act, and shared with a copy that is to have some of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch


def acting_weight(projection: Any) -> torch.Tensor:
    """What a linear module multiplies by: its weight, and what adapters of PEFT that are on add to it."""
    weight: torch.Tensor = projection.weight
    if getattr(projection, "merged", False) or getattr(projection, "disable_adapters", False):
        return weight  # they are in it, or off
    for adapter in getattr(projection, "active_adapters", ()):
        weight = weight + projection.get_delta_weight(adapter).to(weight)
    return weight


def twin(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of the structure that shares all weights."""
    shared = {id(value): value for value in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)
