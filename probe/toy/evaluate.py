"""Measure a trained model: ``python -m probe.toy.evaluate --model DIR --out FILE``.

Six measurements, all on new renders and unseen scans of digits, with labels bound afresh in each episode:

- *accuracy* of each task at each number of shots, with baselines where the labels are made up;
- *novel pairs*: the same at eight shots, for queries whose colour and kind never occur together in training;
- *copying*: whether three near-duplicates of the query with one wrong answer among the demonstrations lead astray;
- *one question*: ``vqa`` whose items all ask the same, as in training flipped ones do too;
- *heads*: what each head's removal does to each task, and that of the heads together that guidance told the same;
- *agreement*: whether plain generation gives the same answers.

The file holds counts; :mod:`probe.toy.bars` judges them and :mod:`probe.toy.card` prints them. Tune on
one ``--seed`` and report another. Finished cells are kept beside the file (``<out>.cells``) until all are there: the
same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from transformers import AutoImageProcessor, AutoTokenizer

from probe.data.scenes import ATTRIBUTES, VALUES
from probe.data.tasks import (
    DRAW_RULE,
    TASKS,
    TEXT_SUFFIX,
    DrawnEpisode,
    Item,
    Rule,
    draw_episode,
    draw_items,
    synthetic_episodes,
)
from probe.data.words import CUES, LANGUAGES
from probe.store.atomic import write_text
from probe.toy.architecture import IMAGE_TOKENS
from probe.toy.bars import print_bars
from probe.toy.reading import BATCH, Prepared, Reader
from probe.toy.recipe import Guidance
from probe.toy.vocabulary import END, IMAGE

WEIGHTS, EVALUATIONS = Path(__file__).parent / "weights", Path(__file__).parent / "evaluations"
SHOTS = (0, 1, 2, 4, 8, 16)
MANY = 8
"""Shots of all measurements but the first."""


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    ``episodes`` a cell, four times as many in those of ``describe`` with many shots (whose fall is the least certain
    figure), ``head_episodes`` a task without each head, ``agreement`` episodes a task that are generated
    too; ``seed`` is that of all episodes.
    """

    episodes: int = 1000
    head_episodes: int = 500
    agreement: int = 50
    seed: int = 1


Job = Callable[[Reader], dict[str, Any]]


def prepare(reader: Reader, task: str, drawn: Sequence[DrawnEpisode]) -> Iterator[list[Prepared]]:
    """Render and encode episodes, some at a time."""
    as_text = task.endswith(TEXT_SUFFIX)
    for start in range(0, len(drawn), BATCH):
        yield [reader.see(d.items, d.pictures, as_text=as_text) for d in drawn[start : start + BATCH]]


def measure_accuracy(
    task: str, shots: int, n: int, seed: int, reader: Reader, *, novel: bool = False
) -> dict[str, Any]:
    """Right answers of one cell, and of two readers who do not look: the commonest label and the last one.

    ``by_attribute`` has [right, n] for each attribute that is asked; the baselines are expected right answers.
    """
    drawn = [draw_episode(task, i, shots=shots, seed=seed, novel_pair_query=novel) for i in range(n)]
    right = np.concatenate([reader.answer(batch).right for batch in prepare(reader, task, drawn)])
    cell: dict[str, Any] = {"task": task, "shots": shots, "right": int(right.sum()), "n": n}
    if task.removesuffix(TEXT_SUFFIX) not in ("describe", "operator"):
        asked = np.array([asked_attribute(d) for d in drawn])
        cell["by_attribute"] = {a: [int(right[asked == a].sum()), int((asked == a).sum())] for a in ATTRIBUTES}
    if task.startswith("binding") and shots:
        cell["majority"] = sum(majority_share(d.items) for d in drawn)
        cell["last"] = sum(d.items[-2].answer == d.items[-1].answer for d in drawn)
    return cell


def asked_attribute(drawn: DrawnEpisode) -> str:
    """The attribute that the query is about."""
    query = drawn.items[-1]
    return drawn.rule.attribute or next(name for name in ATTRIBUTES if CUES[name] == query.question)


def measure_one_question(n: int, seed: int, reader: Reader) -> dict[str, Any]:
    """``vqa`` where all items ask the same, with right answers, as in training flipped ones do too."""
    drawn = []
    for index in range(n):
        rng = np.random.default_rng((seed, index, 98))
        rule = Rule("vqa", attribute=ATTRIBUTES[rng.integers(len(ATTRIBUTES))], language="english")
        items = draw_items(rule, MANY + 1, rng)
        drawn.append(DrawnEpisode(rule, tuple(items), tuple(int(rng.integers(2**31)) for _ in items)))
    right = np.concatenate([reader.answer(batch).right for batch in prepare(reader, "vqa", drawn)])
    shown = np.array([d.items[-1].answer in {item.answer for item in d.items[:-1]} for d in drawn])
    return {
        "answer_shown": [int(right[shown].sum()), int(shown.sum())],
        "answer_not_shown": [int(right[~shown].sum()), int((~shown).sum())],
    }


