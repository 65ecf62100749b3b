"""What every head does in episodes, where the answer is predicted: whom it looks at and which labels it speaks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from probe.data.example import Episode
from probe.data.images import open_images
from probe.errors import UsageError
from probe.experiments.answering import facts, units, within_memory
from probe.experiments.ov_copying import norm_gain
from probe.experiments.repeats import plain_tokens
from probe.measures.head_roles import label_logits, label_matching, learning, recognition
from probe.measures.mass import row_attention, row_visibility
from probe.measures.sinks import find_sinks
from probe.models.encoding import Batch, Encoding
from probe.models.model import Model
from probe.models.sites import decoder_of
from probe.models.token_map import ROLES
from probe.scoring import answer_key, exact_match
from probe.trace.read import LayerValues, read

SCORES = ("label_matching", "task_recognition", "task_recognition_null", "task_learning", "visual", "visual_null")


def head_scores(
    model: Model,
    episodes: Sequence[Episode],
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Score all heads at the row that predicts the answer.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        Demonstrations and queries.
    seed
        Of the random labels of the null.
    batch_size
        Episodes in one forward.
    progress
        Called with the number of episodes done after every batch.

    Returns
    -------
    xarray.Dataset
        Over (episode, layer, head): ``label_matching``, ``task_recognition`` and ``task_learning`` as in
        :mod:`probe.measures.head_roles`, the labels being the demonstrations' answers and the right one;
        ``task_recognition_null``, the same for as many random tokens; ``visual``, the share of images' tokens in the
        mass that is on no sink; ``visual_null``, their share of these keys. NaN where a score is undefined: label
        matching without a right or without a wrong answer in context, learning with one label or with labels that
        begin with the same token, visual where the row can see no image.

    Raises
    ------
    UsageError
        If there are no episodes.
    """
    if not episodes:
        raise UsageError("There are no episodes to read.")
    gain = norm_gain(decoder_of(model.module).norm)
    unembedding = cast(Any, model.module).get_output_embeddings().weight.detach()
    ordinary = np.array(plain_tokens(model))
    layers = model.choose_layers(None)
    parts: list[Tensor] = []
    n = 0
    for unit in units(model, episodes, batch_size):
        encodings = [model.encode(episode, open_images(episode)) for episode in unit]
        batch = model.batch(encodings)
        ids = [_label_tokens(episode, encoding) for episode, encoding in zip(unit, encodings, strict=True)]
        drawn = [_random_tokens(ordinary, of, (seed, number)) for number, of in enumerate(ids, start=n)]
        labels, null = ([gain * unembedding[of].float() for of in tokens] for tokens in (ids, drawn))
        reduce = _reducer(model, batch, unit, labels, null)
        with within_memory(model, len(unit)):
            reading = read(model, batch, ("residual", "attention", "heads"), reduce, layers=layers)
        parts.append(torch.stack([reading.layers[layer]["scores"] for layer in layers], 1))
        n += len(unit)
        if progress:
            progress(n)
    values = torch.cat(parts).numpy()
    return xr.Dataset(
        {name: (("episode", "layer", "head"), values[..., at]) for at, name in enumerate(SCORES)},
        coords={
            "episode": [episode.id for episode in episodes],
            "shots": ("episode", [episode.shots for episode in episodes]),
            "layer": layers,
            "head": range(model.n_heads),
        },
        attrs={**facts(model), "seed": seed},
    )


def _label_tokens(episode: Episode, encoding: Encoding) -> list[int]:
    """First tokens of the answer and of every other answer in context; the right one comes first.

    Two answers that begin alike give the same token twice.
    """
    token_map = encoding.token_map
    first = {answer_key(episode.query.answer): int(encoding.ids[token_map.answer[0]])}
    for place, example in enumerate(episode.demonstrations):
        positions = token_map.where("answer", place)
        if len(positions):
            first.setdefault(answer_key(example.answer), int(encoding.ids[positions[0]]))
    return list(first.values())


def _random_tokens(ordinary: NDArray[np.int64], labels: Sequence[int], seed: tuple[int, int]) -> list[int]:
    """As many ordinary tokens that are none of the labels."""
    others = np.setdiff1d(ordinary, labels)
    drawn: list[int] = np.random.default_rng(seed).choice(others, min(len(set(labels)), len(others)), False).tolist()
    return drawn


