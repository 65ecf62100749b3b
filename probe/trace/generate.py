"""Let an edited model answer: every step of a generation is traced."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from probe.models.encoding import Batch
from probe.models.model import Model
from probe.trace.edit import Edit
from probe.trace.read import edits_by_place, visit, wrap
from probe.trace.steer import unsteered


def generate(
    model: Model,
    batch: Batch,
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    stop: bool = True,
    edits: Sequence[Edit] = (),
) -> list[str]:
    """Answers, greedy or by beam search, as :meth:`probe.Model.generate` gives them, of an edited model.

    Parameters
    ----------
    model
        The model.
    batch
        Prompts that stop before the answer (``with_answer=False``).
    max_new_tokens
        Where to stop at the latest.
    num_beams
        1 is greedy. Edits see every beam as an episode of its own.
    stop
        Whether an answer may end before ``max_new_tokens``.
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
    model, edits = unsteered(model, edits)
    if not edits:
        return model.generate(batch, max_new_tokens=max_new_tokens, num_beams=num_beams, stop=stop)
    with model.decoding(max_new_tokens, num_beams, stop):
        return model.read_answers(_edited(model, batch, num_beams, edits), batch)


def _edited(model: Model, batch: Batch, num_beams: int, edits: Sequence[Edit]) -> Tensor:
    """Token ids of a generation with edits in every step."""
    edited = edits_by_place(model, batch, edits)
    places = {(site.axis, site.layer): site for site in model.sites}
    wrapped = wrap(model)
    rows = batch.repeated(num_beams) if num_beams > 1 else batch
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
                    visit(model, places[place], rows, own, step=step)
    return found[0]
