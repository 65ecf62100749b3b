"""Stages 1 and 2 of the training: the vision tower learns to see, then its outputs are stored in a bank."""

from __future__ import annotations

import time
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from probe.data.scenes import HEIGHT, VALUES, WIDTH, Scene, every_scene, held_out, render
from probe.toy.architecture import GRID, IMAGE_TOKENS, MERGE, PATCH, ImageEncoder
from probe.toy.optimise import Worker, optimise

SEEN = [scene for scene in every_scene() if not held_out(scene)]


def to_patches(pictures: Tensor) -> Tensor:
    """``[n, 56, 84, 3]`` uint8 -> ``[n, patches, 3*2*14*14]``, as the image processor lays them out."""
    n = len(pictures)
    x = (pictures.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    rows, columns = GRID[1] // MERGE, GRID[2] // MERGE
    x = x.view(n, 3, rows, MERGE, PATCH, columns, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(n, GRID[1] * GRID[2], -1)


def _labels(scenes: list[Scene]) -> Tensor:
    return torch.tensor([[getattr(scene, name) for name in VALUES] for scene in scenes])


def draw_pictures(worker: Worker, first_seed: int, renders: list[int], degraded: float) -> Tensor:
    """Training pictures of every seen scene: ``[scene, render, 56, 84, 3]`` uint8.

    Render j of a scene is the same picture whatever else is drawn beside it.
    """
    pictures = np.empty((len(SEEN), len(renders), HEIGHT, WIDTH, 3), np.uint8)
    started = time.time()
    for i, scene in enumerate(SEEN):
        for place, j in enumerate(renders):
            rng = np.random.default_rng((first_seed, 7, i, j))
            amount = float(rng.uniform(0.3, 1.0)) if rng.random() < degraded else 0.0
            pictures[i, place] = np.asarray(render(scene, first_seed + j, split="train", degrade=amount))
    worker.log(stage="render", pictures=len(SEEN) * len(renders), seconds=round(time.time() - started))
    return torch.from_numpy(pictures)


def train_vision(worker: Worker, model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Stage 1: fit the vision tower through linear read-outs, which are thrown away."""
    recipe = worker.recipe
    encoder = ImageEncoder(model)
    heads = nn.ModuleList([nn.Linear(recipe.size.hidden, len(values)) for values in VALUES.values()])
    both = nn.ModuleList([encoder, heads])
    done = worker.out / "vision.pt"
    if done.exists() and torch.load(done, weights_only=True)["step"] == recipe.vision_steps:
        both.load_state_dict(torch.load(done, weights_only=True)["module"])
        return
    first_seed = 1_000_000 * (recipe.seed + 1)
    pictures = {
        shard: draw_pictures(worker, first_seed, list(range(shard, recipe.vision_renders, recipe.shards)), 0.0)
        for shard in worker.shards
    }
    labels = _labels(SEEN)
    size = recipe.vision_batch // recipe.shards

    def loss_at(step: int, shard: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 1, step, shard))
        scene = torch.from_numpy(rng.integers(len(labels), size=size))
        which = torch.from_numpy(rng.integers(pictures[shard].shape[1], size=size))
        chosen, target = pictures[shard][scene, which], labels[scene].clone()
        # Channels are mixed so that kinds are not learned by their colours. Some mixes look like a colour that this
        # kind never has (a held-out pair), but never under that colour's name.
        recoloured = torch.from_numpy(rng.random(size) < recipe.recoloured)
        mixing = torch.from_numpy(rng.dirichlet((0.4, 0.4, 0.4), size=(size, 3))).float()
        mixed = torch.einsum("nhwc,ndc->nhwd", chosen[recoloured].float(), mixing[recoloured])
        chosen[recoloured] = mixed.clamp(0, 255).to(torch.uint8)
        target[recoloured, 0] = -100
        pooled = encoder(to_patches(chosen)).mean(1)
        losses = [nn.functional.cross_entropy(head(pooled), target[:, i]) for i, head in enumerate(heads)]
        return torch.stack(losses).sum()

    optimise(worker, "vision", recipe.vision_steps, recipe.vision_lr, both, loss_at)
    _report(worker, encoder, heads)


def _report(worker: Worker, encoder: ImageEncoder, heads: nn.ModuleList) -> None:
    """Log how well each attribute can be read out of new pictures, of seen and of held-out pairs."""
    scenes = every_scene()
    fresh = np.stack([np.asarray(render(scene, 77, split="test")) for scene in scenes])
    with torch.no_grad():
        pooled = torch.cat([encoder(to_patches(x)).mean(1) for x in torch.from_numpy(fresh).split(256)])
    novel = torch.tensor([held_out(scene) for scene in scenes])
    for i, (name, head) in enumerate(zip(VALUES, heads, strict=True)):
        right = (head(pooled).argmax(1) == _labels(scenes)[:, i]).float()
        seen, unseen = right[~novel].mean().item(), right[novel].mean().item()
        worker.log(stage="vision", attribute=name, seen_pairs=round(seen, 4), held_out_pairs=round(unseen, 4))


def make_bank(worker: Worker, model: Qwen2_5_VLForConditionalGeneration) -> Tensor:
    """Stage 2: ``[colour, kind, count, size, render, image token, hidden]``, zero for held-out pairs.

    The pictures are others than those that the vision tower was trained on.
    """
    recipe, path = worker.recipe, worker.out / "bank.pt"
    if path.exists():
        return cast(Tensor, torch.load(path, weights_only=True))
    renders = list(range(recipe.bank_renders))
    pictures = draw_pictures(worker, 1_000_000 * (recipe.seed + 1) + 500_000, renders, recipe.degraded)
    shape = tuple(len(values) for values in VALUES.values())
    bank = torch.zeros(*shape, recipe.bank_renders, IMAGE_TOKENS, recipe.size.hidden)
    encoder = ImageEncoder(model)
    with torch.no_grad():
        for scene, drawn in zip(_labels(SEEN).tolist(), pictures, strict=True):
            bank[tuple(scene)] = encoder(to_patches(drawn))
    worker.save("bank.pt", bank)
    return bank
