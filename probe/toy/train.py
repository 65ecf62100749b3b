"""Train the bundled model: ``python -m probe.toy.train --out DIR``.

Three stages, each seeded, logged to ``log.jsonl`` and resumed from its last checkpoint when the command is issued
again:

1. *vision*: the vision tower learns the four attributes through linear read-outs of the mean of its output tokens;
2. *bank*: it is frozen, and its outputs on fresh renders are stored, so that training the language model costs no
   vision;
3. *language*: the decoder learns the tasks from episodes (:mod:`probe.toy.curriculum`).

Two named options seed circuits that this little training would not find by itself: ``look_back`` (query and key biases
that start by looking a fixed distance back) and ``guidance`` (for the first part of training, a loss that asks some
heads to look from the answer cue at the answers of demonstrations of the same class). Both are recorded beside the
weights.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import Qwen2_5_VLForConditionalGeneration

from probe.data.scenes import HEIGHT, VALUES, WIDTH, every_scene, held_out, render
from probe.toy.architecture import GRID, IMAGE_TOKENS, MERGE, PATCH, WATCHED, ImageEncoder, Size, build, seed_look_back
from probe.toy.curriculum import ID, Batch, Mixture, draw_batch
from probe.toy.vocabulary import IMAGE, save_processor


@dataclass(frozen=True)
class Recipe:
    """Every choice of a training run."""

    seed: int = 0
    size: Size = Size()
    vision_steps: int = 3500
    vision_batch: int = 192
    vision_lr: float = 2e-3
    vision_renders: int = 48
    recoloured: float = 0.4
    bank_renders: int = 24
    degraded: float = 0.1
    language_steps: int = 7000
    language_batch: int = 64
    language_lr: float = 1.5e-3
    items: int = 9
    long_items: int = 17
    long_from: float = 0.6
    mixture: Mixture = Mixture()
    flipped: float = 0.2
    flipped_from: float = 0.3
    end_weight: float = 0.05
    look_back: tuple[tuple[int, int, int], ...] = ((0, 0, 5), (0, 1, 1), (1, 0, 4), (1, 1, 5), (2, 0, 1))
    look_back_sharpness: float = 5.0
    guidance: tuple[tuple[int, int], ...] = ((3, 0), (4, 0))
    guidance_weights: tuple[tuple[float, float], ...] = ((0.0, 0.5), (0.15, 0.2), (0.3, 0.0))


@dataclass(frozen=True)
class Worker:
    """This process among those that train together (gradients are averaged after every step)."""

    rank: int
    world: int
    out: Path
    recipe: Recipe

    def log(self, **values: object) -> None:
        """Append one line to ``log.jsonl`` and print it."""
        if self.rank == 0:
            line = json.dumps({"time": round(time.time(), 1), **values})
            with (self.out / "log.jsonl").open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)

    def average(self, parameters: list[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes."""
        if self.world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            dist.all_reduce(flat)
            flat /= self.world
            start = 0
            for p in parameters:
                if p.grad is not None:
                    p.grad.copy_(flat[start : start + p.numel()].view_as(p))
                    start += p.numel()

    def save(self, name: str, state: object) -> None:
        """Write a checkpoint whole or not at all (first process only)."""
        if self.rank == 0:
            torch.save(state, self.out / f"{name}.part")
            os.replace(self.out / f"{name}.part", self.out / name)


