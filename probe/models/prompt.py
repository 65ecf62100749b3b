"""From an episode to text, knowing which character is what.

The chat template is a program that we do not want to second-guess. So it is run on *sentinels*: unique strings in place
of every question and answer. Where they appear in its output is where the texts go; the template's own output on
prefixes of the conversation tells where a turn begins. Putting the texts in place of the sentinels must then give
exactly what the template writes for the real texts. If it does not (a template that rewrites its content), that is an
error, not a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from probe.data.example import Episode, Example
from probe.errors import ProbeError
from probe.segments import NEITHER, QUERY

Message = dict[str, Any]
Chat = Callable[[list[Message], bool], str]
"""Runs a chat template: (messages, add_generation_prompt) -> text."""

_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: no text that means anything contains them


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) of a prompt and what they are."""

    start: int
    end: int
    role: str
    demonstration: int
    image: int = -1


@dataclass(frozen=True)
class Prompt:
    """A rendered episode.

    Its text up to the end of the query's answer, and spans that cover every character in order.
    """

    text: str
    spans: tuple[Span, ...]
    shots: int


def _user(example: Example, text: str) -> Message:
    return {"role": "user", "content": [*({"type": "image"} for _ in example.images), {"type": "text", "text": text}]}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _conversation(episode: Episode, texts: list[str]) -> list[Message]:
    """User and assistant turns with ``texts`` as questions and answers, in turn."""
    messages = []
    for i, example in enumerate(episode.examples):
        messages += [_user(example, texts[2 * i]), _assistant(texts[2 * i + 1])]
    return messages


def render_prompt(episode: Episode, chat: Chat, placeholder: str) -> Prompt:
    """Render an episode, the query's first accepted answer included.

    Parameters
    ----------
    episode
        What to render; its texts are stripped of surrounding white space.
    chat
        The model's chat template.
    placeholder
        What the template writes for one image.

    Returns
    -------
    Prompt

    Raises
    ------
    ProbeError
        If the template drops, repeats, reorders or rewrites a text, writes another number of images than the episode
        has, or writes a conversation differently once it goes on.
    """
    owners = [*range(episode.shots), QUERY]
    texts = [text.strip() for example in episode.examples for text in (example.question, example.answer)]
    for owner, text in zip((o for o in owners for _ in "qa"), texts, strict=True):
        if _OPEN in text or _CLOSE in text or placeholder in text:
            raise ProbeError(
                f"Episode {episode.id}, {_name(owner)}: the text {text!r} contains characters reserved for the prompt "
                f"({placeholder} or U+E000, U+E001); remove them from the data."
            )
    sentinels = [f"{_OPEN}{i}{_CLOSE}" for i in range(len(texts))]
    messages = _conversation(episode, sentinels)
    skeleton = chat(messages, False)
    found = re.findall(f"{_OPEN}\\d+{_CLOSE}", skeleton)
    if found != sentinels:
        raise ProbeError(
            f"Episode {episode.id}: the chat template shows {len(found)} of {len(sentinels)} questions and answers in "
            "order; it must show each exactly once, in the order of the conversation."
        )
    skeleton = skeleton[: skeleton.index(sentinels[-1]) + len(sentinels[-1])]
    n_images = sum(len(example.images) for example in episode.examples)
    if skeleton.count(placeholder) != n_images:
        raise ProbeError(
            f"Episode {episode.id}: the chat template writes {skeleton.count(placeholder)} image placeholders "
            f"{placeholder} for {n_images} images."
        )
    _check_generation_prompt(episode, chat, messages, skeleton[: -len(sentinels[-1])])
    starts = _turn_starts(episode, chat, messages, skeleton, placeholder)
    prompt = _fill_in(skeleton, starts, owners, texts, placeholder, episode.shots)
    real = chat(_conversation(episode, texts), False)
    if not real.startswith(prompt.text):
        raise ProbeError(
            f"Episode {episode.id}: the chat template rewrites the texts it is given, so that their positions are not "
            "known; use a template that writes them as they are."
        )
    return prompt


def _name(owner: int) -> str:
    return "query" if owner == QUERY else f"demonstration {owner}"


def _check_generation_prompt(episode: Episode, chat: Chat, messages: list[Message], before_answer: str) -> None:
    """What precedes the query's answer must be what the template writes to ask for one."""
    asked = chat(messages[:-1], True)
    if asked.rstrip() != before_answer.rstrip():
        raise ProbeError(
            f"Episode {episode.id}: the chat template asks for an answer with {asked[-40:]!r} but writes "
            f"{before_answer[-40:]!r} before a given one, so that answers would be read at the wrong position."
        )


