"""Training episodes of the bundled model as tensors.

Every item's answer is trained, not only the query's: an episode of n items is n queries with 0 to n-1 shots. What no
reader could know (the first time a nonce word or a flipped label appears, a label that is wrong by accident) carries
no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from probe.data.scenes import ATTRIBUTES, COLUMNS, ROWS, VALUES
from probe.data.tasks import DRAW_RULE, Item, Rule, answer_item, bind, draw_scene, scene_words
from probe.data.words import LANGUAGES
from probe.toy.architecture import IMAGE_TOKENS
from probe.toy.recipe import Mixture
from probe.toy.vocabulary import ANSWER_CUE, END, IMAGE, PAD, START, words

ID = {word: index for index, word in enumerate(words())}


@dataclass
class Batch:
    """Episodes padded on the right.

    ``ids`` and ``targets`` are ``[episode, position]``; a target of -100 carries no loss and belongs to the next token.
    ``positions`` is ``[3, episode, position]`` (temporal, height, width). ``scenes`` lists the scene of every picture
    in reading order. ``guides`` holds (episode, query position, key position) of an answer cue and an earlier answer of
    the same class in binding episodes, and ``agreement`` (episode, answer position) and, for each attribute, the share
    of those earlier items whose value is this item's. ``tasks`` names the task of each episode, ``attributes`` its
    hidden attribute (an index, -1 where there is none).
    """

    tasks: list[str]
    attributes: Tensor
    ids: Tensor
    targets: Tensor
    end_targets: Tensor
    positions: Tensor
    scenes: list[tuple[int, int, int, int]]
    guides: Tensor
    agreement: Tensor


def _narrow(rng: np.random.Generator, task: str, flipped: bool) -> Rule:
    """A vqa or recognition rule that asks one question throughout, about all classes or a few.

    Where it is flipped, the labels of the few classes are exchanged among them.
    """
    attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
    language = "english" if task == "vqa" else list(LANGUAGES)[rng.integers(len(LANGUAGES))]
    if not flipped and rng.random() < 0.5:
        return Rule(task, attribute=attribute, language=language)
    n_values = len(VALUES[attribute])
    classes = tuple(rng.choice(n_values, size=min(int(rng.integers(2, 5)), n_values), replace=False).tolist())
    table = LANGUAGES[language][attribute]
    labels = {value: table[wrong] for value, wrong in zip(classes, np.roll(classes, 1), strict=True)}
    return Rule(task, attribute=attribute, language=language, classes=classes, labels=labels if flipped else None)


def draw_rule(rng: np.random.Generator, mixture: Mixture) -> Rule:
    """Draw a task by its share, and its rule."""
    shares = mixture.tasks()
    task = str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
    if task.startswith("binding"):
        attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
        return bind(task, attribute, int(rng.integers(2, 6)), rng)
    if task in ("vqa", "recognition") and (drawn := rng.random()) < mixture.flipped + mixture.narrow:
        return _narrow(rng, task, drawn < mixture.flipped)
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


def mislabel(items: list[Item], place: int, rng: np.random.Generator) -> None:
    """Give one vqa or recognition item, in place, another answer from the vocabulary of its own."""
    item = items[place]
    table = next(t for words in LANGUAGES.values() for t in words.values() if item.answer in t)
    others = [word for word in table if word != item.answer]
    items[place] = replace(item, answer=others[rng.integers(len(others))])


def draw_batch(
    rng: np.random.Generator, n_episodes: int, n_items: int, mixture: Mixture, describe_items: int | None = None
) -> Batch:
    """Draw training episodes of ``n_items`` (``describe``: of ``describe_items``, if given) and lay them out."""
    n_described = n_items if describe_items is None else describe_items
    tasks, attributes, rows = [], [], []
    scenes: list[tuple[int, int, int, int]] = []
    guides: list[tuple[int, int, int]] = []
    agreement: list[tuple[float, ...]] = []
    for index in range(n_episodes):
        rule = draw_rule(rng, mixture)
        items = draw_items(rule, n_described if rule.task == "describe" else n_items, rng, mixture.repeated)
        if mixture.unbound and rule.labels and rule.task.startswith("binding") and rng.random() < mixture.unbound:
            said = list(rule.labels.values())
            items = [replace(item, answer=said[rng.integers(len(said))]) for item in items]
        wrong = None
        if rule.task in ("vqa", "recognition") and rule.labels is None and rng.random() < mixture.mislabelled:
            wrong = int(rng.integers(len(items)))
            mislabel(items, wrong, rng)
        tasks.append(rule.task)
        attributes.append(-1 if rule.attribute is None else ATTRIBUTES.index(rule.attribute))
        as_text = rule.task != "describe" and rng.random() < mixture.text_only
        row = lay_out(items, as_text=as_text, unpredictable=rule.labels is not None, wrong=wrong)
        rows.append(row)
        scenes.extend(() if as_text else [(i.scene.colour, i.scene.kind, i.scene.count, i.scene.size) for i in items])
        if rule.task.startswith("binding"):
            guides.extend((index, cue, answer) for cue, answer in row.guides)
            agreement.extend((index, *compared) for compared in row.agreement)
    # Always the length of the longest that could have been drawn: a compiled decoder wants few shapes.
    longest = 1 + max(n_items * (IMAGE_TOKENS + 4), n_described * (IMAGE_TOKENS + 6))
    ids, positions, targets, end_targets = pad_rows(rows, at_least=longest)
    return Batch(
        tasks=tasks,
        attributes=torch.tensor(attributes),
        ids=ids,
        targets=targets,
        end_targets=end_targets,
        positions=positions,
        scenes=scenes,
        guides=torch.tensor(guides, dtype=torch.long).reshape(-1, 3),
        agreement=torch.tensor(agreement).reshape(-1, 2 + len(ATTRIBUTES)),
    )


def pad_rows(rows: Sequence[Row], at_least: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ids``, ``positions``, ``targets`` and ``end_targets`` of :class:`Batch`."""
    length = max(at_least, *(len(row.ids) for row in rows))

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (length - len(values))

    places = [[pad(list(axis), 0) for axis in zip(*row.positions, strict=True)] for row in rows]
    return (
        torch.tensor([pad(row.ids, ID[PAD]) for row in rows]),
        torch.tensor(places).transpose(0, 1),
        torch.tensor([pad(row.targets, -100) for row in rows]),
        torch.tensor([pad(row.end_targets, -100) for row in rows]),
    )


