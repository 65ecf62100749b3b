"""The attention modules of a text stack, found by walking its decoder in the order in which they run.

Most decoders have one self-attention a layer. Text that reads images through cross-attention has other modules too:
blocks in the same list (Llama 3.2 Vision), or in a list of their own, each of which runs before every n-th layer
(Idefics v1). A site says on which axis its keys stand: ``text`` (the positions of the prompt) or ``vision`` (the tokens
that the vision tower made of the episode's images).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

Axis = Literal["text", "vision"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention module.

    Attributes
    ----------
    axis
        Where its keys stand.
    layer
        Index of the decoder layer that it belongs to, or that it runs before.
    block, attention
        Dotted names of the block that owns it, and of the module itself.
    """

    axis: Axis
    layer: int
    block: str
    attention: str


def decoder_of(module: torch.nn.Module) -> Any:
    """The text stack: the module that owns the decoder's layers."""
    decoder: Any = module.get_decoder()  # type: ignore[operator]
    for name in ("model", "language_model"):
        if not hasattr(decoder, "layers") and hasattr(decoder, name):
            decoder = getattr(decoder, name)
    return decoder


def find_sites(module: torch.nn.Module) -> tuple[AttentionSite, ...]:
    """All attention modules of the text stack, in the order in which they run."""
    decoder = decoder_of(module)
    names = {id(part): name for name, part in module.named_modules()}
    gated = list(getattr(decoder, "gated_cross_attn_layers", ()))
    found = []

    def add(axis: Axis, layer: int, block: Any, attention: str) -> None:
        found.append(AttentionSite(axis, layer, names[id(block)], names[id(getattr(block, attention))]))

    for layer, block in enumerate(decoder.layers):
        if gated and layer % decoder.cross_layer_interval == 0:
            add("vision", layer, gated[layer // decoder.cross_layer_interval], "cross_attn")
        if hasattr(block, "self_attn"):
            add("text", layer, block, "self_attn")
        else:
            add("vision", layer, block, "cross_attn")
    return tuple(found)
