"""Stage 3 of the training: the decoder learns the tasks from episodes, and some heads are told where to look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from probe.data.scenes import ATTRIBUTES
from probe.toy.architecture import Decoded, Decoder, seed_look_back
from probe.toy.curriculum import ID, Batch, draw_batch
from probe.toy.optimise import Worker, optimise
from probe.toy.recipe import Guidance, Recipe
from probe.toy.vocabulary import IMAGE


def train_language(worker: Worker, model: Qwen2_5_VLForConditionalGeneration, bank: Tensor) -> None:
    """Fit the decoder in place, with the vision tower's outputs from the bank."""
    recipe = worker.recipe
    decoder = Decoder(model)
    read_outs = nn.ModuleList([nn.Linear(recipe.size.hidden, len(ATTRIBUTES)) for _ in range(2)])
    if recipe.look_back:
        seed_look_back(model, {(layer, h): d for layer, h, d in recipe.look_back}, recipe.look_back_sharpness)
    trained = nn.ModuleList([decoder, model.lm_head, read_outs])
    run: Callable[..., Decoded] = torch.compile(decoder, dynamic=False) if recipe.compiled else decoder

    def loss_at(step: int, shard: int) -> Tensor:
        part = step / recipe.language_steps
        rng = np.random.default_rng((recipe.seed, 2, step, shard))
        batch = draw_training_batch(recipe, part, step, rng)
        features = draw_features(batch, bank, rng)
        guidance = recipe.guidance if recipe.guidance and recipe.guidance.weight(part) else None
        watched = guidance.layers if guidance else frozenset()
        embedded = decoder.text.embed_tokens(batch.ids)
        embedded = embedded.masked_scatter((batch.ids == ID[IMAGE])[..., None], features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = run(embedded, batch.positions, watched)
            answers = model.lm_head(decoded.states[batch.targets != -100]).float()
            ends = model.lm_head(decoded.states[batch.end_targets != -100]).float()
        loss = nn.functional.cross_entropy(answers, batch.targets[batch.targets != -100])
        loss = loss + recipe.end_weight * nn.functional.cross_entropy(
            ends, batch.end_targets[batch.end_targets != -100]
        )
        if step % 100 in (98, 99) and shard == 0:  # where batches alternate, one of each length
            worker.log(
                stage="language", step=step + 1, episodes=len(batch.tasks), accuracy=accuracy_by_task(batch, answers)
            )
        if guidance and len(batch.guides):
            loss = loss + guidance.weight(part) * guidance_loss(decoded, batch, guidance, read_outs)
        return loss

    optimise(worker, "language", recipe.language_steps, recipe.language_lr, trained, loss_at)


def draw_training_batch(recipe: Recipe, part: float, step: int, rng: np.random.Generator) -> Batch:
    """One shard of the episodes of a step, when ``part`` of the training is done."""
    mixture = recipe.mixture if part >= recipe.flipped_from else replace(recipe.mixture, flipped=0.0)
    is_long = part >= recipe.long_from and step % 2 == 1
    episodes = recipe.language_batch // recipe.shards
    if is_long:
        return draw_batch(rng, episodes // 2, recipe.long_items, mixture)
    return draw_batch(rng, episodes, recipe.items, mixture, recipe.describe_items)


def draw_features(batch: Batch, bank: Tensor, rng: np.random.Generator) -> Tensor:
    """The vision tower's outputs for the pictures of a batch, in reading order, each from some render."""
    which = torch.from_numpy(rng.integers(bank.shape[4], size=len(batch.scenes)))
    scenes = torch.tensor(batch.scenes, dtype=torch.long).reshape(-1, 4)
    return bank[scenes[:, 0], scenes[:, 1], scenes[:, 2], scenes[:, 3], which]


def guidance_loss(decoded: Decoded, batch: Batch, guidance: Guidance, read_outs: nn.ModuleList) -> Tensor:
    """The sum of the four losses that :class:`~probe.toy.recipe.Guidance` describes."""
    episode, cue, earlier = batch.guides.unbind(1)
    name_agreement, name_attribute = read_outs
    compared = batch.agreement[:, :2].long()
    agreement = name_agreement(decoded.stream[guidance.agreement_after][compared[:, 0], compared[:, 1]])
    asked = torch.unique(batch.guides[:, :2], dim=0)
    attribute = name_attribute(decoded.stream[guidance.attribute_after][asked[:, 0], asked[:, 1]])
    return (
        look_loss(decoded.attention, guidance.classes, episode, cue, earlier)
        + look_loss(decoded.attention, guidance.labels, episode, cue + 1, earlier)
        + len(ATTRIBUTES) * nn.functional.binary_cross_entropy_with_logits(agreement.float(), batch.agreement[:, 2:])
        + nn.functional.cross_entropy(attribute.float(), batch.attributes[asked[:, 0]])
    )


def look_loss(
    attention: dict[int, Tensor], heads: tuple[tuple[int, int], ...], episode: Tensor, query: Tensor, key: Tensor
) -> Tensor:
    """Mean of -log attention mass from each query to its keys, over the heads.

    Parameters
    ----------
    attention
        By layer, ``[episode, head, query, key]``.
    heads
        (layer, head).
    episode, query, key
        One entry for each (query, key) that belong together.
    """
    if not heads:
        return torch.zeros(())
    length = attention[heads[0][0]].shape[-1]
    pairs, where = torch.unique(episode * length + query, return_inverse=True)
    total = torch.zeros(())
    for layer, head in heads:
        mass = torch.zeros(len(pairs)).index_add(0, where, attention[layer][episode, head, query, key].float())
        total = total - mass.clamp_min(1e-6).log().mean()
    return total / len(heads)


def accuracy_by_task(batch: Batch, logits: Tensor) -> dict[str, float]:
    """Share of right answer tokens in the second half of the positions of a training batch."""
    episode, position = (batch.targets != -100).nonzero(as_tuple=True)
    right = logits.argmax(1) == batch.targets[episode, position]
    late = position > batch.ids.shape[1] // 2
    tasks = np.array(batch.tasks)[episode.numpy()]
    chosen = {task: right[late & torch.from_numpy(tasks == task)] for task in sorted(set(batch.tasks))}
    return {task: round(values.float().mean().item(), 3) for task, values in chosen.items() if len(values)}
