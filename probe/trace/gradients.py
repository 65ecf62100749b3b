"""What has to hold before a forward is differentiated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from probe.errors import UsageError
from probe.models.model import Model


def check_gradients(model: Model) -> None:
    """Refuse a model whose gradients would be missing or wrong.

    Raises
    ------
    UsageError
        If gradient checkpointing is on, or weights are too coarse for small gradients.
    """
    if any(getattr(part, "gradient_checkpointing", False) for part in model.module.modules()):
        raise UsageError(
            f"{model.name} has gradient checkpointing on, which runs layers twice and loses the gradient of their "
            "attention; call module.gradient_checkpointing_disable() first."
        )
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise UsageError(
            f"The weights of {model.name} are {str(model.dtype).removeprefix('torch.')}, in which small gradients "
            "become zero; use float32 or bfloat16 (--dtype)."
        )


@contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """Without gradients of the parameters; else the graph would hold everything below the layer too."""
    asked = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
