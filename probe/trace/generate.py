"""Let a model answer, as it is or edited."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from probe.models.encoding import Batch
from probe.models.model import Model
from probe.trace.edit import Context, Edit
from probe.trace.read import attention_call, describe, edits_by_place, wrap


def generate(model: Model, batch: Batch, *, max_new_tokens: int, edits: Sequence[Edit] = ()) -> list[str]:
    """Greedy answers.

    The checkpoint's own sampling settings (temperature, repetition penalty) are switched off: they belong to chatting,
    and a repetition penalty would punish a model for answering as a demonstration does.

    Parameters
    ----------
    model
        The model.
    batch
        Prompts that stop before the answer (``with_answer=False``).
    max_new_tokens
        Where to stop at the latest.
    edits
        Changes to make in the prompt and at every new position; ``step`` of their context says which it is.

    Returns
    -------
    list of str
        One answer an episode, without special tokens, stripped.

    Raises
    ------
    UsageError
        If a layer does not exist.
    """
    module = cast(Any, model.module)
    own = module.generation_config
    # Transformers fills what a call leaves open from the checkpoint's settings: they are set aside, not overridden.
    module.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else model.tokenizer.eos_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    try:
        with torch.no_grad():
            ids = _edited(model, batch, edits) if edits else module.generate(**batch.inputs)
    finally:
        module.generation_config = own
    new = ids[:, batch.length :]
    return [text.strip() for text in model.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _edited(model: Model, batch: Batch, edits: Sequence[Edit]) -> Tensor:
    """Token ids of a generation with edits in every step."""
    edited = edits_by_place(model, batch, edits)
    places = {(site.axis, site.layer): site for site in model.sites}
    wrapped = wrap(model)
    found: list[Tensor] = []

    def run(**inputs: Any) -> Tensor:
        found.append(cast(Any, model.module).generate(**inputs))
        return found[-1]

    with warnings.catch_warnings():
        # The loop asks for one step more than an answer has, and ends there.
        warnings.filterwarnings("ignore", message="(?s).*was never reached: the loop asked for a step")
        with wrapped.trace(fn=run, **batch.inputs) as tracer:
            for step in tracer.iter[:]:
                for place, own in edited.items():
                    site = wrapped.get(places[place].attention)
                    attention = describe(places[place], *attention_call(site).inputs)
                    heads = site.o_proj.input.unflatten(2, (model.n_heads, -1))
                    for edit in own:
                        heads = edit.fn(heads, Context(batch, edit.layer, attention, step))
                    site.o_proj.input = heads.flatten(2)
    return found[0]