SAVE_EVERY = 60.0
"""Seconds between checkpoints."""


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, then a cosine down to 3 % of the peak."""
    cosine = 0.03 + 0.97 * 0.5 * (1 + np.cos(np.pi * step / steps))
    return peak * float(min(1.0, (step + 1) / 200) * cosine)


def optimise(
    worker: Worker, name: str, steps: int, peak: float, module: nn.Module, loss_at: Callable[[int], Tensor]
) -> None:
    """Run AdamW over ``steps``, saving now and then and resuming where an earlier run stopped."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    first, checkpoint = 0, worker.out / f"{name}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    started = saved = time.time()
    smooth = None
    for step in range(first, steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_at(step)
        optimiser.zero_grad()
        loss.backward()
        worker.average(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            rate = (step + 1 - first) / (time.time() - started)
            worker.log(stage=name, step=step + 1, loss=round(smooth, 4), steps_per_second=round(rate, 2))
        if time.time() - saved >= SAVE_EVERY or step + 1 == steps:
            state = {"module": module.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
            worker.save(f"{name}.pt", state)
            saved = time.time()


# --------------------------------------------------------------------------------------------------------------- vision


def to_patches(pictures: Tensor) -> Tensor:
    """``[n, 56, 84, 3]`` uint8 -> ``[n, patches, 3*2*14*14]``, as the image processor lays them out."""
    n = len(pictures)
    x = (pictures.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    rows, columns = GRID[1] // MERGE, GRID[2] // MERGE
    x = x.view(n, 3, rows, MERGE, PATCH, columns, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(n, GRID[1] * GRID[2], -1)


def draw_pictures(first_seed: int, renders: int, degraded: float, worker: Worker) -> tuple[Tensor, Tensor]:
    """Training pictures of every seen scene: ``[scene, render, 56, 84, 3]`` uint8, and the scenes ``[scene, 4]``."""
    scenes = [scene for scene in every_scene() if not held_out(scene)]
    pictures = np.empty((len(scenes), renders, HEIGHT, WIDTH, 3), np.uint8)
    rng = np.random.default_rng((first_seed, 7))
    started = time.time()
    for i, scene in enumerate(scenes):
        for j in range(renders):
            amount = float(rng.uniform(0.3, 1.0)) if rng.random() < degraded else 0.0
            pictures[i, j] = np.asarray(render(scene, first_seed + j, split="train", degrade=amount))
    worker.log(stage="render", pictures=len(scenes) * renders, seconds=round(time.time() - started))
    labels = [(scene.colour, scene.kind, scene.count, scene.size) for scene in scenes]
    return torch.from_numpy(pictures), torch.tensor(labels)


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
    pictures, labels = draw_pictures(1_000_000 * (recipe.seed + 1), recipe.vision_renders, 0.0, worker)
    per_worker = recipe.vision_batch // worker.world

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 1, step, worker.rank))
        scene = torch.from_numpy(rng.integers(len(labels), size=per_worker))
        which = torch.from_numpy(rng.integers(recipe.vision_renders, size=per_worker))
        chosen, target = pictures[scene, which], labels[scene].clone()
        # A new mix of the channels gives a colour that has no name, so that kinds are not learned by their colours.
        recoloured = torch.from_numpy(rng.random(per_worker) < recipe.recoloured)
        mixing = torch.from_numpy(rng.dirichlet((0.4, 0.4, 0.4), size=(per_worker, 3))).float()
        mixed = torch.einsum("nhwc,ndc->nhwd", chosen[recoloured].float(), mixing[recoloured])
        chosen[recoloured] = mixed.clamp(0, 255).to(torch.uint8)
        target[recoloured, 0] = -100
        pooled = encoder(to_patches(chosen)).mean(1)
        losses = [nn.functional.cross_entropy(head(pooled), target[:, i]) for i, head in enumerate(heads)]
        return torch.stack(losses).sum()

    optimise(worker, "vision", recipe.vision_steps, recipe.vision_lr, both, loss_at)
    with torch.no_grad():
        scenes = [scene for scene in every_scene()]
        fresh = np.stack([np.asarray(render(scene, 77, split="test")) for scene in scenes])
        pooled = torch.cat([encoder(to_patches(x)).mean(1) for x in torch.from_numpy(fresh).split(256)])
        novel = torch.tensor([held_out(scene) for scene in scenes])
        for i, name in enumerate(VALUES):
            truth = torch.tensor([getattr(scene, name) for scene in scenes])
            right = heads[i](pooled).argmax(1) == truth
            seen, unseen = right[~novel].float().mean().item(), right[novel].float().mean().item()
            worker.log(stage="vision", attribute=name, seen_pairs=round(seen, 4), held_out_pairs=round(unseen, 4))


def make_bank(worker: Worker, model: Qwen2_5_VLForConditionalGeneration) -> Tensor:
    """Stage 2: ``[colour, kind, count, size, render, image token, hidden]``, zero for held-out pairs."""
    recipe, path = worker.recipe, worker.out / "bank.pt"
    if path.exists():
        return cast(Tensor, torch.load(path, weights_only=True))
    seed = 1_000_000 * (recipe.seed + 1) + 500_000
    pictures, labels = draw_pictures(seed, recipe.bank_renders, recipe.degraded, worker)
    shape = tuple(len(values) for values in VALUES.values())
    bank = torch.zeros(*shape, recipe.bank_renders, IMAGE_TOKENS, recipe.size.hidden)
    encoder = ImageEncoder(model)
    with torch.no_grad():
        for scene, renders in zip(labels.tolist(), pictures, strict=True):
            bank[tuple(scene)] = encoder(to_patches(renders))
    worker.save("bank.pt", bank)
    return bank


# ------------------------------------------------------------------------------------------------------------- language


def guidance_loss(weights: dict[int, Tensor], batch: Batch, heads: tuple[tuple[int, int], ...]) -> Tensor:
    """Mean of -log attention mass from each answer cue to the earlier answers of its class, over the guided heads."""
    episode, query, key = batch.guides.unbind(1)
    length = batch.ids.shape[1]
    pairs, where = torch.unique(episode * length + query, return_inverse=True)
    total = torch.zeros(())
    for layer, head in heads:
        mass = torch.zeros(len(pairs)).index_add(0, where, weights[layer][episode, head, query, key].float())
        total = total - mass.clamp_min(1e-6).log().mean()
    return total / len(heads)


def accuracy_by_task(batch: Batch, logits: Tensor) -> dict[str, float]:
    """Share of right answer tokens in the second half of each episode of a training batch."""
    episode, position = (batch.targets != -100).nonzero(as_tuple=True)
    right = logits.argmax(1) == batch.targets[episode, position]
    late = position > batch.ids.shape[1] // 2
    tasks = np.array(batch.tasks)[episode.numpy()]
    chosen = {task: right[late & torch.from_numpy(tasks == task)] for task in sorted(set(batch.tasks))}
    return {task: round(values.float().mean().item(), 3) for task, values in chosen.items() if len(values)}


def train_language(worker: Worker, model: Qwen2_5_VLForConditionalGeneration, bank: Tensor) -> None:
    """Stage 3: fit the decoder, with the vision tower's outputs from the bank."""
    recipe = worker.recipe
    decoder, head = model.model.language_model, model.lm_head
    trained = nn.ModuleList([decoder, head])
    if recipe.look_back:
        seed_look_back(model, {(layer, h): d for layer, h, d in recipe.look_back}, recipe.look_back_sharpness)
    decoder.config._attn_implementation_internal = "toy_watched"
    per_worker = recipe.language_batch // worker.world

    def loss_at(step: int) -> Tensor:
        part = step / recipe.language_steps
        rng = np.random.default_rng((recipe.seed, 2, step, worker.rank))
        mixture = replace(recipe.mixture, flipped=recipe.flipped if part >= recipe.flipped_from else 0.0)
        is_long = part >= recipe.long_from and step % 2 == 1
        items = recipe.long_items if is_long else recipe.items
        batch = draw_batch(rng, per_worker // 2 if is_long else per_worker, items, mixture)
        weight = [w for start, w in recipe.guidance_weights if part >= start][-1] if recipe.guidance else 0.0
        WATCHED.watch = frozenset(layer for layer, _ in recipe.guidance) if weight else frozenset()
        which = torch.from_numpy(rng.integers(recipe.bank_renders, size=len(batch.scenes)))
        scenes = torch.tensor(batch.scenes, dtype=torch.long).reshape(-1, 4)
        features = bank[scenes[:, 0], scenes[:, 1], scenes[:, 2], scenes[:, 3], which]
        embedded = decoder.embed_tokens(batch.ids)
        embedded = embedded.masked_scatter((batch.ids == ID[IMAGE])[..., None], features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = decoder(inputs_embeds=embedded, position_ids=batch.positions, use_cache=False).last_hidden_state
            answers = head(states[batch.targets != -100]).float()
            ends = head(states[batch.end_targets != -100]).float()
        loss = nn.functional.cross_entropy(answers, batch.targets[batch.targets != -100])
        loss = loss + recipe.end_weight * nn.functional.cross_entropy(
            ends, batch.end_targets[batch.end_targets != -100]
        )
        if (step + 1) % 100 == 0:
            worker.log(stage="language", step=step + 1, items=items, accuracy=accuracy_by_task(batch, answers))
        weights = WATCHED.take()
        if weight and len(batch.guides):
            loss = loss + weight * guidance_loss(weights, batch, recipe.guidance)
        return loss

    optimise(worker, "language", recipe.language_steps, recipe.language_lr, trained, loss_at)
    decoder.config._attn_implementation_internal = "sdpa"


def export(worker: Worker, model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Write the model, its processor files and its recipe in Hugging Face layout."""
    if worker.rank == 0:
        directory = worker.out / "model"
        model.save_pretrained(directory)
        save_processor(directory)
        (directory / "recipe.json").write_text((worker.out / "recipe.json").read_text())
        worker.log(stage="export", parameters=sum(p.numel() for p in model.parameters()))


def claim(out: Path, recipe: Recipe) -> None:
    """Take a directory for one recipe: checkpoints of another would be resumed as if they were its own."""
    out.mkdir(parents=True, exist_ok=True)
    path, text = out / "recipe.json", json.dumps(asdict(recipe), indent=2) + "\n"
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{out} holds a training with another recipe (see {path}); choose another --out.")
    path.write_text(text)


def work(rank: int, world: int, out: Path, recipe: Recipe) -> None:
    """All stages in one process of ``world``."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29517")
        dist.init_process_group("gloo", rank=rank, world_size=world)
    worker = Worker(rank, world, out, recipe)
    model = build(recipe.size, recipe.seed)
    train_vision(worker, model)
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)
    train_language(worker, model, make_bank(worker, model))
    export(worker, model)
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    """Parse the command line and start the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints, log and the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="processes that train together, one core each")
    parser.add_argument("--vision-steps", type=int, default=Recipe.vision_steps)
    parser.add_argument("--language-steps", type=int, default=Recipe.language_steps)
    arguments = parser.parse_args()
    recipe = Recipe(seed=arguments.seed, vision_steps=arguments.vision_steps, language_steps=arguments.language_steps)
    claim(arguments.out, recipe)
    if arguments.processes == 1:
        work(0, 1, arguments.out, recipe)
    else:
        spawn(work, args=(arguments.processes, arguments.out, recipe), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
