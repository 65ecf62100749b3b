"""Let a model answer."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import GenerationConfig

from probe.models.encoding import Batch
from probe.models.model import Model


def generate(model: Model, batch: Batch, *, max_new_tokens: int) -> list[str]:
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

    Returns
    -------
    list of str
        One answer an episode, without special tokens, stripped.
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
            ids = module.generate(**batch.inputs)
    finally:
        module.generation_config = own
    new = ids[:, batch.length :]
    return [text.strip() for text in model.tokenizer.batch_decode(new, skip_special_tokens=True)]
