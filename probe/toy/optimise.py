"""Optimisation that resumes, over one process or several that train together."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from probe.toy.recipe import Recipe

SAVE_EVERY = 60.0
"""Seconds between checkpoints."""


@dataclass(frozen=True)
class Worker:
    """This process among those that train together."""

    rank: int
    world: int
    out: Path
    recipe: Recipe

    @property
    def shards(self) -> range:
        """The parts of each batch that this process computes."""
        return range(self.rank, self.recipe.shards, self.world)

    def log(self, **values: object) -> None:
        """Append one line to ``log.jsonl`` and print it (first process only)."""
        if self.rank == 0:
            line = json.dumps({"time": round(time.time(), 1), **values})
            with (self.out / "log.jsonl").open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def save(self, name: str, state: object) -> None:
        """Write a checkpoint whole or not at all (first process only)."""
        if self.rank == 0:
            torch.save(state, self.out / f"{name}.part")
            os.replace(self.out / f"{name}.part", self.out / name)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, then a cosine down to 3 % of the peak."""
    cosine = 0.03 + 0.97 * 0.5 * (1 + np.cos(np.pi * step / steps))
    return peak * float(min(1.0, (step + 1) / 200) * cosine)


def average_gradients(worker: Worker, parameters: list[nn.Parameter]) -> None:
    """Turn gradients summed over this process's shards into the mean over all shards.

    What no loss of a shard touched counts as zero: another process may have touched it.
    """
    summed = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = worker.sum(torch.cat([gradient.flatten() for gradient in summed])) / worker.recipe.shards
    for p, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = mean.view_as(p)


def optimise(
    worker: Worker, name: str, steps: int, peak: float, module: nn.Module, loss_at: Callable[[int, int], Tensor]
) -> None:
    """Run AdamW over ``steps``, saving now and then and resuming where an earlier run stopped.

    Parameters
    ----------
    worker
        Where to save and which shards to compute.
    name
        Of the stage: its checkpoint is ``<name>.pt``.
    steps, peak
        Number of steps and the highest learning rate.
    module
        What is trained: its parameters that require gradients.
    loss_at
        The loss of (step, shard). It must draw all its randomness from these two.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05, foreach=True)
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
        optimiser.zero_grad()
        for shard in worker.shards:
            loss = loss_at(step, shard)
            loss.backward()
        average_gradients(worker, parameters)
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
