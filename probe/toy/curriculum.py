"""Training episodes of the bundled model as tensors.

Every item's answer is trained, not only the query's: an episode of n items is n queries with 0 to n-1 shots. What no
reader could know (the first time a nonce word or a flipped label appears) carries no loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.data.scenes import ATTRIBUTES, COLUMNS, ROWS, VALUES
from probe.data.tasks import DRAW_RULE, Item, Rule, answer_item, bind, draw_scene, scene_words
from probe.data.words import ENGLISH, LANGUAGES
from probe.toy.architecture import IMAGE_TOKENS
from probe.toy.vocabulary import ANSWER_CUE, END, IMAGE, PAD, START, words

ID = {word: index for index, word in enumerate(words())}


@dataclass(frozen=True)
class Mixture:
    """The shares of what training episodes show; all probabilities."""

    vqa: float = 0.14
    recognition: float = 0.16
    binding_cued: float = 0.26
    binding_uncued: float = 0.26
    operator: float = 0.09
    describe: float = 0.09
    text_only: float = 0.25
    """Of all tasks but describe: the share shown as text-only twins."""
    repeated: float = 0.2
    """Of the items after the first: the share that repeats an earlier item's scene, newly rendered."""
    flipped: float = 0.0
    """Of vqa and recognition: the share with consistently wrong labels, which only the context can tell."""

    def tasks(self) -> dict[str, float]:
        """The probability of each task."""
        names = {"binding_cued": "binding-cued", "binding_uncued": "binding-uncued"}
        return {
            names.get(name, name): getattr(self, name)
            for name in (*names, "vqa", "recognition", "operator", "describe")
        }


@dataclass
class Batch:
    """Episodes padded on the right.

    ``ids`` and ``targets`` are ``[episode, position]``; a target of -100 carries no loss and belongs to the next token.
    ``positions`` is ``[3, episode, position]`` (temporal, height, width). ``scenes`` lists the scene of every picture
    in reading order. ``guides`` holds (episode, query position, key position) of an answer cue and an earlier answer of
    the same class. ``tasks`` names the task of each episode.
    """

    tasks: list[str]
    ids: Tensor
    targets: Tensor
    end_targets: Tensor
    positions: Tensor
    scenes: list[tuple[int, int, int, int]]
    guides: Tensor


def _flip(rng: np.random.Generator, task: str) -> Rule:
    """A vqa or recognition rule whose labels are exchanged among a few classes."""
    attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
    table = ENGLISH if task == "vqa" else LANGUAGES[list(LANGUAGES)[rng.integers(len(LANGUAGES))]]
    n_values = len(VALUES[attribute])
    classes = rng.choice(n_values, size=min(int(rng.integers(2, 5)), n_values), replace=False)
    labels = {int(value): table[attribute][wrong] for value, wrong in zip(classes, np.roll(classes, 1), strict=True)}
    return Rule(task, attribute=attribute, classes=tuple(labels), labels=labels)


def draw_rule(rng: np.random.Generator, mixture: Mixture) -> Rule:
    """Draw a task by its share, and its rule."""
    shares = mixture.tasks()
    task = str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
    if task.startswith("binding"):
        attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
        return bind(task, attribute, int(rng.integers(2, 6)), rng)
    if task in ("vqa", "recognition") and rng.random() < mixture.flipped:
        return _flip(rng, task)
    return DRAW_RULE[task](rng)


def draw_items(rule: Rule, n: int, rng: np.random.Generator, repeated: float) -> list[Item]:
    """``n`` items that follow ``rule``; some repeat the scene of an earlier one."""
    items: list[Item] = []
    for _ in range(n):
        if items and rng.random() < repeated:
            scene = items[rng.integers(len(items))].scene
        else:
            value = None if rule.classes is None else int(rule.classes[rng.integers(len(rule.classes))])
            scene = draw_scene(rng, attribute=rule.attribute, value=value)
        items.append(answer_item(rule, scene, rng))
    return items


def draw_batch(rng: np.random.Generator, n_episodes: int, n_items: int, mixture: Mixture) -> Batch:
    """Draw training episodes and lay them out."""
    tasks, rows = [], []
    scenes: list[tuple[int, int, int, int]] = []
    guides: list[tuple[int, int, int]] = []
    for index in range(n_episodes):
        rule = draw_rule(rng, mixture)
        # Its answers are three times as long; a few items fewer keep the batch from being padded.
        n = n_items * 3 // 4 if rule.task == "describe" else n_items
        items = draw_items(rule, n, rng, mixture.repeated)
        tasks.append(rule.task)
        as_text = rule.task != "describe" and rng.random() < mixture.text_only
        row = _lay_out(items, as_text, unpredictable=rule.labels is not None)
        rows.append(row)
        scenes.extend(() if as_text else [(i.scene.colour, i.scene.kind, i.scene.count, i.scene.size) for i in items])
        if rule.task.startswith("binding"):
            guides.extend((index, cue, answer) for cue, answer in row.guides)
    length = max(len(row.ids) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (length - len(values))

    return Batch(
        tasks=tasks,
        ids=torch.tensor([pad(row.ids, ID[PAD]) for row in rows]),
        targets=torch.tensor([pad(row.targets, -100) for row in rows]),
        end_targets=torch.tensor([pad(row.end_targets, -100) for row in rows]),
        positions=torch.tensor(
            [[pad(list(axis), 0) for axis in zip(*row.positions, strict=True)] for row in rows]
        ).transpose(0, 1),
        scenes=scenes,
        guides=torch.tensor(guides, dtype=torch.long).reshape(-1, 3),
    )


@dataclass
class _Row:
    ids: list[int]
    positions: list[tuple[int, int, int]]
    targets: list[int]
    end_targets: list[int]
    guides: list[tuple[int, int]]


def _lay_out(items: list[Item], as_text: bool, unpredictable: bool) -> _Row:
    """Write one episode as the chat template would (a test compares the two)."""
    row = _Row([ID[START]], [(0, 0, 0)], [-100], [-100], [])
    place = 1
    answered: dict[int, list[int]] = {}

    def say(token: int, target: int = -100, end_target: int = -100) -> None:
        nonlocal place
        row.ids.append(token)
        row.positions.append((place, place, place))
        row.targets.append(target)
        row.end_targets.append(end_target)
        place += 1

    for item in items:
        if as_text:
            for word in scene_words(item.scene).split():
                say(ID[word])
        else:
            for token in range(IMAGE_TOKENS):
                row.ids.append(ID[IMAGE])
                row.positions.append((place, place + token // COLUMNS, place + token % COLUMNS))
                row.targets.append(-100)
                row.end_targets.append(-100)
            place += max(ROWS, COLUMNS)
        say(ID[item.question])
        answer = [ID[word] for word in item.answer.split()]
        known = not unpredictable or item.label_class in answered
        cue = len(row.ids)
        for token, following in zip([ID[ANSWER_CUE], *answer], [*answer, ID[END]], strict=True):
            is_end = following == ID[END]
            say(token, -100 if is_end or not known else following, following if is_end else -100)
        if item.label_class >= 0:
            row.guides.extend((cue, earlier) for earlier in answered.get(item.label_class, ()))
            answered.setdefault(item.label_class, []).append(cue + 1)
        say(ID[END])
    return row
