"""Read a forward: hand each layer's values to a reducer while the model runs, and keep only what it returns.

The model's own attention kernel is untouched: q, k, v, mask and scale are the arguments of the call that the model
makes (:func:`noted_calls`), and the heads' outputs the input of the output projection. So recording does not change a
single bit of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, cast, get_args
from weakref import WeakKeyDictionary

import torch
from nnsight import NNsight
from torch import Tensor
from transformers import AttentionInterface

from probe.errors import UsageError, did_you_mean
from probe.models.encoding import Batch
from probe.models.model import Model
from probe.models.sites import AttentionSite, Axis
from probe.trace.edit import Attention, Context, Edit, Edited, Output, Site
from probe.trace.steer import unsteered


@dataclass(frozen=True)
class LayerValues:
    """What a reducer sees of one layer.

    Attributes
    ----------
    layer
        Index of the decoder layer.
    axis
        Where the keys stand: ``text`` or ``vision``.
    batch
        The batch that is read.
    attention
        The attention call.
    heads
        ``[batch, position, head, head_dim]``, the model's own outputs before any edit at this layer.
    residual
        ``[batch, position, hidden]``, the residual stream that enters the block of this attention.
    attention_output, mlp_output, layer_output
        ``[batch, position, hidden]`` each, after the edits there.

    Of these, what was asked for; the rest is ``None``.
    """

    layer: int
    axis: Axis
    batch: Batch
    attention: Attention | None = None
    heads: Tensor | None = None
    residual: Tensor | None = None
    attention_output: Tensor | None = None
    mlp_output: Tensor | None = None
    layer_output: Tensor | None = None


Reducer = Callable[[LayerValues], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Reading:
    """What a forward gave.

    Attributes
    ----------
    logits
        ``[batch, kept positions, vocabulary]``, of the last positions.
    layers
        For each layer that was read, what the reducer returned: on the CPU, or where it was if gradients are kept.
    cross
        The same for cross-attention to images, in families that have it, by the layer that it belongs to.
    """

    logits: Tensor
    layers: dict[int, dict[str, Tensor]]
    cross: dict[int, dict[str, Tensor]]


_OUTPUTS: tuple[Output, ...] = get_args(Output)
_EDITED: tuple[Edited, ...] = ("heads", *_OUTPUTS)
_SITES: tuple[Site, ...] = ("residual", "attention", *_EDITED)

Call = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]
"""An attention module, and what else it called its kernel with."""

# Which modules are watched, and what was noted of each: several threads may trace at once.
_watched: list[tuple[torch.nn.Module, list[Call]]] = []
_watching = Lock()
_get_interface: Any = AttentionInterface.get_interface

# By model and not by module: a wrapper holds its module, which would then never be freed.
_wrapped: WeakKeyDictionary[Model, Any] = WeakKeyDictionary()


def wrap(model: Model) -> Any:
    """The model's nnsight wrapper, made once."""
    found = _wrapped.get(model)
    if found is None:
        found = _wrapped[model] = NNsight(model.module)
    return found


@contextmanager
def noted_calls(attention: torch.nn.Module) -> Iterator[list[Call]]:
    """Note what an attention module calls its kernel with.

    Every family asks transformers for its kernel at each call. In the meantime it gets the same kernel behind a
    function that notes the arguments. (nnsight gives them too, as ``source``; but then every operation of the module
    passes through it, in this forward and, traced or not, in all later ones.)
    """
    own: tuple[torch.nn.Module, list[Call]] = (attention, [])
    registry: Any = AttentionInterface
    with _watching:
        if not _watched:
            registry.get_interface = _noting
        _watched.append(own)
    try:
        yield own[1]
    finally:
        with _watching:
            _watched[:] = [other for other in _watched if other is not own]
            if not _watched:
                registry.get_interface = _get_interface


