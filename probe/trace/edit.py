"""The one way to change a forward: what a site's value is replaced by.

An edit names a site and a layer, and gives a function from the value to its replacement. Knockouts, oracles, vectors
and fused tokens are lists of edits.

====================  ==================================================================================================
site                  value
====================  ==================================================================================================
``residual``          the residual stream that enters a block, ``[batch, position, hidden]``; read only
``attention``         what the attention call computes with (:class:`Attention`); read only
``heads``             the heads' outputs just before the output projection, ``[batch, position, head, head_dim]``
``attention_output``  what the output projection makes of them, ``[batch, position, hidden]``
``mlp_output``        what the MLP makes, ``[batch, position, hidden]``; like the former before any norm behind it and
                      before it is added to the residual stream
``layer_output``      the residual stream that leaves the block, ``[batch, position, hidden]``
====================  ==================================================================================================

``attention`` and ``heads`` are read before the layer's own edits, so that one can be computed from the other; the three
outputs after them, as the rest of the model reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from probe.errors import UsageError
from probe.models.encoding import Batch
from probe.models.sites import Axis

Output = Literal["attention_output", "mlp_output", "layer_output"]
"""What a module of a block gives, in the order in which they run."""

Edited = Literal["heads"] | Output
Site = Literal["residual", "attention"] | Edited


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
    call
        The layer's attention call, at site ``heads``.
    step
        Decoding step; 0 is the prompt.
    """

    batch: Batch
    layer: int
    call: Attention | None = None
    step: int = 0

    @property
    def attention(self) -> Attention:
        """The layer's attention call.

        Raises
        ------
        UsageError
            At other sites than ``heads``.
        """
        if self.call is None:
            raise UsageError("What attention computes with is known to edits at site heads only.")
        return self.call


@dataclass(frozen=True)
class Edit:
    """Replace the value of ``site`` in ``layer`` by ``fn(value, context)``, which has the same shape.

    ``axis`` chooses between the layer's attention to the text and, where there is one, its cross-attention to images.
    The outputs of a decoder layer that has cross-attention alone are found either way.
    """

    site: Edited
    layer: int
    fn: Callable[[Tensor, Context], Tensor]
    axis: Axis = "text"
