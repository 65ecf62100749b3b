"""Merging: a vector that adds the same to everything becomes part of the weights, and costs nothing any more.

    o_h + v_h before W_O:    b += W_O v        a + v behind attention, m + v behind the MLP:    b += v
    beta m + v:              W *= beta, b = beta b + v

A projection without a bias gets one. The model that results shares all other weights with the given one, runs without a
trace, and is no longer the architecture of its configuration: it cannot be saved as a checkpoint. In types coarser than
float32 the bias, and a weight times beta, are rounded to the type of the weights, which an injected vector is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from probe.errors import UsageError
from probe.models.model import Model
from probe.models.sites import AttentionSite
from probe.models.weights import twin
from probe.store import key
from probe.trace.steer import check_plain
from probe.vectors.method import Constant
from probe.vectors.vector import InContextVector


def merge(model: Model, vector: InContextVector, *, scale: float = 1.0, layers: Sequence[int] | None = None) -> Model:
    """Write a vector into weights.

    Parameters
    ----------
    model
        Stays as it is.
    vector
        Of a method that adds the same at all positions: M²IV, I2CL, MimIC with ``size="constant"``.
    scale
        Factor on what it adds.
    layers
        Where; default all that it acts in.

    Returns
    -------
    Model
        Which answers as ``probe.inject(model, vector)`` does.

    Raises
    ------
    UsageError
        If what the method adds depends on what is read, or the vector was made for another model.
    """
    check_plain(model)
    vector.check(model)
    vector.check_layers(layers)
    constants = vector.method.constants(vector.parameters, scale=scale)
    module = twin(model.module)
    for constant in constants:
        if layers is None or constant.layer in layers:
            _merge(module, _site(model, constant), constant)
    made = {"model": model.fingerprint, "merged": vector.identity, "scale": scale, "layers": layers and sorted(layers)}
    name = f"{model.name} + {vector.label}{'' if scale == 1 else f' x {scale:g}'}, merged"
    return replace(model, name=name, module=module, fingerprint=key(made))


def _site(model: Model, constant: Constant) -> AttentionSite:
    """The attention that a constant belongs to: to the text, or for whole layers to images where there is no other."""
    own = {site.axis: site for site in model.sites if site.layer == constant.layer}
    if "text" not in own and constant.site == "heads":
        raise UsageError(f"Layer {constant.layer} of {model.name} has no attention to the text.")
    return own.get("text") or own["vision"]


def _merge(module: torch.nn.Module, site: AttentionSite, constant: Constant) -> None:
    """Put one constant into the projection in front of it."""
    owner: Any = module.get_submodule(site.block if constant.site == "mlp_output" else site.attention)
    owner, name = (owner.mlp, "down_proj") if constant.site == "mlp_output" else (owner, "o_proj")
    old = getattr(owner, name, None)
    if type(old) is not torch.nn.Linear:  # one with packed or adapted weights would be copied as if it were plain
        raise UsageError(
            f"Layer {constant.layer} has no plain projection {name} whose bias could be changed; inject the vector."
        )
    weight, shift = old.weight.detach(), constant.shift.detach().to(old.weight.device, torch.float64)
    if constant.site == "heads":
        shift = weight.double() @ shift.flatten()
    factor = 1.0 if constant.factor is None else float(constant.factor)
    bias = shift if old.bias is None else factor * old.bias.detach().double() + shift
    new = torch.nn.Linear(1, 1, device="meta")
    new.in_features, new.out_features = old.in_features, old.out_features
    new.weight = old.weight if factor == 1 else torch.nn.Parameter(factor * weight, requires_grad=False)
    new.bias = torch.nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    setattr(owner, name, new)