def majority_share(items: Sequence[Item]) -> float:
    """The chance that a reader is right who says the demonstrations' commonest label, drawing among ties."""
    counts = Counter(item.answer for item in items[:-1])
    winners = [label for label, count in counts.items() if count == max(counts.values())]
    return (items[-1].answer in winners) / len(winners)


def provoke(drawn: DrawnEpisode, rng: np.random.Generator) -> tuple[DrawnEpisode, str]:
    """Put three near-duplicates of the query, all with the same wrong answer, in the place of demonstrations.

    A near-duplicate shows the same scene, rendered anew, and asks the same. The wrong answer is returned as well.
    """
    query = drawn.items[-1]
    attribute = asked_attribute(drawn)
    labels = LANGUAGES[drawn.rule.language or "english"][attribute]
    wrong = labels[(query.label_class + rng.integers(1, len(VALUES[attribute]))) % len(VALUES[attribute])]
    items = list(drawn.items)
    for place in rng.choice(len(items) - 1, size=3, replace=False):
        items[place] = Item(query.scene, query.question, wrong, query.label_class)
    return DrawnEpisode(drawn.rule, tuple(items), drawn.pictures), wrong


def measure_copying(task: str, n: int, seed: int, reader: Reader) -> dict[str, Any]:
    """The same queries on clean episodes and on provoked ones (:func:`provoke`).

    ``copied`` counts the wrong answers that some demonstration gives, ``copied_by_chance`` those that a demonstration
    gives in the next episode that asks for the same attribute in the same language, ``planted`` those that are the
    planted one.
    """
    clean = [draw_episode(task, i, shots=MANY, seed=seed) for i in range(n)]
    provoked, wrong = zip(*(provoke(d, np.random.default_rng((seed, i, 99))) for i, d in enumerate(clean)), strict=True)
    kinds = [(asked_attribute(d), d.rule.language) for d in clean]
    after = [next((i + j) % n for j in range(1, n + 1) if kinds[(i + j) % n] == kinds[i]) for i in range(n)]
    result: dict[str, Any] = {"task": task, "shots": MANY, "n": n}
    right = {}
    for name, drawn in (("clean", clean), ("provoked", provoked)):
        answers = [reader.answer(batch) for batch in prepare(reader, task, drawn)]
        right[name] = np.concatenate([a.right for a in answers])
        said = [word for a in answers for word in a.said]
        shown = [{item.answer for item in d.items[:-1]} for d in drawn]
        errors = np.flatnonzero(~right[name])
        result[name] = {
            "right": int(right[name].sum()),
            "errors": len(errors),
            "copied": sum(said[i] in shown[i] for i in errors),
            "copied_by_chance": sum(said[i] in shown[after[i]] for i in errors),
            "planted": sum(said[i] == wrong[i] for i in errors),
        }
    return {**result, **changes(right["clean"], right["provoked"])}


def changes(before: np.ndarray, after: np.ndarray) -> dict[str, int]:
    """How many episodes were right only before (``lost``) and only after (``gained``)."""
    return {"lost": int((before & ~after).sum()), "gained": int((after & ~before).sum())}


def measure_heads(task: str, n: int, seed: int, together: Sequence[tuple[int, int]], reader: Reader) -> dict[str, Any]:
    """Right answers at eight shots, and their changes when the output of one head, or of several, is set to zero."""
    drawn = [draw_episode(task, i, shots=MANY, seed=seed) for i in range(n)]
    episodes = [episode for batch in prepare(reader, task, drawn) for episode in batch]
    whole = reader.answer(episodes).right
    effects = {}
    for layer, head in reader.heads:
        with reader.without(layer, head):
            effects[f"{layer}.{head}"] = changes(whole, reader.answer(episodes).right)
    with ExitStack() as stack:
        for layer, head in together:
            stack.enter_context(reader.without(layer, head))
        effects["+".join(f"{layer}.{head}" for layer, head in together)] = changes(whole, reader.answer(episodes).right)
    return {"task": task, "n": n, "right": int(whole.sum()), "effects": effects}


def measure_agreement(task: str, n: int, seed: int, directory: Path, reader: Reader) -> dict[str, Any]:
    """How often verdict and first word are those of transformers' own ``generate``, with the files of ``directory``."""
    tokenizer, processor = AutoTokenizer.from_pretrained(directory), AutoImageProcessor.from_pretrained(directory)
    drawn = [draw_episode(task, i, shots=MANY, seed=seed) for i in range(n)]
    ours = [(right, said) for batch in prepare(reader, task, drawn) for right, said in reader.answer(batch).pairs()]
    same = 0
    for episode, (right, said) in zip(synthetic_episodes(task, shots=MANY, n=n, seed=seed), ours, strict=True):
        messages: list[dict[str, Any]] = []
        images: list[Image.Image] = []
        for example in (*episode.demonstrations, episode.query):
            content = [*({"type": "image"} for _ in example.images), {"type": "text", "text": example.question}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": example.answers[0]})
            images += [cast(Image.Image, image) for image in example.images]
        text = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False))
        inputs = tokenizer(text.replace(IMAGE, IMAGE * IMAGE_TOKENS), return_tensors="pt")
        is_image = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE)).int()
        seen = processor(images=images, return_tensors="pt") if images else {}
        out = reader.model.generate(**inputs, **seen, mm_token_type_ids=is_image, max_new_tokens=8, do_sample=False)
        told = str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])).strip()
        same += (told == f"{episode.query.answers[0]} {END}") == right and told.split()[0] == said
    return {"task": task, "n": n, "same": same}


