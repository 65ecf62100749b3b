"""What a linear probe is asked to read: the label of each episode, and what belongs to its control task.

================ =========================================== ====================================================
target           label                                       type, to which the control task gives a random label
================ =========================================== ====================================================
``task``         the hidden rule: attribute, language, shift the rule and the query's value of its attribute
``colour`` …     that attribute of the query's picture       the picture's value of it and of a second attribute
``binding``      the query's answer, a word bound afresh     the value that the word is bound to
``demonstrated`` the value shown by the last demonstration   the word that stands for it
``answer``       the query's answer                          question and answer, if there are several questions
any other name   that entry of ``info``                      question and entry, if there are several questions
================ =========================================== ====================================================

A type is a property of the input that recurs in other episodes. Where a label is one of few categories, a type is a
finer one, as words are finer than their parts of speech. Where the label is new in each episode, the type is what the
label belongs to, and the control task is the same in a world in which bindings never change.

The first four are of synthetic episodes: their rule is in the episode's ``info``, what a picture shows in its
example's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from probe.data.example import Episode, Picture
from probe.data.images import open_image, pixel_hash
from probe.data.scenes import ATTRIBUTES
from probe.errors import UsageError, did_you_mean

SECOND = {"colour": "count", "kind": "size", "count": "colour", "size": "colour"}
"""What makes a type of picture out of an attribute: 16 to 36 types, so that each recurs in some hundred episodes."""

RULED = ("task", "binding", "demonstrated")

Labels = tuple[list[str | None], list[Hashable]]


@dataclass(frozen=True)
class Target:
    """What is to be read.

    Attributes
    ----------
    name
        On the axis ``target`` of results.
    about
        What the label is, in words.
    labels
        Of each episode; ``None`` where it has none.
    types
        Of each episode, for the control task; ``None`` if no control task is defined.
    control
        What the types are, in words, or why there are none.
    of_demonstration
        Whether the label belongs to the last demonstration and not to the query.
    in_context
        Whether demonstrations' answers are guesses at the label.
    """

    name: str
    about: str
    labels: list[str | None]
    types: list[Hashable] | None
    control: str
    of_demonstration: bool = False
    in_context: bool = False


def default_targets(episodes: Sequence[Episode]) -> list[str]:
    """What is asked where nothing else is said: of synthetic episodes all that they hold, of others the answer."""
    if not all(_is_synthetic(episode) for episode in episodes):
        return ["answer"]
    names = list(ATTRIBUTES)
    if all("attribute" in episode.info for episode in episodes):
        names.insert(0, "task")
    if all("labels" in episode.info and episode.shots for episode in episodes):
        names += ["binding", "demonstrated"]
    return names


def find_target(name: str, episodes: Sequence[Episode]) -> Target:
    """The labels that a target's name stands for.

    Raises
    ------
    UsageError
        If the episodes have no such labels.
    """
    synthetic = all(_is_synthetic(episode) for episode in episodes)
    if name in RULED and all("task" in episode.info for episode in episodes):
        for episode in episodes:
            _check_rule(name, episode)
        return {"task": _task, "binding": _binding, "demonstrated": _demonstrated}[name](episodes)
    if name in ATTRIBUTES and synthetic:
        return _attribute(name, episodes)
    return _column(name, episodes)


def groups_of(episodes: Sequence[Episode], *, of_demonstration: bool = False) -> list[int]:
    """Which episodes belong together: those whose labels are about the same example or the same image.

    Parameters
    ----------
    episodes
        In the order of the groups that are returned.
    of_demonstration
        Count the last demonstration as well as the query.
    """
    parent = list(range(len(episodes)))

    def root(place: int) -> int:
        while parent[place] != place:
            place = parent[place]
        return place

    seen: dict[str, int] = {}
    hashes: dict[Path, str] = {}

    def pixels(picture: Picture, where: str) -> str:
        # By what they show: a copy under another name would tell a probe what it is asked.
        if not isinstance(picture, Path):
            return pixel_hash(open_image(picture, where=where))
        if picture not in hashes:
            hashes[picture] = pixel_hash(open_image(picture, where=where))
        return hashes[picture]

    for place, episode in enumerate(episodes):
        about = [episode.query, *(episode.demonstrations[-1:] if of_demonstration else ())]
        images = (pixels(x, f"episode {episode.id}") for example in about for x in example.images)
        for mark in (*(f"id {example.id}" for example in about), *images):
            parent[root(place)] = root(seen.setdefault(mark, place))
    return [root(place) for place in range(len(episodes))]


def _is_synthetic(episode: Episode) -> bool:
    """Whether it says what its query shows."""
    return all(name in episode.query.info for name in ATTRIBUTES)


def _check_rule(name: str, episode: Episode) -> None:
    task = episode.info["task"]
    if "attribute" not in episode.info or (name == "binding" and "labels" not in episode.info):
        raise UsageError(
            f"Episode {episode.id} has nothing for the target {name}: {task} has no such rule; leave it out."
        )
    if name == "demonstrated" and not episode.shots:
        raise UsageError(f"Episode {episode.id} has no demonstration, which the target {name} is about (--shots).")


def _value(episode: Episode, place: int) -> str:
    """The hidden attribute of an example's picture, such as ``colour red``; -1 is the query, -2 what is before."""
    attribute = episode.info["attribute"]
    return f"{attribute} {episode.examples[place].info[attribute]}"


