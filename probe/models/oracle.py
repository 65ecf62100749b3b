"""A second way to see a model's attention, which shares nothing with the first: for certification and tests.

:mod:`probe.trace` reads the arguments of the attention call through nnsight. Here the call itself is replaced, through
the registry of attention functions that transformers offers, by one that shows its arguments to an observer and then
runs the very kernel that the model would have run. The masks have to be registered too: without that transformers
would hand over none, and say nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    modules: dict[torch.nn.Module, AttentionSite] = {
        model.module.get_submodule(site.attention): site for site in model.sites
    }

    def run(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if module in modules:
            observer(modules[module], q, k, v, mask, float(options["scaling"]))
        # An eager kernel is each family's own function, which the registry does not hold.
        function = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, _eager_of(module))
        return function(module, q, k, v, mask, **options)

    AttentionInterface.register(NAME, run)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config in configs.values():
            config._attn_implementation_internal = kernel


def _eager_of(module: torch.nn.Module) -> Any:
    """The eager kernel beside the class of an attention module."""
    return sys.modules[type(module).__module__].eager_attention_forward


def naive_attention(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, *, causal: bool, softmax_dtype: torch.dtype = torch.float64
) -> Tensor:
    """The whole attention matrix, written down as in the textbook: ``[batch, head, query, key]``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.to(softmax_dtype) @ k.to(softmax_dtype).transpose(2, 3)) * scale
    if mask is None and causal:
        n, m = scores.shape[-2:]
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1)