def _reducer(
    model: Model, batch: Batch, episodes: Sequence[Episode], labels: Sequence[Tensor], null: Sequence[Tensor]
) -> Callable[[LayerValues], Mapping[str, Tensor]]:
    """Scores of one layer, ``[batch, head, score]``."""
    shape, device = (len(batch), batch.length), batch.inputs["input_ids"].device
    answers, right, images, there = (torch.zeros(shape, dtype=torch.bool) for _ in range(4))
    rows = torch.zeros(len(batch), 1, dtype=torch.int64)
    for b, (episode, encoding, pad) in enumerate(zip(episodes, batch.encodings, batch.pads, strict=True)):
        token_map = encoding.token_map
        answers[b, pad:] = torch.from_numpy((token_map.role == ROLES.index("answer")) & (token_map.demonstration >= 0))
        for place, example in enumerate(episode.demonstrations):
            if exact_match(example.answer, episode.query.answers):
                right[b, pad + torch.from_numpy(token_map.where("answer", place))] = True
        images[b, pad:] = torch.from_numpy(token_map.role == ROLES.index("image"))
        there[b, pad:] = True
        rows[b] = pad + encoding.n_prompt - 1
    answers, right, images, there, rows = (t.to(device) for t in (answers, right, images, there, rows))
    opening = torch.zeros(shape, dtype=torch.bool, device=device)
    opening[range(len(batch)), list(batch.pads)] = True

    def reduce(values: LayerValues) -> dict[str, Tensor]:
        at, heads, residual = values.attention, values.heads, values.residual
        assert at is not None and heads is not None and residual is not None  # all three were asked for
        attention = row_attention(at.q, at.k, at.mask, at.scale, at.causal, rows)[:, :, 0]
        width = at.k.shape[2]
        seen = row_visibility(at.mask, at.causal, rows, at.q.shape[2], width)[:, 0]
        content = seen & ~opening & ~find_sinks(residual, there).positions
        on_images = content & images
        visual, all_content = (torch.einsum("bhk,bk->bh", attention, keys.float()) for keys in (on_images, content))
        missing = torch.full_like(visual, float("nan"))
        expected = (on_images.sum(-1) / content.sum(-1))[:, None].expand_as(visual)
        has_images = on_images.any(-1)[:, None]
        written = _written(model, values.layer, heads, rows)
        by_label = torch.stack([_by_label(z, w, of) for z, w, of in zip(*written, labels, strict=True)])
        random = torch.stack([_by_label(z, w, of)[:, 0] for z, w, of in zip(*written, null, strict=True)])
        columns = [
            label_matching(attention, answers & seen, right & seen),
            by_label[..., 0],
            random,
            by_label[..., 1],
            torch.where(has_images, visual / all_content, missing),
            torch.where(has_images, expected, missing),
        ]
        return {"scores": torch.stack(columns, -1)}

    return reduce


def _written(model: Model, layer: int, heads: Tensor, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """By episode, the heads' outputs at its row, ``[head, width]``, and their projections ``[head, hidden, width]``."""
    own = heads.gather(1, rows[:, :, None, None].expand(-1, -1, *heads.shape[2:])).transpose(1, 2)
    weight = model.output_weight(layer).detach().float().unflatten(1, (model.n_heads, -1)).transpose(0, 1)
    size = model.output_size(layer, own)
    outputs = own[:, :, 0].float()
    if size is not None:
        outputs = outputs / size[:, 0, None, None]
    return list(outputs), [weight] * len(outputs)


def _by_label(outputs: Tensor, projection: Tensor, labels: Tensor) -> Tensor:
    """Recognition and learning of every head, ``[head, 2]``; the first label is the right one."""
    logits = label_logits(outputs, projection, labels)
    told_apart = len(labels) > 1 and len(labels.unique(dim=0)) == len(labels)
    learned = learning(logits, labels, 0) if told_apart else torch.full_like(logits[:, 0], float("nan"))
    return torch.stack([recognition(logits, labels), learned], -1)