def _task(episodes: Sequence[Episode]) -> Target:
    several = len({episode.info["task"] for episode in episodes}) > 1

    def rule(episode: Episode) -> str:
        info = episode.info
        shift = f"plus {info['shift']}" if "shift" in info else None
        words = [info["task"] if several else None, info["attribute"], info.get("language"), shift]
        return " ".join(word for word in words if word)

    labels: list[str | None] = [rule(episode) for episode in episodes]
    types: list[Hashable] = [(x, _value(e, -1)) for x, e in zip(labels, episodes, strict=True)]
    return Target(
        "task", "the episode's hidden rule", labels, types, "rule and value that the query has of its attribute"
    )


def _binding(episodes: Sequence[Episode]) -> Target:
    return Target(
        "binding",
        "the word that this episode binds to the query’s class, which is the right answer",
        [episode.query.answer for episode in episodes],
        [_value(episode, -1) for episode in episodes],
        "the query’s class, as if its word were the same in every episode",
        in_context=True,
    )


def _demonstrated(episodes: Sequence[Episode]) -> Target:
    return Target(
        "demonstrated",
        "the value that the last demonstration’s answer stands for",
        [_value(episode, -2) for episode in episodes],
        [episode.demonstrations[-1].answer for episode in episodes],
        "the last demonstration’s answer, as if it meant the same in every episode",
        of_demonstration=True,
    )


def _attribute(name: str, episodes: Sequence[Episode]) -> Target:
    shown = [episode.query.info for episode in episodes]
    return Target(
        name,
        f"the {name} of what the query’s picture shows",
        [info[name] for info in shown],
        [(info[name], info[SECOND[name]]) for info in shown],
        f"{name} and {SECOND[name]} of the picture",
    )


def _column(name: str, episodes: Sequence[Episode]) -> Target:
    """The answer, or what ``info`` says."""
    labels = [episode.query.answer if name == "answer" else _entry(name, episode) for episode in episodes]
    if all(label is None for label in labels):
        known = {key for e in episodes for info in (e.info, e.query.info) for key, x in info.items() if _is_label(x)}
        names = ("answer", *ATTRIBUTES, *RULED, *sorted(known))
        raise UsageError(f"The episodes have no labels {name!r} to read; {did_you_mean(name, names)}")
    about = "the query’s right answer" if name == "answer" else f"{name}, as info says"
    questions = [episode.query.question for episode in episodes]
    if len(set(questions)) == 1:
        return Target(name, about, labels, None, "all questions are the same", in_context=name == "answer")
    types: list[Hashable] = list(zip(questions, labels, strict=True))
    return Target(name, about, labels, types, f"question and {name}", in_context=name == "answer")


def _entry(name: str, episode: Episode) -> str | None:
    value = episode.query.info.get(name, episode.info.get(name))
    if value is not None and not _is_label(value):
        raise UsageError(f"Episode {episode.id}: info[{name!r}] is no label but {value!r}; give a word or a number.")
    return None if value is None or value == "" else str(value)


def _is_label(value: object) -> bool:
    return isinstance(value, str | int | float)