def _turn_starts(episode: Episode, chat: Chat, messages: list[Message], skeleton: str, placeholder: str) -> list[int]:
    """Where each example's turn begins: character offsets into the skeleton."""
    starts = []
    for i in range(1, episode.shots + 1):
        before = chat(messages[: 2 * i], False)
        if not skeleton.startswith(before):
            raise ProbeError(
                f"Episode {episode.id}: the chat template writes the first {i} demonstrations differently once the "
                "conversation goes on, so that turns have no fixed borders."
            )
        starts.append(len(before))
    # The first turn opens as every later one with as many images does; what stands before that is the template's own
    # (a system prompt).
    # Both turns show the same: a template may write something else where no message has an image.
    small = [_user(episode.examples[0], _OPEN), _assistant("a")]
    later = chat([*small, _user(episode.examples[0], _CLOSE)], False)[len(chat(small, False)) :]
    if _CLOSE not in later:
        raise ProbeError(
            f"Episode {episode.id}: the chat template writes a conversation differently once it goes on, so that turns "
            "have no fixed borders."
        )
    opening = later[: min(i for i in (later.find(_CLOSE), later.find(placeholder)) if i >= 0)].strip()
    head = skeleton[: min(i for i in (skeleton.find(_OPEN), skeleton.find(placeholder)) if i >= 0)]
    if opening not in head:
        raise ProbeError(
            f"Episode {episode.id}: the chat template opens later turns with {opening!r} but not the first one, so "
            "that its border is not known."
        )
    first = head.rfind(opening) if opening else len(head)
    return [first, *starts]


def _fill_in(
    skeleton: str, starts: list[int], owners: list[int], texts: list[str], placeholder: str, shots: int
) -> Prompt:
    """Put the texts in place of their sentinels, keeping count of the characters."""
    pattern = re.compile(f"{_OPEN}(\\d+){_CLOSE}|{re.escape(placeholder)}")
    text, spans, image = skeleton[: starts[0]], [Span(0, starts[0], "template", NEITHER)], 0
    borders = [*starts, len(skeleton)]
    for turn, owner in enumerate(owners):
        at = borders[turn]
        for match in [*pattern.finditer(skeleton, borders[turn], borders[turn + 1]), None]:
            stop = match.start() if match else borders[turn + 1]
            spans.append(Span(len(text), len(text) + stop - at, "delimiter", owner))
            text += skeleton[at:stop]
            if match and match.group(1):
                content = texts[int(match.group(1))]
                role = "answer" if int(match.group(1)) % 2 else "question"
                spans.append(Span(len(text), len(text) + len(content), role, owner))
                text += content
            elif match:
                spans.append(Span(len(text), len(text) + len(placeholder), "image", owner, image))
                text += placeholder
                image += 1
            if match:
                at = match.end()
    return Prompt(text, tuple(span for span in spans if span.end > span.start), shots)


def expand_images(
    prompt: Prompt, written: Sequence[str], image_token: str | None, beside: Callable[[str, str, str], str]
) -> Prompt:
    """Write every image out: in place of its placeholder, what the model reads for it.

    Parameters
    ----------
    prompt
        From :func:`render_prompt`.
    written
        For each image, the text that stands for it.
    image_token
        The text of the token that stands for image features, or ``None`` where there is none.
    beside
        As in :class:`~probe.models.family.Family`.

    Returns
    -------
    Prompt
        Its ``image`` spans hold image tokens only; markers around them are delimiters of the same turn.
    """
    features = re.compile(f"((?:{re.escape(image_token)})+)") if image_token else None
    text, spans = "", []
    for span in prompt.spans:
        if span.role != "image":
            pieces = [(prompt.text[span.start : span.end], span.role, span.image)]
        else:
            before, after = prompt.text[: span.start], prompt.text[span.end :]
            whole = beside(written[span.image], before, after)
            parts = features.split(whole) if features else [whole]
            pieces = [(part, "image" if i % 2 else "delimiter", span.image) for i, part in enumerate(parts) if part]
        for piece, role, image in pieces:
            spans.append(Span(len(text), len(text) + len(piece), role, span.demonstration, image))
            text += piece
    return Prompt(text, tuple(spans), prompt.shots)