def _noting(*asked: Any, **named: Any) -> Callable[..., Any]:
    """In place of transformers' ``get_interface``: the same kernel, noted where a module is watched."""
    kernel = _get_interface(*asked, **named)

    def run(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        for watched, noted in list(_watched):
            if module is watched:
                noted.append((module, arguments, options))
        return kernel(module, *arguments, **options)

    return run


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
        Which values the reducer wants, of those in :mod:`probe.trace.edit`.
    reduce
        Called once for each attention of the layers in ``layers``, in the order in which they run, while the model
        runs.
    edits
        Changes to make.
    layers
        Which layers to reduce; default all.
    logits_to_keep
        How many of the last positions to compute logits for.
    gradients
        Keep the graph, to differentiate logits and reduced values with respect to something that an edit uses.

    Returns
    -------
    Reading

    Raises
    ------
    UsageError
        If a site or a layer does not exist, or ``sites`` and ``reduce`` do not go together.
    """
    model, edits = unsteered(model, edits)
    for site in sites:
        if site not in _SITES:
            raise UsageError(f"There is no site {site!r} to read; {did_you_mean(site, _SITES)}")
    if bool(sites) != (reduce is not None):
        raise UsageError("Reading needs both sites and a reducer, or neither.")
    places = {(site.axis, site.layer): site for site in model.sites}
    axes = axes_of(batch)
    chosen = {(axis, layer) for axis in axes for layer in model.choose_layers(layers, axis)} if sites else set()
    reducer = cast(Reducer, reduce)  # there is one wherever a layer was chosen: both come with sites
    edited = edits_by_place(model, batch, edits)
    wrapped = wrap(model)
    inputs = {**model.inputs(batch), "logits_to_keep": logits_to_keep, "use_cache": False}
    with torch.set_grad_enabled(gradients):
        with wrapped.trace(**inputs):
            collected = {}.save()
            for place in [place for place in places if place in chosen | edited.keys()]:
                wanted = sites if place in chosen else ()
                values = visit(model, places[place], batch, edited.get(place, ()), wanted)
                if place in chosen:
                    collected[place] = _reduce(reducer, values, detach=not gradients)
                # The model runs on while this name holds tensors, which would add to the peak of what comes next.
                # (nnsight keeps a trace body's names in a dictionary of its own, in which `del` has no effect.)
                values = None  # type: ignore[assignment]
            logits = wrapped.output.logits.save()
    text, vision = ({at: kept for (a, at), kept in collected.items() if a == axis} for axis in ("text", "vision"))
    return Reading(logits=logits, layers=text, cross=vision)


def axes_of(batch: Batch) -> tuple[Axis, ...]:
    """On which axes attention runs: on text alone some families skip cross-attention."""
    return ("text", "vision") if any(encoding.images for encoding in batch.encodings) else ("text",)


def edits_by_place(model: Model, batch: Batch, edits: Sequence[Edit]) -> dict[tuple[Axis, int], list[Edit]]:
    """Edits by axis and layer, in the order in which the attention modules run.

    Raises
    ------
    UsageError
        If a site, a layer or its attention on an axis does not exist.
    """
    places = [(site.axis, site.layer) for site in model.sites]
    model.choose_layers([edit.layer for edit in edits] or None)
    found: dict[tuple[Axis, int], list[Edit]] = {place: [] for place in places}
    for edit in edits:
        if edit.site not in _EDITED:
            raise UsageError(f"There is no site {edit.site!r} to edit; {did_you_mean(edit.site, _EDITED)}")
        place = (edit.axis, edit.layer)
        if place not in places and edit.site != "heads":
            place = ("vision", edit.layer)  # a decoder layer with cross-attention alone
        if place not in places:
            raise UsageError(f"Layer {edit.layer} of {model.name} has no attention to the {edit.axis}.")
        found[place].append(edit)
    axes = axes_of(batch)
    return {place: own for place, own in found.items() if own and place[0] in axes}


def visit(
    model: Model,
    site: AttentionSite,
    batch: Batch,
    edits: Sequence[Edit],
    wanted: Sequence[Site] = (),
    step: int = 0,
) -> LayerValues:
    """Follow a running block from its input to its output: read what is wanted, edit what is to be edited.

    To be called inside a trace. Nothing else is touched: every value that is taken out costs time.
    """
    wrapped = wrap(model)
    block, attention = wrapped.get(site.block), wrapped.get(site.attention)
    own: dict[str, list[Edit]] = {}
    for edit in edits:
        own.setdefault(edit.site, []).append(edit)
    found: dict[str, Any] = {}
    if "residual" in wanted:
        found["residual"] = block.input
    if "attention" in wanted or "heads" in wanted or "heads" in own:
        call, heads = follow(site, attention)
        found["attention"] = call if "attention" in wanted else None
        found["heads"] = heads if "heads" in wanted else None
        for edit in own.get("heads", ()):
            heads = edit.fn(heads, Context(batch, edit.layer, call, step))
        if "heads" in own:
            attention.o_proj.inputs = (heads.flatten(2),), {}  # as `input`, nnsight would read it once more
    for name in _OUTPUTS:
        if name in wanted or name in own:
            module = attention.o_proj if name == "attention_output" else block.mlp if name == "mlp_output" else block
            output = module.output
            value = output[0] if isinstance(output, tuple) else output
            for edit in own.get(name, ()):
                value = edit.fn(value, Context(batch, edit.layer, None, step))
            if name in own:
                module.output = (value, *output[1:]) if isinstance(output, tuple) else value
            found[name] = value if name in wanted else None
    return LayerValues(site.layer, site.axis, batch, **found)


def follow(site: AttentionSite, attention: Any) -> tuple[Attention, Tensor]:
    """A running module's call of its kernel, and its heads' outputs, ``[batch, position, head, head_dim]``."""
    with noted_calls(attention._module) as noted:
        (merged,), _ = attention.o_proj.inputs
    if not noted:
        raise RuntimeError(
            f"No attention call was seen in {type(attention._module).__name__}.forward; probe is tested with "
            "transformers 5, see constraints.txt."
        )
    call = describe(site, *noted[-1])
    return call, merged.unflatten(2, (call.q.shape[1], -1))


def describe(site: AttentionSite, module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Attention:
    """The arguments of the attention call, by name."""
    q, k, v, mask, *_ = arguments
    # As transformers decides it: a kernel without a mask is causal, unless it decodes a single position.
    causal = mask is None and q.shape[2] > 1 and bool(getattr(module, "is_causal", True))
    return Attention(site.layer, site.axis, q, k, v, mask, float(options["scaling"]), causal)


def _reduce(reducer: Reducer, values: LayerValues, *, detach: bool) -> dict[str, Tensor]:
    """What the reducer makes of one layer, on the CPU and free of the tensors that it was made from."""
    kept = {}
    for name, value in reducer(values).items():
        small = value.cpu() if detach else value
        # A view would keep all of its storage alive until the forward ends.
        shared = detach and small.untyped_storage().nbytes() > small.nbytes
        kept[name] = small.clone() if shared else small
    return kept
