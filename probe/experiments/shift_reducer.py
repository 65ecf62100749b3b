"""What is kept of one attention call for a shift map, and how the answer's logits are read off the residual stream.

The effect of a shift on the logit of an answer is *direct*: what it adds to the residual stream is read by the final
norm and the unembedding as it is, with the scale of that norm held at what it is in this forward. It is linear then,
and the same reading of the whole stream gives back the model's own logits, which is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from probe.experiments.attention_dataset import Plan
from probe.experiments.attention_reducer import BatchRows, Keys
from probe.experiments.ov_copying import norm_gain
from probe.measures import mass as measure
from probe.measures.shift import direct_effect, frozen_scale, logit_directions, mean_unembedding, split_attention
from probe.models.encoding import Batch
from probe.models.model import Model
from probe.models.sites import decoder_of
from probe.trace.read import LayerValues, Reading, Reducer


@dataclass(frozen=True)
class Answers:
    """What every flat row of a batch has to say next.

    Attributes
    ----------
    tokens
        ``[batch, flat row]``, the gold answer's.
    directions
        ``[batch, flat row, hidden]``, from :func:`~probe.measures.shift.logit_directions`.
    """

    tokens: Tensor
    directions: Tensor


@dataclass(frozen=True)
class Readout:
    """How logits are read off the residual stream.

    Attributes
    ----------
    norm
        The final norm.
    gain
        ``[hidden]``, its factor on each direction.
    unembedding
        ``[token, hidden]``.
    mean
        ``[hidden]``, its mean row.
    """

    norm: torch.nn.Module
    gain: Tensor
    unembedding: Tensor
    mean: Tensor

    @classmethod
    def of(cls, model: Model) -> Readout:
        """The readout of a model."""
        norm = decoder_of(model.module).norm
        unembedding = cast(Any, model.module).get_output_embeddings().weight
        return cls(norm, norm_gain(norm), unembedding, mean_unembedding(unembedding))

    def of_answers(self, batch: Batch, rows: BatchRows) -> Answers:
        """What a batch's rows have to say, and what reads it."""
        after = (rows.positions + 1).clamp(max=batch.length - 1)  # unused rows stand at the last position
        tokens = batch.inputs["input_ids"].gather(1, after)
        return Answers(tokens, logit_directions(self.unembedding, self.mean, self.gain, tokens))


def make_reducer(model: Model, plan: Plan, rows: BatchRows, keys: Keys, answers: Answers) -> Reducer:
    """What is kept of each layer.

    Parameters
    ----------
    model
        Whose output projections carry the shifts.
    plan
        Which layers are measured, on which segments.
    rows, keys
        The rows to read, and what the keys are.
    answers
        What these rows have to say.

    Returns
    -------
    Reducer
        For sites ``attention``, ``heads`` and ``layer_output``. Gives ``stream`` ``[batch, flat row, hidden]``, what
        leaves the block; and of self-attention in the plan's layers ``mu``, ``difference`` and ``shift``
        ``[batch, row, head]``, ``difference_vector`` ``[batch, row, head, width]``, ``mass``
        ``[batch, row, head, segment]``, ``n_visible`` and ``visible_share`` ``[batch, row, segment]``, ``effect``
        ``[batch, head, flat row]`` (to be multiplied by the final norm's scale), ``residual`` ``[batch]``.
    """
    of_demonstrations = torch.tensor([s.demonstration >= 0 for s in plan.segments], device=keys.segments.device)
    inside, outside = (keys.segments[..., chosen].sum(-1) > 0 for chosen in (of_demonstrations, ~of_demonstrations))

    def reduce(values: LayerValues) -> dict[str, Tensor]:
        at, heads, stream = values.attention, values.heads, values.layer_output
        assert at is not None and heads is not None and stream is not None  # a reducer for all three sites
        index = rows.positions[..., None].expand(-1, -1, stream.shape[-1])
        reduced = {"stream": stream.gather(1, index)}
        if at.axis == "vision" or at.layer not in plan.layers:
            return reduced
        attention = measure.row_attention(at.q, at.k, at.mask, at.scale, at.causal, rows.positions)
        visible = measure.row_visibility(at.mask, at.causal, rows.positions, at.q.shape[2], at.k.shape[2])
        counts = visible.float() @ keys.segments
        split = split_attention(attention, at.v, inside, outside)
        own = rows.pick(heads)
        weight = model.output_weight(at.layer)
        size = measure.contribution(split.shift[..., None, :], measure.output_factors(weight, model.n_heads))[..., 0]
        effect = direct_effect(split.shift, weight, answers.directions)
        if (divisor := model.output_size(at.layer, own)) is not None:
            size, effect = size / divisor[:, None], effect / divisor[:, None]
        mean_mu, mean_shift = (average_known(x, rows) for x in (split.mu, split.shift))
        off = measure.residual(split.rebuilt, own)
        return {
            **reduced,
            "mu": mean_mu,
            "difference": average_known(split.difference.norm(dim=-1), rows),
            "shift": average_known(size, rows),
            # The mean over positions that weighs each by its mu: times mu, it is the mean shift, exactly.
            "difference_vector": mean_shift / mean_mu.where(mean_mu > 0, torch.nan)[..., None],
            "mass": rows.average(measure.segment_mass(attention, keys.segments)),
            "n_visible": rows.average(counts[:, None])[:, :, 0],
            "visible_share": rows.average((counts / counts.sum(-1, keepdim=True))[:, None])[:, :, 0],
            "effect": effect,
            "residual": off.masked_fill(rows.unused[:, None], 0).amax((1, 2)),
        }

    return reduce


