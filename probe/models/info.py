"""What is known of a model from its files alone: no weight is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from probe.errors import ProbeError
from probe.models.load import (
    choose_template,
    load_config,
    load_tokenizer,
    module_class,
    read_chat_template,
    reason_of,
)
from probe.models.names import locate
from probe.models.sites import find_sites


def describe(name: str | Path) -> dict[str, object]:
    """How a model is built.

    Parameters
    ----------
    name
        As in :func:`probe.load`; weights are not fetched.

    Returns
    -------
    dict
        Facts by name, for a table.
    """
    located = locate(name, weights=False)
    family, directory = located.family, located.directory
    try:
        config = load_config(directory, family)
        with torch.device("meta"):
            module = module_class(family)(config)
        own = read_chat_template(directory, load_tokenizer(directory))
    except ProbeError:
        raise
    except Exception as error:  # whatever foreign files make transformers raise
        raise ProbeError(f"The files in {directory} cannot be read: {reason_of(error)}") from error
    text = config.get_text_config()
    sites = find_sites(module)
    cross = [site.layer for site in sites if site.axis == "vision"]
    facts: dict[str, object] = {
        "name": located.name,
        "family": family.name,
        "special": family.special,
        "directory": str(directory),
    }
    if located.origin:
        facts["origin"] = located.origin
    n_heads = text.num_attention_heads
    kinds = getattr(text, "layer_types", None)
    if kinds is None:  # then all layers have it, or none
        kinds = ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"] * len(sites)
    windows = sum(kind == "sliding_attention" for kind in kinds)
    return {
        **facts,
        "parameters": f"{sum(parameter.numel() for parameter in module.parameters()):,}",
        "layers": len({site.layer for site in sites}),
        "heads": f"{n_heads} a layer, {getattr(text, 'num_key_value_heads', None) or n_heads} for keys and values",
        "cross_attention": f"layers {', '.join(map(str, cross))}" if cross else "none",
        "sliding_windows": f"{windows} layers, {text.sliding_window} keys" if windows else "none",
        "prompt": choose_template(own, family, None, str(directory))[1]
        if own or family.prompt
        else "none: give --prompt",
    }
