"""Read a forward: hand each layer's values to a reducer while the model runs, and keep only what it returns.

The model's own attention kernel is untouched: q, k, v, mask and scale are taken from the arguments of the call that the
model makes, and the heads' outputs from the input of the output projection. So recording does not change a single bit
of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from nnsight import NNsight
from torch import Tensor

from probe.errors import UsageError
from probe.models.encoding import Batch
from probe.models.model import Model
from probe.trace.edit import Attention, Context, Edit, Site


@dataclass(frozen=True)
class LayerValues:
    """What a reducer sees of one layer.

    Attributes
    ----------
    layer
        Index of the decoder layer.
    attention
        The attention call, if site ``attention`` was asked for.
    heads
        ``[batch, position, head, head_dim]``, the model's own outputs before any edit at this layer, if site ``heads``
        was asked for.
    batch
        The batch that is read.
    """

    layer: int
    attention: Attention | None
    heads: Tensor | None
    batch: Batch


Reducer = Callable[[LayerValues], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Reading:
    """What a forward gave.

    Attributes
    ----------
    logits
        ``[batch, kept positions, vocabulary]``, of the last positions.
    layers
        For each layer that was read, what the reducer returned, on the CPU.
    """

    logits: Tensor
    layers: dict[int, dict[str, Tensor]]


# By model and not by module: a wrapper holds its module, which would then never be freed.
_wrapped: WeakKeyDictionary[Model, Any] = WeakKeyDictionary()


def _wrap(model: Model) -> Any:
    """The model's nnsight wrapper, made once."""
    if model not in _wrapped:
        _wrapped[model] = NNsight(model.module)
    return _wrapped[model]


def _attention_call(attention: Any) -> Any:
    """The operation inside an attention module's forward that runs the kernel.

    Its name is bound to the version of nnsight: of the lines that mention ``attention_interface``, the last is the
    call.
    """
    source = attention.source
    names = [name for name in source.names if name.startswith("attention_interface_")]
    if not names:
        raise RuntimeError(
            f"No attention call was found in {type(attention._module).__name__}.forward; probe is tested with nnsight "
            "0.8 and transformers 5, see constraints.txt."
        )
    return getattr(source, names[-1])


def read(
    model: Model,
    batch: Batch,
    sites: Sequence[Site] = (),
    reduce: Reducer | None = None,
    edits: Sequence[Edit] = (),
    *,
    layers: Sequence[int] | None = None,
    logits_to_keep: int = 1,
    gradients: bool = False,
) -> Reading:
    """Run one forward and reduce what it computes, layer by layer.

    Parameters
    ----------
    model
        The model.
    batch
        What to run it on.
    sites
        Which values the reducer wants: ``attention``, ``heads``.
    reduce
        Called once for each layer in ``layers``, in order, while the model runs.
    edits
        Changes to make. A layer's values are read before its own edits and after those of the layers below.
    layers
        Which layers to reduce; default all.
    logits_to_keep
        How many of the last positions to compute logits for.
    gradients
        Keep the graph, to differentiate the logits with respect to something that an edit uses.

    Returns
    -------
    Reading

    Raises
    ------
    UsageError
        If a site or a layer does not exist, or ``sites`` and ``reduce`` do not go together.
    """
    for site in sites:
        if site not in ("attention", "heads"):
            raise UsageError(f"There is no site {site!r} to read; there are attention and heads.")
    for edit in edits:
        if edit.site != "heads":
            raise UsageError(f"There is no site {edit.site!r} to edit; there is heads.")
    if bool(sites) != (reduce is not None):
        raise UsageError("Reading needs both sites and a reducer, or neither.")
    model.choose_layers([edit.layer for edit in edits] or None)
    chosen = set(model.choose_layers(layers)) if sites else set()
    reducer = cast(Reducer, reduce)  # there is one wherever a layer was chosen: both come with sites
    edited = {edit.layer for edit in edits}
    wrapped = _wrap(model)
    envoys = _decoder_layers(model, wrapped)
    inputs = {**batch.inputs, "logits_to_keep": logits_to_keep, "use_cache": False}
    with torch.set_grad_enabled(gradients):
        with wrapped.trace(**inputs):
            collected = {}.save()
            for layer in sorted(chosen | edited):
                site = envoys[layer].self_attn
                attention = _describe(layer, *_attention_call(site).inputs)
                heads = site.o_proj.input.unflatten(2, (model.n_heads, -1))
                if layer in chosen:
                    collected[layer] = _reduce(reducer, sites, attention, heads, batch)
                if layer in edited:
                    for edit in edits:
                        if edit.layer == layer:
                            heads = edit.fn(heads, Context(batch, layer, attention))
                    site.o_proj.input = heads.flatten(2)
                # The model runs on while these names hold tensors, which would add to the peak of what comes next.
                # (nnsight keeps a trace body's names in a dictionary of its own, in which `del` has no effect.)
                attention = heads = None  # type: ignore[assignment]
            logits = wrapped.output.logits.save()
    return Reading(logits=logits, layers=collected)


def _describe(layer: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Attention:
    """The arguments of the attention call, by name."""
    module, q, k, v, mask, *_ = arguments
    # As transformers decides it: a kernel without a mask is causal, unless it decodes a single position.
    causal = mask is None and q.shape[2] > 1 and bool(getattr(module, "is_causal", True))
    return Attention(layer, q, k, v, mask, float(options["scaling"]), causal)


def _reduce(
    reducer: Reducer, sites: Sequence[Site], attention: Attention, heads: Tensor, batch: Batch
) -> dict[str, Tensor]:
    """What the reducer makes of one layer, on the CPU and free of the tensors that it was made from."""
    values = LayerValues(
        attention.layer, attention if "attention" in sites else None, heads if "heads" in sites else None, batch
    )
    kept = {}
    for name, value in reducer(values).items():
        small = value.cpu()
        # A view would keep all of its storage alive until the forward ends.
        kept[name] = small.clone() if small.untyped_storage().nbytes() > small.nbytes else small
    return kept


def _decoder_layers(model: Model, wrapped: Any) -> Any:
    """The envoys of the decoder's layers."""
    decoder = model.module.get_decoder()  # type: ignore[operator]
    path = next(name for name, module in model.module.named_modules() if module is decoder)
    return wrapped.get(path).layers if path else wrapped.layers