def average_known(values: Tensor, rows: BatchRows) -> Tensor:
    """From flat rows to labelled ones, over the positions where there is a value; NaN where there is none.

    ``[batch, head, flat row, …]`` -> ``[batch, row, head, …]``.
    """
    weights = rows.weights.to(values)
    known = ~values.isnan()
    total = torch.einsum("brf,bhf...->brh...", weights, values.where(known, torch.zeros_like(values)))
    share = torch.einsum("brf,bhf...->brh...", weights, known.to(values))
    return total / share.where(share > 0, torch.nan)


def last_stream(model: Model, reading: Reading) -> Tensor:
    """The residual stream that the final norm reads, ``[batch, flat row, hidden]``.

    Where no episode has an image, cross-attention does not run, and the last self-attention is the last block.
    """
    last = model.sites[-1]
    if last.axis == "vision" and last.layer in reading.cross:
        return reading.cross[last.layer]["stream"]
    return reading.layers[model.choose_layers(None)[-1]]["stream"]


def answer_logits(
    logits: Tensor, stream: Tensor, readout: Readout, answers: Answers, rows: BatchRows, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the answer's logits off the model and off the residual stream.

    Parameters
    ----------
    logits
        ``[batch, kept, vocabulary]``, the model's, of the last positions.
    stream
        From :func:`last_stream`.
    readout, answers, rows
        What reads, what is read, and where.
    length
        Positions of the batch.

    Returns
    -------
    tuple of Tensor
        On the CPU: ``[batch, row]``, the logit of the answer's token minus the mean logit, by the model; ``[batch]``,
        how far that read off the stream is from it, relative to the row's largest logit (from the mean too); and
        ``[batch, flat row]``, the scale of the final norm.
    """
    index = (rows.positions - (length - logits.shape[1]))[..., None].expand(-1, -1, logits.shape[-1])
    own = logits.gather(1, index)[..., : len(readout.unembedding)].float()
    own = own - own.mean(-1, keepdim=True)
    said = own.gather(-1, answers.tokens[..., None])[..., 0]
    stream = stream.to(logits.device)
    with torch.no_grad():
        scale = frozen_scale(readout.norm(stream), stream, readout.gain)
    rebuilt = (answers.directions * stream.float()).sum(-1) * scale
    off = (rebuilt - said).abs() / own.abs().amax(-1)
    off = off.masked_fill(rows.unused, 0).amax(-1)
    return average_known(said[:, None], rows)[..., 0].cpu(), off.cpu(), scale.cpu()
