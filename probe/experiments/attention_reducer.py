"""What is kept of one attention call while the model runs: which rows are read, and over which keys they are summed.

A reducer sees the values of one layer where they are produced (:mod:`probe.trace.read`) and returns a few small arrays:
mass, contribution, what is visible, which of it lies on attention sinks, and how far the heads' outputs are from what
was recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.experiments.attention_dataset import Plan
from probe.measures import mass as measure
from probe.measures.sinks import find_sinks
from probe.models.encoding import Batch
from probe.models.model import Model
from probe.models.token_map import TokenMap
from probe.trace.read import LayerValues, Reducer


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch, flattened: which positions to read, and how to average them into labelled rows.

    Attributes
    ----------
    positions
        ``[batch, flat row]``, padding counted; unused places read the last position and weigh nothing.
    weights
        ``[batch, row, flat row]``; a row without positions has weights 0.
    """

    positions: Tensor
    weights: Tensor

    @classmethod
    def of(cls, batch: Batch, plan: Plan) -> BatchRows:
        """The rows of a plan."""
        groups = [plan.positions(encoding) for encoding in batch.encodings]
        width = max(sum(len(g) for g in rows) for rows in groups)
        positions = torch.full((len(batch), width), batch.length - 1)
        weights = torch.zeros(len(batch), len(plan.row_labels), width)
        for b, (rows, pad) in enumerate(zip(groups, batch.pads, strict=True)):
            at = 0
            for r, group in enumerate(rows):
                for position in group:
                    positions[b, at] = position + pad
                    weights[b, r, at] = 1 / len(group)
                    at += 1
        device = batch.inputs["input_ids"].device
        return cls(positions.to(device), weights.to(device))

    @property
    def unused(self) -> Tensor:
        """``[batch, flat row]``, where nothing is read."""
        return self.weights.sum(1) == 0

    def average(self, values: Tensor) -> Tensor:
        """``[batch, head, flat row, segment]`` -> ``[batch, row, head, segment]``."""
        return torch.einsum("brf,bhfs->brhs", self.weights, values)

    def pick(self, values: Tensor) -> Tensor:
        """``[batch, position, head, width]`` -> ``[batch, head, flat row, width]``."""
        index = self.positions[:, :, None, None].expand(-1, -1, *values.shape[2:])
        return values.gather(1, index).transpose(1, 2)


@dataclass(frozen=True)
class Keys:
    """What the keys of a batch are, on one axis: one-hot segments ``[batch, key, segment]``, zero on padding."""

    segments: Tensor

    @classmethod
    def of_text(cls, batch: Batch, plan: Plan) -> Keys:
        """The positions of the prompts."""
        return cls._of([e.token_map for e in batch.encodings], batch.pads, batch.length, batch, plan)

    @classmethod
    def of_vision(cls, batch: Batch, plan: Plan) -> Keys | None:
        """The images' tokens, where the text reads them through cross-attention."""
        maps = [e.vision_map for e in batch.encodings if e.vision_map is not None]
        length = max((len(m) for m in maps), default=0)
        return cls._of(maps, [0] * len(maps), length, batch, plan) if length else None

    @classmethod
    def _of(cls, maps: Sequence[TokenMap], pads: Sequence[int], length: int, batch: Batch, plan: Plan) -> Keys:
        index = torch.full((len(maps), length), -1)
        for row, token_map, pad in zip(index, maps, pads, strict=True):
            row[pad : pad + len(token_map)] = torch.from_numpy(token_map.segment_index(plan.segments))
        device = batch.inputs["input_ids"].device
        return cls(measure.one_hot_segments(index, len(plan.segments)).to(device))


