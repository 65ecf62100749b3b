"""Saliency of attention: which flows of information the probability of the right answer depends on, layer by layer.

The measure is that of :mod:`probe.measures.saliency`, with the loss ``L = -log p(gold answer)``, summed over the
answer's tokens. Rows and keys are those of the prompt, up to q, its last position; padding counts nowhere.

Each layer has a forward of its own, in which its attention is computed again from the model's q, k and mask, as a leaf
of the graph, and put back. The parameters are frozen, so the graph begins at this leaf: there is never more than one
layer's matrix of weights, and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probe.data.example import Episode
from probe.data.images import open_images
from probe.data.manifest import content_key
from probe.errors import ProbeError, UsageError
from probe.experiments.answering import check_words, facts, within_memory
from probe.measures.mass import RESIDUAL_BOUND, residual, row_attention, row_visibility
from probe.measures.saliency import DEMONSTRATION_FLOWS, FLOWS, Groups, flows, saliency_matrix
from probe.models.encoding import Batch, Encoding
from probe.models.model import Model
from probe.segments import QUERY
from probe.store import Keep, key
from probe.trace.edit import Context, Edit
from probe.trace.gradients import check_gradients, frozen
from probe.trace.likelihood import total_log_probability
from probe.trace.read import read


def saliency(
    model: Model,
    episodes: Sequence[Episode],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 4,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Measure which flows of attention the right answer depends on (Wang et al., EMNLP 2023), split by modality.

    Parameters
    ----------
    model
        From :func:`probe.load`; in float32 or bfloat16.
    episodes
        Demonstrations and queries; numbers of shots may differ.
    layers
        Which layers; default all that have self-attention.
    batch_size
        Episodes in one forward. Memory grows with this, times heads, times the square of the length.
    keep
        Keeps finished batches, such as the ``part`` of a run directory.
    progress
        Called with the number of episodes done after every batch.

    Returns
    -------
    xarray.Dataset
        Over (episode, layer, flow), the flows of :mod:`probe.measures.saliency`: ``saliency``, the mean over legal
        pairs, in nats; and ``n_pairs``, their number. A flow without a legal pair is NaN. The same of each
        demonstration by itself over (episode, layer, demonstration_flow, demonstration): ``demonstration_saliency``,
        ``demonstration_n_pairs``. Over episode: ``loss`` (nats) and ``n_answer_tokens``. Over (episode, layer):
        ``residual``, how far the heads' outputs that were put back are from the model's own.

    Raises
    ------
    UsageError
        If there are no episodes, ids repeat, a layer does not exist or has no self-attention, too many words are
        unknown to the tokenizer, or gradients cannot pass the model.
    ProbeError
        If an image cannot be read, memory runs out, or the model's attention cannot be rebuilt.
    """
    if not episodes:
        raise UsageError("There are no episodes to read.")
    if batch_size < 1:
        raise UsageError(f"A batch holds at least one episode; asked for {batch_size}.")
    if len({episode.id for episode in episodes}) != len(episodes):
        raise UsageError("Two episodes have the same id; results could not be told apart.")
    chosen = model.choose_layers(layers)
    if not chosen:
        raise UsageError(
            f"The layers {', '.join(map(str, layers or ()))} of {model.name} have cross-attention alone; name at least "
            f"one with self-attention ({', '.join(map(str, model.choose_layers(None)))})."
        )
    check_gradients(model)
    unknown, words = check_words(model, episodes)
    most = max(episode.shots for episode in episodes)
    done: list[xr.Dataset] = []
    for start in range(0, len(episodes), batch_size):
        unit = episodes[start : start + batch_size]

        def compute(unit: Sequence[Episode] = unit) -> xr.Dataset:
            with within_memory(model, len(unit)):
                return _measure(model, unit, chosen, most)

        # By content: a part of other episodes, or read otherwise, is never taken for this one.
        part = f"{start:06d}-{key({'layers': chosen, 'demonstrations': most})[:8]}-{content_key(unit)}"
        done.append(keep(part, compute) if keep else compute())
        if progress:
            progress(start + len(unit))
    result = xr.concat(done, "episode", data_vars="all", coords="different", compat="equals", join="exact")
    result["saliency"].attrs["units"] = result["demonstration_saliency"].attrs["units"] = "nats per pair"
    result.attrs = {
        "experiment": "saliency",
        **facts(model),
        "answers": "gold",
        "loss": "-log p(gold answer), summed over its tokens",
        "residual_bound": RESIDUAL_BOUND[model.dtype],
        "n_attempted": len(episodes),
        "n_done": len(episodes),
        "n_failed": 0,
        "unknown_word_share": unknown / max(words, 1),
    }
    if not model.reads_images_in_text:
        result.attrs["image_flows"] = (
            "undefined: in this family no image is a token of the text, and only attention to the text was read"
        )
    return result


@dataclass(frozen=True)
class LayerSaliency:
    """Of one layer and a batch.

    Attributes
    ----------
    matrix
        ``[batch, n, n]``, row by key, with the padding.
    visible
        ``[batch, n, n]``, which keys a row can see.
    loss
        ``[batch]``, in nats.
    residual
        ``[batch]``, the largest over heads and the rows of the episode.
    """

    matrix: Tensor
    visible: Tensor
    loss: Tensor
    residual: Tensor


