"""Train the bundled model: ``python -m probe.toy.train --out DIR``.

Three stages, each seeded, logged to ``log.jsonl`` and resumed from its last checkpoint when the command is issued
again:

1. *vision*: the vision tower learns the four attributes through linear read-outs of the mean of its output tokens;
2. *bank*: it is frozen, and its outputs on fresh renders are stored, so that training the language model costs no
   vision (both in :mod:`probe.toy.vision`);
3. *language*: the decoder learns the tasks from episodes (:mod:`probe.toy.curriculum`, :mod:`probe.toy.language`).

Two named options seed circuits that this little training would not find by itself: ``look_back`` (query and key biases
that start by looking a fixed distance back) and ``guidance`` (for the first part of training, losses that tell some
heads where to look). :mod:`probe.toy.recipe` holds every choice; it is written beside the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers import Qwen2_5_VLForConditionalGeneration

from probe.store.atomic import write_text
from probe.toy.architecture import build
from probe.toy.language import train_language
from probe.toy.optimise import Worker
from probe.toy.recipe import SIBLINGS, Recipe
from probe.toy.vision import make_bank, train_vision
from probe.toy.vocabulary import save_processor


def export(worker: Worker, model: Qwen2_5_VLForConditionalGeneration, half: bool) -> None:
    """Write the model, its processor files and its recipe in Hugging Face layout; ``half``: in 16 bits."""
    if worker.rank == 0:
        directory = worker.out / "model"
        (model.half() if half else model).save_pretrained(directory)
        save_processor(directory)
        (directory / "recipe.json").write_text((worker.out / "recipe.json").read_text())
        worker.log(stage="export", parameters=sum(p.numel() for p in model.parameters()))


def claim(out: Path, recipe: Recipe) -> None:
    """Take a directory for one recipe: checkpoints of another would be resumed as if they were its own."""
    out.mkdir(parents=True, exist_ok=True)
    path, text = out / "recipe.json", json.dumps(asdict(recipe), indent=2) + "\n"
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{out} holds a training with another recipe (see {path}); choose another --out.")
    write_text(path, text)


def work(rank: int, world: int, out: Path, recipe: Recipe, half: bool = False) -> None:
    """All stages in one process of ``world``."""
    torch.set_num_threads(1)
    if world > 1:
        # They meet over a file of this training, so that two trainings on one machine stay apart.
        meeting = (out / "meeting").resolve().as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    worker = Worker(rank, world, out, recipe)
    model = build(recipe.size, recipe.seed)
    train_vision(worker, model)
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)
    bank = make_bank(worker, model)
    train_language(worker, model, bank)
    export(worker, model, half)
    if world > 1:
        dist.destroy_process_group()


def train(out: Path, recipe: Recipe, processes: int, half: bool = False) -> None:
    """Train in this process or in several, going on where an earlier call stopped."""
    if not 1 <= processes <= recipe.shards:
        raise SystemExit(f"A batch is drawn in {recipe.shards} parts: 1 to {recipe.shards} processes can train.")
    claim(out, recipe)
    if processes == 1:
        work(0, 1, out, recipe, half)
    else:
        (out / "meeting").unlink(missing_ok=True)
        spawn(work, args=(processes, out, recipe, half), nprocs=processes)


VISION_FIELDS = ("seed", "size", "shards", "recoloured", "bank_renders", "degraded")


def take_vision(source: Path, out: Path, recipe: Recipe) -> None:
    """Copy stages 1 and 2 from a training that made the same choices for them, so that siblings see alike."""
    if not (source / "bank.pt").exists():
        raise SystemExit(f"{source} holds no finished vision stage (no bank.pt).")
    theirs = json.loads((source / "recipe.json").read_text())
    ours = json.loads(json.dumps(asdict(recipe)))
    names = [name for name in ours if name.startswith("vision_") or name in VISION_FIELDS]
    different = [name for name in names if ours[name] != theirs.get(name)]
    if different:
        raise SystemExit(f"The vision tower in {source} was trained with another {', '.join(different)}.")
    claim(out, recipe)
    for name in ("vision.pt", "bank.pt"):
        if not (out / name).exists():
            shutil.copy(source / name, out / f"{name}.part")
            os.replace(out / f"{name}.part", out / name)


def main() -> None:
    """Parse the command line and start the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints, log and the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sibling", choices=tuple(SIBLINGS), default="default", help="a control: see recipe.py")
    parser.add_argument("--vision-of", type=Path, metavar="DIR", help="take the vision tower of this finished training")
    parser.add_argument("--processes", type=int, default=2, help="processes that train together, one core each")
    parser.add_argument("--vision-steps", type=int, default=Recipe.vision_steps)
    parser.add_argument("--language-steps", type=int, help=f"default: {Recipe.language_steps}, or the sibling's")
    parser.add_argument("--half", action="store_true", help="store the finished weights in half precision")
    parser.add_argument("--no-compile", action="store_true", help="where there is no C++ compiler; 1.7 times slower")
    arguments = parser.parse_args()
    choices = dict(SIBLINGS[arguments.sibling])
    if arguments.language_steps is not None:
        choices["language_steps"] = arguments.language_steps
    recipe = Recipe(
        seed=arguments.seed, vision_steps=arguments.vision_steps, compiled=not arguments.no_compile, **choices
    )
    if arguments.vision_of is not None:
        take_vision(arguments.vision_of, arguments.out, recipe)
    train(arguments.out, recipe, arguments.processes, arguments.half)


if __name__ == "__main__":
    main()
