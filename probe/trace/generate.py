"""Let a model answer."""

from __future__ import annotations

from typing import Any, cast

import torch

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
    with torch.no_grad():
        ids = cast(Any, model.module).generate(
            **batch.inputs,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            max_new_tokens=max_new_tokens,
            pad_token_id=model.tokenizer.pad_token_id,
        )
    new = ids[:, batch.length :]
    return [text.strip() for text in model.tokenizer.batch_decode(new, skip_special_tokens=True)]