def layer_saliency(model: Model, batch: Batch, layer: int) -> LayerSaliency:
    """Run one forward with a layer's attention as a leaf, and differentiate the loss with respect to it.

    The batch holds the answers, so that the loss is known. Parameters get no gradient.
    """
    found: dict[str, Tensor] = {}

    def put_back(value: Tensor, context: Context) -> Tensor:
        at = context.attention
        with torch.no_grad():
            rows = torch.arange(at.q.shape[2], device=at.q.device).expand(len(batch), -1)
            found["visible"] = row_visibility(at.mask, at.causal, rows, at.q.shape[2], at.k.shape[2])
            weights = row_attention(at.q, at.k, at.mask, at.scale, at.causal, rows)
            # Rows of padding may see nothing; a softmax over nothing is NaN, and that would spread.
            weights.masked_fill_(~found["visible"].any(-1)[:, None, :, None], 0)
        found["attention"] = weights.requires_grad_()
        v = at.v.detach().repeat_interleave(at.q.shape[1] // at.v.shape[1], dim=1)
        outputs = weights @ v.to(weights.dtype)
        with torch.no_grad():
            off = residual(outputs, value.transpose(1, 2)).amax(1)
            for row, pad in zip(off, batch.pads, strict=True):
                row[:pad] = 0
            found["residual"] = off.amax(-1)
        return outputs.transpose(1, 2).to(value.dtype)

    with frozen(model.module):
        longest = max(len(encoding) - encoding.n_prompt for encoding in batch.encodings)
        reading = read(model, batch, edits=[Edit("heads", layer, put_back)], logits_to_keep=1 + longest, gradients=True)
        loss = torch.stack([-total_log_probability(*of) for of in zip(reading.logits, batch.encodings, strict=True)])
        (gradient,) = torch.autograd.grad(loss.sum(), found["attention"])
    matrix = saliency_matrix(found["attention"].detach(), gradient)
    return LayerSaliency(matrix, found["visible"], loss.detach(), found["residual"])


def groups_of(encoding: Encoding, device: torch.device) -> Groups:
    """Which positions of an episode's prompt are what; those after q are left out."""
    n, at = encoding.n_prompt, encoding.token_map

    def mark(role: str, owner: int) -> Tensor:
        marked = torch.zeros(n, dtype=torch.bool)
        places = torch.from_numpy(at.where(role, owner))
        marked[places[places < n - 1]] = True
        return marked.to(device)

    def each(role: str) -> Tensor:
        return torch.stack([mark(role, i) for i in range(at.shots)] or [mark(role, QUERY)])[: at.shots]

    q = torch.arange(n, device=device) == n - 1
    return Groups(q, each("image"), each("question"), each("answer"), mark("image", QUERY), mark("question", QUERY))


def _measure(model: Model, episodes: Sequence[Episode], layers: Sequence[int], most: int) -> xr.Dataset:
    """Read one batch of episodes; ``most`` is the number of demonstrations that the result has places for."""
    encodings = [model.encode(episode, open_images(episode)) for episode in episodes]
    batch = model.batch(encodings)
    groups = [groups_of(encoding, model.device) for encoding in encodings]
    over, own_over = (len(episodes), len(layers), len(FLOWS)), (len(DEMONSTRATION_FLOWS), most)
    mean, n_pairs = np.full(over, np.nan), np.zeros(over, np.int64)
    own_mean, own_n_pairs = np.full((*over[:2], *own_over), np.nan), np.zeros((*over[:2], *own_over), np.int64)
    loss, off = np.zeros(len(episodes)), np.zeros(over[:2])
    for i, layer in enumerate(layers):
        found = layer_saliency(model, batch, layer)
        off[:, i] = found.residual.cpu().numpy()
        if i == 0:  # the same in every layer, but for rounding
            loss = found.loss.cpu().numpy()
        for b, (encoding, pad) in enumerate(zip(encodings, batch.pads, strict=True)):
            prompt = slice(pad, pad + encoding.n_prompt)
            each = flows(found.matrix[b, prompt, prompt], found.visible[b, prompt, prompt], groups[b])
            shots = encoding.token_map.shots
            mean[b, i], n_pairs[b, i] = each.mean.cpu().numpy(), each.n_pairs.cpu().numpy()
            own_mean[b, i, :, :shots] = each.demonstration_mean.cpu().numpy()
            own_n_pairs[b, i, :, :shots] = each.demonstration_n_pairs.cpu().numpy()
            _check(model, episodes[b], layer, off[b, i], float(each.total.sum()))
        del found  # before the next layer's matrices are made
    flow, own = ("episode", "layer", "flow"), ("episode", "layer", "demonstration_flow", "demonstration")
    return xr.Dataset(
        {
            "saliency": (flow, mean),
            "n_pairs": (flow, n_pairs),
            "demonstration_saliency": (own, own_mean),
            "demonstration_n_pairs": (own, own_n_pairs),
            "loss": ("episode", loss),
            "n_answer_tokens": ("episode", [len(encoding) - encoding.n_prompt for encoding in encodings]),
            "residual": (("episode", "layer"), off),
        },
        coords={
            "episode": [episode.id for episode in episodes],
            "query": ("episode", [episode.query.id for episode in episodes]),
            "shots": ("episode", [episode.shots for episode in episodes]),
            "layer": list(layers),
            "flow": list(FLOWS),
            "demonstration_flow": list(DEMONSTRATION_FLOWS),
            "demonstration": range(most),
        },
    )


def _check(model: Model, episode: Episode, layer: int, off: float, total: float) -> None:
    """Rule: what was put back must be what the model computed; and gradients must be numbers."""
    where = f"Episode {episode.id}, layer {layer}"
    if not np.isfinite(total) or not np.isfinite(off):
        raise ProbeError(f"{where}: attention or its gradient is not finite in {model.dtype}. Use float32 (--dtype).")
    if off > RESIDUAL_BOUND[model.dtype]:
        raise ProbeError(
            f"{where}: the heads' outputs that were computed from q, k, v and the mask are off by {off:.2g} of their "
            f"size, more than {RESIDUAL_BOUND[model.dtype]:g} for {model.dtype}. The gradient would be that of another "
            "attention; please report the model and the versions in use."
        )
