"""A second way to see a model's attention, which shares no code with the first: for certification and tests.

:mod:`probe.trace` notes the arguments of the attention call where the model looks up its kernel. Here the call itself
is replaced, through the registry of attention functions that transformers offers, by one that shows its arguments to an
observer and then runs the very kernel that the model would have run. The masks have to be registered too: without that
transformers would hand over none, and say nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probe.models.model import Model
from probe.models.sites import AttentionSite

NAME = "probe_oracle"

Observer = Callable[[AttentionSite, Tensor, Tensor, Tensor, Tensor | None, float], None]
"""Called with (site, q, k, v, mask, scale) at every attention call of the text stack."""


@contextmanager
def observed(model: Model, observer: Observer) -> Iterator[None]:
    """Show every attention call of the text stack to ``observer`` while the model runs."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kernel = model.attention_implementation
    watched: dict[torch.nn.Module, Callable[..., None]] = {
        model.module.get_submodule(site.attention): partial(observer, site) for site in model.sites
    }

    def run(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if module in watched:
            watched[module](q, k, v, mask, float(options["scaling"]))
        # An eager kernel is each family's own function, which the registry does not hold.
        function = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, _eager_of(module))
        return function(module, q, k, v, mask, **options)

    AttentionInterface.register(NAME, run)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    configs: dict[int, Any] = {id(module.config): module.config for module in watched}
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config in configs.values():
            config._attn_implementation_internal = kernel
        watched.clear()  # the registry keeps the function, which must not keep the model


def _eager_of(module: torch.nn.Module) -> Any:
    """The eager kernel beside the class of an attention module."""
    return sys.modules[type(module).__module__].eager_attention_forward


def naive_attention(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, rows: Tensor, *, causal: bool) -> Tensor:
    """Rows of the attention matrix, written down as in the textbook, one episode after the other.

    Parameters
    ----------
    q, k, mask, scale
        As the kernel gets them.
    rows
        Query positions, ``[batch, row]``.
    causal
        Whether a kernel without a mask hides later keys.

    Returns
    -------
    Tensor
        ``[batch, head, row, key]``, in float64 (float32 where a device has no more).
    """
    exact = torch.float32 if q.device.type == "mps" else torch.float64
    n, m = q.shape[2], k.shape[2]
    found = []
    for episode, at in enumerate(rows):
        keys = k[episode].to(exact).repeat_interleave(q.shape[1] // k.shape[1], dim=0)
        scores = (q[episode][:, at].to(exact) @ keys.transpose(1, 2)) * scale
        if mask is not None:
            part = mask[min(episode, len(mask) - 1)][:, at]
            visible = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
            scores = scores.masked_fill(~visible, float("-inf"))
        elif causal:
            later = torch.arange(m, device=q.device) > (at + m - n)[:, None]
            scores = scores.masked_fill(later, float("-inf"))
        found.append(scores.softmax(-1))
    return torch.stack(found)