# -------------------------------------------------------------------------------------------------------------- running


def jobs(plan: Plan, directory: Path) -> list[tuple[str, Job]]:
    """All measurements: the part of the file that each belongs to, and what to do with a reader."""
    n, seed = plan.episodes, plan.seed
    found: list[tuple[str, Job]] = []
    for task in TASKS:
        for shots in reversed(SHOTS):
            size = 4 * n if task == "describe" and shots >= MANY else n
            found.append(("accuracy", partial(measure_accuracy, task, shots, size, seed)))
    found += [("novel_pairs", partial(measure_accuracy, task, MANY, n, seed, novel=True)) for task in DRAW_RULE]
    found += [("copying", partial(measure_copying, task, n, seed)) for task in ("vqa", "recognition")]
    found.append(("one_question", partial(measure_one_question, n, seed)))
    if plan.head_episodes:
        together = Guidance().classes
        found += [("heads", partial(measure_heads, task, plan.head_episodes, seed, together)) for task in TASKS]
    found += [("agreement", partial(measure_agreement, task, plan.agreement, seed, directory)) for task in TASKS]
    return found


_READER: Reader | None = None


def _open(directory: Path) -> None:
    """Give a process its own reader."""
    global _READER
    torch.set_num_threads(1)
    _READER = Reader(directory)


def _do(job: Job) -> dict[str, Any]:
    if _READER is None:
        raise RuntimeError("_open comes first")
    return job(_READER)


def evaluate(directory: Path, plan: Plan, processes: int = 2, cells: Path | None = None) -> dict[str, Any]:
    """Measure the model in ``directory``.

    Parameters
    ----------
    directory
        In Hugging Face layout, with the recipe of its training.
    plan
        How much to measure.
    processes
        That measure side by side.
    cells
        A file that keeps finished cells, one a line, and from which an interrupted evaluation goes on.

    Returns
    -------
    dict
        ``accuracy``, ``novel_pairs``, ``copying``, ``one_question``, ``heads`` and ``agreement``, each a list with one
        entry a cell; beside them the training's recipe, the hash of the weights, and the seed of the episodes.
    """
    result: dict[str, Any] = {
        "recipe": json.loads((directory / "recipe.json").read_text()),
        "weights_sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
        "seed": plan.seed,
    }
    named = jobs(plan, directory)
    key = f"{plan} of {result['weights_sha256']}"
    done = _kept(cells, key)
    waiting = [number for number in range(len(named)) if number not in done]
    start = partial(ProcessPoolExecutor, processes, get_context("spawn"), initializer=_open, initargs=(directory,))
    with start() as pool:
        futures = {pool.submit(_do, named[number][1]): number for number in waiting}
        for future in track(as_completed(futures), total=len(waiting), description="measuring", transient=True):
            number = futures[future]
            done[number] = future.result()
            if cells is not None:
                with cells.open("a") as file:
                    # The line break comes first: what an interruption left half written stays a line of its own.
                    file.write("\n" + json.dumps({"key": key, "number": number, "cell": done[number]}))
            if not sys.stderr.isatty():
                sys.stderr.write(f"{len(done)} of {len(named)} cells\n")
    for number, (part, _) in enumerate(named):
        result.setdefault(part, []).append(done[number])
    return result


def _kept(cells: Path | None, key: str) -> dict[int, dict[str, Any]]:
    """Finished cells of an earlier evaluation of the same weights by the same plan."""
    found: dict[int, dict[str, Any]] = {}
    for line in cells.read_text().splitlines() if cells is not None and cells.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # half written; its cell is measured again
            continue
        if entry["key"] == key:
            found[entry["number"]] = entry["cell"]
    return found


def main() -> None:
    """Parse the command line, measure, print the bars and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=WEIGHTS / "toy", help="default: the bundled one")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--episodes", type=int, default=Plan.episodes, help="a cell")
    parser.add_argument("--head-episodes", type=int, default=Plan.head_episodes, help="a task; 0 leaves heads out")
    parser.add_argument("--seed", type=int, default=Plan.seed, help="of the episodes")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    plan = Plan(arguments.episodes, arguments.head_episodes, seed=arguments.seed)
    cells = arguments.out.with_name(arguments.out.name + ".cells")
    result = evaluate(arguments.model, plan, arguments.processes, cells)
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    cells.unlink()
    print_bars(result)


if __name__ == "__main__":
    main()
