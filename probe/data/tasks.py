"""The synthetic tasks: what an episode asks, and how a task is learned from its demonstrations alone.

======================= =================== ==========================================================================
task                    question            answer
======================= =================== ==========================================================================
``vqa``                 names the attribute its value in English: no demonstration is needed
``recognition``         ``?``               the value of a hidden attribute in a hidden language: which task it is
``binding-cued``        names the attribute a nonce word bound to the value, afresh in each episode: a new mapping
``binding-uncued``      ``?``               the same, and the attribute is hidden too
``operator``            ``?``               count + k for a hidden k in 1..5: the answer words are shared by all k
``describe``            ``describe:``       count, colour and kind: three words
======================= =================== ==========================================================================

Each task but ``describe`` has a text-only twin (``<task>-text``): the picture is replaced by its four attribute words,
so that perception and induction can be told apart.

What a task draws afresh in each episode can be fixed behind a colon, so that one vector can stand for it in all
episodes: ``operator:3`` (k = 3), ``recognition:colour-french``, ``binding-uncued:kind-0`` (the first of ever so many
fixed bindings of kinds to nonce words).

A task draws a *rule* for an episode and then items that follow it. :func:`draw_episode` gives these as plain data, and
:func:`synthetic_episodes` renders them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from probe.data.example import Episode, Example, check_request
from probe.data.scenes import ATTRIBUTES, COLOURS, COUNTS, KINDS, SIZES, VALUES, Scene, Split, held_out, render
from probe.data.words import CUES, DESCRIBE, ENGLISH, LANGUAGES, NONCE, NUMERALS, PLURALS, UNCUED
from probe.errors import UsageError, did_you_mean

MAX_SHIFT = 5


@dataclass(frozen=True)
class Rule:
    """What stays the same within an episode.

    ``classes`` lists the values of ``attribute`` that may occur (``None``: all), ``labels`` the answer of each value,
    and ``shift`` the k of the operator task. What a task does not use is ``None``.
    """

    task: str
    attribute: str | None = None
    language: str | None = None
    classes: tuple[int, ...] | None = None
    labels: dict[int, str] | None = None
    shift: int | None = None


@dataclass(frozen=True)
class Item:
    """One (picture, question, answer) before rendering; ``label_class`` is the value that the answer depends on."""

    scene: Scene
    question: str
    answer: str
    label_class: int = -1


def _vqa(rng: np.random.Generator) -> Rule:
    return Rule("vqa", language="english")


def _recognition(rng: np.random.Generator) -> Rule:
    return Rule(
        "recognition",
        attribute=ATTRIBUTES[rng.integers(len(ATTRIBUTES))],
        language=list(LANGUAGES)[rng.integers(len(LANGUAGES))],
    )


def _binding(task: str, classes: int | None = None) -> Callable[[np.random.Generator], Rule]:
    def draw(rng: np.random.Generator) -> Rule:
        attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
        return bind(task, attribute, classes or 4, rng)

    return draw


def bind(task: str, attribute: str, classes: int, rng: np.random.Generator) -> Rule:
    """Bind fresh nonce words to ``min(classes, number of values)`` values of ``attribute``."""
    n_values = len(VALUES[attribute])
    chosen = rng.choice(n_values, size=min(classes, n_values), replace=False)
    words = rng.choice(len(NONCE), size=len(chosen), replace=False)
    labels = {int(value): NONCE[word] for value, word in zip(chosen, words, strict=True)}
    return Rule(task, attribute=attribute, classes=tuple(labels), labels=labels)


def _operator(rng: np.random.Generator) -> Rule:
    return Rule("operator", attribute="count", shift=int(rng.integers(1, MAX_SHIFT + 1)))


def _describe(rng: np.random.Generator) -> Rule:
    return Rule("describe", language="english")


DRAW_RULE: dict[str, Callable[[np.random.Generator], Rule]] = {
    "vqa": _vqa,
    "recognition": _recognition,
    "binding-cued": _binding("binding-cued"),
    "binding-uncued": _binding("binding-uncued"),
    "operator": _operator,
    "describe": _describe,
}


def _fix_operator(task: str, detail: str) -> Rule:
    shift = int(detail)
    if not 1 <= shift <= MAX_SHIFT:
        raise ValueError
    return Rule(task, attribute="count", shift=shift)


def _fix_recognition(task: str, detail: str) -> Rule:
    attribute, language = detail.split("-")
    if attribute not in ATTRIBUTES or language not in LANGUAGES:
        raise ValueError
    return Rule(task, attribute=attribute, language=language)


def _fix_binding(task: str, detail: str) -> Rule:
    attribute, number = detail.split("-")
    if attribute not in ATTRIBUTES:
        raise ValueError
    return bind(task, attribute, 4, np.random.default_rng((7, int(number))))


_FIX_RULE: dict[str, Callable[[str, str], Rule]] = {
    "recognition": _fix_recognition,
    "binding-cued": _fix_binding,
    "binding-uncued": _fix_binding,
    "operator": _fix_operator,
}
FIXED = tuple(f"recognition:{attribute}-{language}" for attribute in ATTRIBUTES for language in LANGUAGES) + tuple(
    f"operator:{shift}" for shift in range(1, MAX_SHIFT + 1)
)
"""Every recognition task and every operator, for commands that go through them."""

TEXT_SUFFIX = "-text"
TASKS = (*DRAW_RULE, *(task + TEXT_SUFFIX for task in DRAW_RULE if task != "describe"))
"""The names of all tasks, text-only twins included."""


def fixed_rule(name: str) -> Rule | None:
    """The rule that the name of a task fixes behind a colon; ``None`` if it fixes none.

    Raises
    ------
    UsageError
        If there is no such task or rule.

    Examples
    --------
    >>> fixed_rule("operator:3").shift
    3
    """
    task, colon, detail = name.partition(":")
    if task not in TASKS:
        raise UsageError(f"There is no task {task!r}; {did_you_mean(task, TASKS)}")
    if not colon:
        return None
    plain = task.removesuffix(TEXT_SUFFIX)
    try:
        return _FIX_RULE[plain](plain, detail)
    except (KeyError, ValueError):
        raise UsageError(
            f"There is no rule {detail!r} of the task {task}; write operator:1 to operator:{MAX_SHIFT}, "
            f"recognition:ATTRIBUTE-LANGUAGE ({', '.join(ATTRIBUTES)}; {', '.join(LANGUAGES)}), or "
            "binding-cued:ATTRIBUTE-NUMBER and binding-uncued:ATTRIBUTE-NUMBER."
        ) from None


def draw_scene(
    rng: np.random.Generator, *, attribute: str | None = None, value: int | None = None, novel_pair: bool = False
) -> Scene:
    """Draw a scene, with one attribute fixed if asked, whose colour and kind are a seen (or a held-out) pair."""
    sizes = (len(COLOURS), len(KINDS), len(COUNTS), len(SIZES))
    while True:
        values = dict(zip(ATTRIBUTES, rng.integers(sizes).tolist(), strict=True))
        if attribute is not None and value is not None:
            values[attribute] = value
        scene = Scene(**values)
        if held_out(scene) == novel_pair:
            return scene


def answer_item(rule: Rule, scene: Scene, rng: np.random.Generator) -> Item:
    """Ask about ``scene`` what ``rule`` asks, and answer it (``vqa`` draws its attribute from ``rng``)."""
    if rule.task == "describe":
        nouns = PLURALS if COUNTS[scene.count] > 1 else ENGLISH["kind"]
        words = (ENGLISH["count"][scene.count], ENGLISH["colour"][scene.colour], nouns[scene.kind])
        return Item(scene, DESCRIBE, " ".join(words))
    if rule.shift is not None:
        return Item(scene, UNCUED, NUMERALS[COUNTS[scene.count] + rule.shift], scene.count)
    attribute = rule.attribute or ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
    value = getattr(scene, attribute)
    question = CUES[attribute] if rule.task in ("vqa", "binding-cued") else UNCUED
    labels = rule.labels if rule.labels is not None else LANGUAGES[rule.language or "english"][attribute]
    return Item(scene, question, labels[value], value)


def draw_items(
    rule: Rule,
    n: int,
    rng: np.random.Generator,
    *,
    query_in_context: bool = False,
    novel_pair_query: bool = False,
) -> list[Item]:
    """Draw ``n`` items that follow ``rule``; the last one is the query.

    Parameters
    ----------
    rule
        From :data:`DRAW_RULE` or :func:`bind`.
    n
        Number of demonstrations plus one.
    rng
        Source of all randomness.
    query_in_context
        In binding tasks, choose the query's class among the demonstrations' classes, so that the answer can be known.
    novel_pair_query
        Show in the query a colour and a kind that never occur together in training.

    Returns
    -------
    list of Item
    """
    items: list[Item] = []
    for index in range(n):
        is_query = index == n - 1
        value = None
        if rule.classes is not None:
            seen = [item.label_class for item in items]
            pool = seen if is_query and query_in_context and seen else list(rule.classes)
            value = int(pool[rng.integers(len(pool))])
        scene = draw_scene(rng, attribute=rule.attribute, value=value, novel_pair=novel_pair_query and is_query)
        items.append(answer_item(rule, scene, rng))
    return items


def scene_words(scene: Scene) -> str:
    """The four attribute words that stand for a picture in the text-only twins."""
    return " ".join(ENGLISH[attribute][getattr(scene, attribute)] for attribute in ATTRIBUTES)


def synthetic_episodes(
    task: str,
    *,
    shots: int,
    n: int,
    seed: int = 0,
    split: Split = "test",
    query_in_context: bool = True,
    novel_pair_query: bool = False,
) -> list[Episode]:
    """Render ``n`` episodes of a task.

    Parameters
    ----------
    task
        One of :data:`TASKS`, or one of them with a rule that is the same in all episodes (``operator:3``).
    shots
        Demonstrations in each episode.
    n
        Number of episodes.
    seed
        Episode i of seed s is always the same, whatever ``n``.
    split
        ``test`` draws new renders and digit scans that training never sees.
    query_in_context, novel_pair_query
        As in :func:`draw_items`.

    Returns
    -------
    list of Episode
        Pictures are in memory; writing the manifest saves them.

    Raises
    ------
    UsageError
        If there is no such task, or a number is out of range.
    """
    fixed_rule(task)  # refuses what does not exist
    check_request(shots, n, seed)
    as_text = shown_as_text(task)
    episodes = []
    for index in range(n):
        drawn = draw_episode(
            task, index, shots=shots, seed=seed, query_in_context=query_in_context, novel_pair_query=novel_pair_query
        )
        examples = [
            _example(f"{task}-{seed}-{index}-{place}", item, as_text, picture, split)
            for place, (item, picture) in enumerate(zip(drawn.items, drawn.pictures, strict=True))
        ]
        episodes.append(
            Episode(
                id=f"{task}-{seed}-{index}",
                demonstrations=tuple(examples[:-1]),
                query=examples[-1],
                strategy=f"synthetic:{task}",
                seed=seed,
                info={key: value for key, value in asdict(drawn.rule).items() if value is not None},
            )
        )
    return episodes


@dataclass(frozen=True)
class DrawnEpisode:
    """An episode before rendering: what it follows, its items (the query last), and the seed of each picture."""

    rule: Rule
    items: tuple[Item, ...]
    pictures: tuple[int, ...]


def draw_episode(
    task: str,
    index: int,
    *,
    shots: int,
    seed: int = 0,
    query_in_context: bool = True,
    novel_pair_query: bool = False,
) -> DrawnEpisode:
    """Episode ``index`` of :func:`synthetic_episodes`, as plain data."""
    plain = plain_task(task)
    rng = np.random.default_rng((seed, index, list(DRAW_RULE).index(plain)))
    drawn = DRAW_RULE[plain](rng)
    rule = fixed_rule(task) or drawn
    items = draw_items(rule, shots + 1, rng, query_in_context=query_in_context, novel_pair_query=novel_pair_query)
    return DrawnEpisode(rule, tuple(items), tuple(int(rng.integers(2**31)) for _ in items))


def plain_task(name: str) -> str:
    """A task's name in :data:`DRAW_RULE`, without a fixed rule and for both twins.

    >>> plain_task("operator-text:3")
    'operator'
    """
    return name.partition(":")[0].removesuffix(TEXT_SUFFIX)


def shown_as_text(name: str) -> bool:
    """Whether a task is the text-only twin."""
    return name.partition(":")[0].endswith(TEXT_SUFFIX)


POOLED = ("vqa", "recognition", "operator", "describe")
"""Tasks whose examples keep their answers in any company; those of ``binding`` mean something in their episode only."""


SELF_CONTAINED = ("vqa", "describe")
"""Of these, the tasks whose question tells all, so that any examples can stand in one episode."""


def synthetic_examples(task: str, *, n: int, seed: int = 0, split: Split = "test") -> list[Example]:
    """Render single examples of a task, to choose demonstrations and queries from.

    Parameters
    ----------
    task
        One of :data:`POOLED`, or its text-only twin (``vqa-text``), which shows the same scenes.
    n
        Number of examples.
    seed
        Example i of seed s is always the same, whatever ``n``.
    split
        As in :func:`synthetic_episodes`.

    Returns
    -------
    list of Example
        ``info`` names the scene's attributes (``colour``, ``kind`` …); its ``group`` is what examples must share to
        belong into one episode: the hidden rule, or the question.

    Raises
    ------
    UsageError
        If there is no such task, or its examples cannot be pooled.
    """
    fixed_rule(task)  # refuses what does not exist
    if plain_task(task) not in POOLED:
        raise UsageError(
            f"The examples of {task} cannot be pooled: their words are bound afresh in each episode. Choose "
            f"{', '.join(POOLED)}, or take whole episodes."
        )
    check_request(0, n, seed)
    examples = []
    for index in range(n):
        drawn = draw_episode(task, index, shots=0, seed=seed)
        rule, item, picture = drawn.rule, drawn.items[0], drawn.pictures[0]
        shift = None if rule.shift is None else f"plus {rule.shift}"
        hidden = " ".join(filter(None, (rule.attribute, rule.language if rule.attribute else None, shift)))
        example = _example(f"{task}-{seed}-{index}", item, shown_as_text(task), picture, split)
        examples.append(replace(example, info={**example.info, "group": hidden or item.question}))
    return examples


def _example(name: str, item: Item, as_text: bool, seed: int, split: Split) -> Example:
    question = f"{scene_words(item.scene)} {item.question}" if as_text else item.question
    images = () if as_text else (render(item.scene, seed, split=split),)
    shown = {attribute: item.scene.value(attribute) for attribute in ATTRIBUTES}
    return Example(id=name, images=images, question=question, answers=(item.answer,), info=shown)