@dataclass
class Row:
    """One episode laid out: as :class:`Batch`, with ``guides`` and ``agreement`` less the episode."""

    ids: list[int]
    positions: list[tuple[int, int, int]]
    targets: list[int]
    end_targets: list[int]
    guides: list[tuple[int, int]]
    agreement: list[tuple[float, ...]]


def lay_out(
    items: Sequence[Item], *, as_text: bool = False, unpredictable: bool = False, wrong: int | None = None
) -> Row:
    """Write one episode as the chat template would (a test compares the two).

    Parameters
    ----------
    items
        The demonstrations and the query, each with its answer.
    as_text
        Whether words stand in for the pictures.
    unpredictable
        Whether an answer is known only after the first item of its class; earlier ones are no targets.
    wrong
        The item whose answer is a wrong one, and no target.
    """
    row = Row([ID[START]], [(0, 0, 0)], [-100], [-100], [], [])
    place = 1
    answered: dict[int, list[tuple[int, Item]]] = {}

    def say(token: int, target: int = -100, end_target: int = -100) -> None:
        nonlocal place
        row.ids.append(token)
        row.positions.append((place, place, place))
        row.targets.append(target)
        row.end_targets.append(end_target)
        place += 1

    for index, item in enumerate(items):
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
        known = index != wrong and (not unpredictable or item.label_class in answered)
        cue = len(row.ids)
        for token, following in zip([ID[ANSWER_CUE], *answer], [*answer, ID[END]], strict=True):
            is_end = following == ID[END]
            say(token, -100 if is_end or not known else following, following if is_end else -100)
        if earlier := answered.get(item.label_class):
            row.guides.extend((cue, answered_at) for answered_at, _ in earlier)
            same = [np.mean([getattr(e.scene, a) == getattr(item.scene, a) for _, e in earlier]) for a in ATTRIBUTES]
            row.agreement.append((cue + 1, *map(float, same)))
        answered.setdefault(item.label_class, []).append((cue + 1, item))
        say(ID[END])
    return row
