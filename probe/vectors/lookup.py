"""What an oracle knows of an episode: the split of every attention, and where the query stood in its context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.errors import ProbeError, UsageError
from probe.measures.mass import row_visibility
from probe.models.model import Model
from probe.models.sites import Axis
from probe.trace.ablate import attend
from probe.trace.edit import Context
from probe.trace.read import LayerValues, read
from probe.vectors.method import widen
from probe.vectors.pairs import Pair
from probe.vectors.shifts import Shifts, split_layer

Place = tuple[Axis, int]
"""One attention: the axis of its keys, and its layer."""

GATES = ("image_attention_mask", "cross_attention_mask")
"""Inputs that say which images each position sees, and so where cross-attention is open."""


@dataclass(frozen=True)
class Lookup:
    """What was read of one episode.

    Attributes
    ----------
    ids
        ``[n]``, what its student reads.
    half
        0 or 1.
    positions
        ``[n]`` or ``[3, n]``, where the student's tokens stand in the teacher's context.
    looking
        ``[n]``, which of them look at some image through cross-attention; ``None`` in families without.
    shifts
        Of each attention.
    """

    ids: Tensor
    half: int
    positions: Tensor
    looking: Tensor | None
    shifts: Mapping[Place, Shifts]


def read_lookups(model: Model, pairs: Sequence[Pair], by_modality: bool) -> list[Lookup]:
    """Read one batch of teachers.

    Raises
    ------
    UsageError
        If a query shows no image in a family that would have to put a demonstration's back through cross-attention.
    """
    for pair in pairs:
        if not model.reads_images_in_text and pair.teacher.images and not pair.student.images:
            raise UsageError(
                f"Episode {pair.student.episode}: its query shows no image and its demonstrations do. {model.name} "
                "looks at them through cross-attention, which does not run without an image: an oracle has nowhere to "
                "put it back. Give the query an image, or take a model that reads images as tokens."
            )
    batch = model.batch([pair.teacher for pair in pairs])
    lengths = [len(pair.kept) for pair in pairs]
    found: list[dict[Place, Shifts]] = [{} for _ in pairs]

    def reduce(values: LayerValues) -> dict[str, Tensor]:
        shifts = split_layer(values, pairs, by_modality)
        names = {name: value.cpu() for name, value in vars(shifts).items()}
        for own, b, n in zip(found, range(len(pairs)), lengths, strict=True):
            own[values.axis, values.layer] = Shifts(**names).of(b, n)
        return {}

    read(model, batch, ("attention", "heads"), reduce)
    positions = model.positions(batch).cpu()
    gate = next((batch.inputs[name] for name in GATES if name in batch.inputs), None)
    lookups = []
    for b, (pair, pad) in enumerate(zip(pairs, batch.pads, strict=True)):
        kept = torch.from_numpy(pair.kept) + pad
        looking = None if gate is None else gate[b].cpu()[kept].flatten(1).any(1)
        lookups.append(Lookup(pair.student.ids, 0, positions[..., b, :][..., kept], looking, found[b]))
    return lookups


def output_alone(value: Tensor, context: Context, own: Sequence[Shifts]) -> Tensor:
    """SA_Q of a batch of students: the heads' own outputs, computed again for rows that saw less in the teacher.

    Parameters
    ----------
    value
        ``[batch, position, head, head_dim]``.
    context
        Of the student's attention to the text.
    own
        What was read of each episode.

    Raises
    ------
    ProbeError
        If the keys that a row saw in the teacher are not the last of those that it sees in the student.
    """
    at, n = context.attention, value.shape[1]
    rows = torch.arange(n, device=value.device).expand(len(value), -1)
    visible = row_visibility(at.mask, at.causal, rows, n, at.k.shape[2])
    left, wanted = visible.clone(), visible.sum(-1)
    for b, (shifts, pad) in enumerate(zip(own, context.batch.pads, strict=True)):
        first, seen = (x[: n - pad].to(value.device) for x in (shifts.first, shifts.seen))
        left[b, pad:] &= rows[b] >= first[:, None] + pad
        wanted[b, pad:] = seen
    if not torch.equal(left.sum(-1), wanted):
        raise ProbeError(
            f"Layer {context.layer}: rows of the query see other keys without demonstrations than with them, and "
            "not as with a sliding window; an oracle cannot be exact here. Please report it, with the model's name."
        )
    lost = (left != visible).any(-1)
    if not bool(lost.any()):
        return widen(value)
    again = attend(at, rows, torch.where(lost[..., None], left, True))  # a softmax over nothing is undefined
    return widen(torch.where(lost[..., None, None], again.transpose(1, 2), value))
