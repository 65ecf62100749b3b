"""From a prompt and its images to token ids with a token map, and from several of these to a padded batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probe.errors import ProbeError
from probe.models.prompt import Prompt, Span
from probe.models.token_map import ROLES, TokenMap
from probe.segments import NEITHER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class ImageTokens:
    """What a family's image processor made of one image: its tokens in order.

    Attributes
    ----------
    tile, row, column
        ``[n]`` each, in the order of the tokens.
    size
        Width and height in pixels after resizing.
    original
        Width and height in pixels before.
    """

    tile: np.ndarray
    row: np.ndarray
    column: np.ndarray
    size: tuple[int, int]
    original: tuple[int, int]

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Encoding:
    """One episode, tokenised up to the end of the query's first accepted answer.

    Attributes
    ----------
    ids
        ``[n]``, int64.
    token_map
        What each position is.
    inputs
        The family's image inputs (``pixel_values`` …), whose first dimension runs over images or patches.
    images
        One entry an image, in reading order.
    episode
        The episode's id.
    """

    ids: Tensor
    token_map: TokenMap
    inputs: dict[str, Tensor]
    images: tuple[ImageTokens, ...]
    episode: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_prompt(self) -> int:
        """The number of positions before the query's answer."""
        return int(self.token_map.answer[0])


def tokenise(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerFast,
    placeholder_id: int,
    images: Sequence[ImageTokens],
    inputs: dict[str, Tensor],
    episode: str,
) -> Encoding:
    """Tokenise a prompt, write each image placeholder as often as its image has tokens, and map every position.

    Raises
    ------
    ProbeError
        If a text contains a special token, or the query's answer has no token of its own.
    """
    encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    owner = _span_of_character(prompt)
    ids: list[int] = []
    columns: list[tuple[int, int, int, int, int, int]] = []  # role, demonstration, image, tile, row, column
    n_straddling = 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        letters = [i for i in range(start, end) if not prompt.text[i].isspace()] or list(range(start, end))
        if not letters:  # a token without characters (byte fallback): it belongs to the character it stands at
            letters = [min(start, len(owner) - 1)]
        span = prompt.spans[owner[letters[0]]]
        n_straddling += any(owner[i] != owner[letters[0]] for i in letters)
        role = ROLES.index(span.role)
        if token == placeholder_id:
            image = images[span.image]
            ids += [token] * len(image)
            places = zip(image.tile.tolist(), image.row.tolist(), image.column.tolist(), strict=True)
            columns += [(role, span.demonstration, span.image, *place) for place in places]
            continue
        ids.append(token)
        columns.append((role, span.demonstration, -1, -1, -1, -1))
    columns[0] = (ROLES.index("sink"), NEITHER, -1, -1, -1, -1)
    table = np.array(columns)
    token_map = TokenMap(
        role=table[:, 0].astype(np.int8),
        demonstration=table[:, 1].astype(np.int16),
        image=table[:, 2].astype(np.int16),
        tile=table[:, 3].astype(np.int16),
        row=table[:, 4].astype(np.int16),
        column=table[:, 5].astype(np.int16),
        shots=prompt.shots,
        n_straddling=n_straddling,
    )
    if len(token_map.answer) == 0 or token_map.answer[0] == 0:
        raise ProbeError(f"Episode {episode}: the query's answer has no token of its own; is it empty?")
    return Encoding(torch.tensor(ids), token_map, inputs, tuple(images), episode)


def refuse_special_tokens(prompt: Prompt, tokenizer: PreTrainedTokenizerFast, episode: str) -> None:
    """A user's text that spells a special token would be read as one: a prompt that is not what it looks like."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for span in prompt.spans:
        if span.role in ("question", "answer"):
            text = prompt.text[span.start : span.end]
            for token in special:
                if token in text:
                    raise ProbeError(
                        f"Episode {episode}: the {span.role} {text!r} contains the special token {token}; remove it "
                        "from the data."
                    )


def _span_of_character(prompt: Prompt) -> list[int]:
    """For every character of the prompt, the index of its span."""

    def width(span: Span) -> int:
        return span.end - span.start

    return [index for index, span in enumerate(prompt.spans) for _ in range(width(span))]


@dataclass(frozen=True)
class Batch:
    """Encodings padded on the left to one length.

    Attributes
    ----------
    inputs
        What the model's forward takes, on the model's device: ``input_ids`` and ``attention_mask`` ``[batch, length]``,
        and the family's own.
    encodings
        The encodings, cut as asked.
    pads
        For each encoding, the number of padding positions before it: position p of an encoding stands at p + pads.
    """

    inputs: dict[str, Any]
    encodings: tuple[Encoding, ...]
    pads: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.encodings)

    @property
    def length(self) -> int:
        """Positions of the padded batch."""
        return int(self.inputs["input_ids"].shape[1])

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on another device."""
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(moved, self.encodings, self.pads)


def collate(
    encodings: Sequence[Encoding],
    pad_id: int,
    token_inputs: Callable[[Tensor], dict[str, Tensor]],
    *,
    with_answer: bool = True,
) -> Batch:
    """Pad encodings on the left.

    Parameters
    ----------
    encodings
        One or more.
    pad_id
        Token for the padding.
    token_inputs
        The family's inputs that follow from the padded token ids.
    with_answer
        False stops each episode before the query's answer, ready to generate.
    """
    rows = [e.ids if with_answer else e.ids[: e.n_prompt] for e in encodings]
    length = max(len(row) for row in rows)
    pads = tuple(length - len(row) for row in rows)
    ids = torch.stack(
        [torch.nn.functional.pad(row, (pad, 0), value=pad_id) for row, pad in zip(rows, pads, strict=True)]
    )
    mask = torch.ones_like(ids)
    for row, pad in zip(mask, pads, strict=True):
        row[:pad] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, **token_inputs(ids)}
    for name in {name for e in encodings for name in e.inputs}:
        inputs[name] = torch.cat([e.inputs[name] for e in encodings if name in e.inputs])
    return Batch(inputs, tuple(encodings), pads)