def make_reducer(
    model: Model,
    rows: BatchRows,
    keys: Keys,
    vision: Keys | None = None,
    *,
    all_rows: bool = False,
    n_overlay: int = 0,
) -> Reducer:
    """What is kept of each layer.

    Parameters
    ----------
    model
        Whose output projections carry the contributions.
    rows
        The rows to read.
    keys, vision
        What the keys are on the axis of the text, and on that of the images.
    all_rows
        Whether to add the mass of every position.
    n_overlay
        For how many of the batch's episodes to keep the first row's attention on every key.

    Returns
    -------
    Reducer
        For sites ``attention`` and ``heads``. Gives ``mass`` and ``contribution`` ``[batch, row, head, segment]``,
        ``n_visible`` and ``visible_share`` ``[batch, row, segment]``, ``residual`` ``[batch]``; on the axis of the
        text ``first_row`` ``[n_overlay, head, key]`` and ``token_mass`` ``[batch, head, position, segment]``; on that
        of the images ``looks`` ``[batch, row]``, the share of a row's positions that may look at an image. With site
        ``residual`` also what :func:`sinks_of` gives of the axis of the text, of which ``first_sinks`` is cut to
        ``n_overlay`` episodes.
    """

    def reduce(values: LayerValues) -> dict[str, Tensor]:
        at, heads = values.attention, values.heads
        assert at is not None and heads is not None  # a reducer for both sites
        on_axis = keys if at.axis == "text" else vision
        assert on_axis is not None  # cross-attention runs only where there are images
        segments = on_axis.segments
        attention = measure.row_attention(at.q, at.k, at.mask, at.scale, at.causal, rows.positions)
        visible = measure.row_visibility(at.mask, at.causal, rows.positions, at.q.shape[2], at.k.shape[2])
        counts = visible.float() @ segments
        seen = counts.sum(-1)
        if at.axis == "vision":
            # A row that may look at nothing is given something by the kernel (padding, or all keys alike), which the
            # model then drops or, before the first image, does not mean.
            looks = (seen > 0) & (visible.sum(-1) == seen)
            attention = attention.where(looks[:, None, :, None], torch.zeros_like(attention))
            counts, seen = counts * looks[..., None], seen.where(looks, torch.ones_like(seen))
        outputs = measure.segment_outputs(attention, at.v, segments)
        factors = measure.output_factors(model.output_weight(values.layer, at.axis), model.n_heads)
        own = rows.pick(heads)
        written = measure.contribution(outputs, factors)
        if at.axis == "text" and (size := model.output_size(at.layer, own)) is not None:
            written = written / size[:, None, :, None]
        off = measure.residual(outputs.sum(3), own)
        reduced = {
            "mass": rows.average(measure.segment_mass(attention, segments)),
            "contribution": rows.average(written),
            "n_visible": rows.average(counts[:, None])[:, :, 0],
            "visible_share": rows.average((counts / seen[..., None])[:, None])[:, :, 0],
        }
        if at.axis == "vision":
            reduced["looks"] = torch.einsum("brf,bf->br", rows.weights, looks.float())
            off = off.masked_fill(~looks[:, None], 0)
        reduced["residual"] = off.masked_fill(rows.unused[:, None], 0).amax((1, 2))
        if at.axis == "text":
            reduced["first_row"] = attention[:n_overlay, :, 0]
            if values.residual is not None:
                reduced |= sinks_of(values.residual, attention, visible, segments, rows)
                reduced["first_sinks"] = reduced["first_sinks"][:n_overlay]
            if all_rows:
                reduced["token_mass"] = measure.all_rows_mass(at.q, at.k, segments, at.mask, at.scale, at.causal)
        return reduced

    return reduce


def sinks_of(
    residual: Tensor, attention: Tensor, visible: Tensor, segments: Tensor, rows: BatchRows
) -> dict[str, Tensor]:
    """What of each segment lies on the sinks of a layer.

    Parameters
    ----------
    residual
        ``[batch, key, hidden]``, the stream that enters the layer.
    attention, visible
        ``[batch, head, flat row, key]`` and ``[batch, flat row, key]``.
    segments
        As in :class:`Keys`.
    rows
        How flat rows become labelled ones.

    Returns
    -------
    dict of str to Tensor
        ``sink_mass`` ``[batch, row, head, segment]``, ``sink_visible`` and ``sink_share`` ``[batch, row, segment]``, as
        ``mass``, ``n_visible`` and ``visible_share`` but of the sinks alone; ``n_sinks`` ``[batch, segment]``,
        ``sink_dimensions`` and ``sink_size`` ``[batch, 2]``; ``first_sinks`` ``[batch, key]``, which keys are sinks.
    """
    sinks = find_sinks(residual, segments.sum(-1) > 0)
    chosen = segments * sinks.positions[..., None]
    counts = visible.float() @ chosen
    seen = (visible.float() @ segments).sum(-1, keepdim=True)
    return {
        "sink_mass": rows.average(measure.segment_mass(attention, chosen)),
        "sink_visible": rows.average(counts[:, None])[:, :, 0],
        "sink_share": rows.average((counts / seen)[:, None])[:, :, 0],
        "n_sinks": chosen.sum(1).long(),
        "sink_dimensions": sinks.dimensions,
        "sink_size": sinks.sizes,
        "first_sinks": sinks.positions,
    }
