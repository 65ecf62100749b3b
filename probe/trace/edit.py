"""The one way to change a forward: what a site's value is replaced by.

An edit names a site and a layer, and gives a function from the value to its replacement. Knockouts, oracles, vectors
and fused tokens are lists of edits.

Sites
-----
``heads``
    The heads' outputs just before the output projection, ``[batch, position, head, head_dim]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from probe.models.encoding import Batch
from probe.models.sites import Axis

Site = Literal["residual", "attention", "heads"]


@dataclass(frozen=True)
class Attention:
    """What one attention call computes with.

    Attributes
    ----------
    layer
        Index of the decoder layer.
    axis
        Where its keys stand: ``text``, or ``vision`` in cross-attention to images.
    q
        ``[batch, head, query, head_dim]``, after rotary embedding.
    k, v
        ``[batch, kv_head, key, head_dim]``, not repeated over the group's heads.
    mask
        ``[batch or 1, head or 1, query, key]``, boolean (True is visible) or additive; ``None`` if there is none.
    scale
        Factor on q·k.
    causal
        Whether the kernel hides later keys by itself (only without a mask).
    """

    layer: int
    axis: Axis
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    causal: bool


@dataclass(frozen=True)
class Context:
    """What an edit may look at.

    Attributes
    ----------
    batch
        The batch with its token maps; positions in it are shifted by ``batch.pads``.
    layer
        Index of the decoder layer.
    attention
        The layer's attention call.
    step
        Decoding step; 0 is the prompt.
    """

    batch: Batch
    layer: int
    attention: Attention
    step: int = 0


@dataclass(frozen=True)
class Edit:
    """Replace the value of ``site`` in ``layer`` by ``fn(value, context)``, which has the same shape.

    ``axis`` chooses between the layer's attention to the text and, where there is one, its cross-attention to images.
    """

    site: Literal["heads"]
    layer: int
    fn: Callable[[Tensor, Context], Tensor]
    axis: Axis = "text"
