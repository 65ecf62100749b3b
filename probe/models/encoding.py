"""From a prompt and its images to token ids with a token map, and from several of these to a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probe.errors import ProbeError
from probe.models.prompt import Prompt, Span
from probe.models.token_map import PADDING, ROLES, TokenMap
from probe.segments import NEITHER

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class ImageTokens:
    """What a family made of one image: its tokens in order.

    They stand in the text where the image does, or, in families with cross-attention, on the vision axis.

    Attributes
    ----------
    tile, row, column
        ``[n]`` each. Tile 0 is the whole image; crops of it count from 1 in reading order. Row and column count over
        the whole image, in the grid of tile 0 or in that of all crops together; -1 where a token has no place in a
        grid.
    size
        Width and height in pixels after resizing.
    original
        Width and height in pixels before.
    text
        What stands in the prompt for the image; empty: its tokens and nothing else.
    structural
        ``[n]``, tokens in the image's run that show nothing of it (the ends of lines, unused tiles); default none.
    box
        What the grid covers, as left, upper, right and lower edge in widths and heights of the image: less than the
        whole where it was cropped, more where it was padded.
    """

    tile: np.ndarray
    row: np.ndarray
    column: np.ndarray
    size: tuple[int, int]
    original: tuple[int, int]
    text: str = ""
    structural: np.ndarray | None = None
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    def __len__(self) -> int:
        return len(self.row)


def square_box(image: Image.Image) -> tuple[float, float, float, float]:
    """The box of an image that was padded to a square, on both sides alike."""
    side = max(image.size)
    x, y = side / image.width / 2, side / image.height / 2
    return 0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y


def grid_places(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tile, row and column of the tokens of one grid, in reading order."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.zeros_like(row), row, column


def tiled_places(
    tile_rows: int, tile_columns: int, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tile, row and column of crops of ``rows`` x ``columns`` tokens, one crop after the other in reading order."""
    tile, within = np.divmod(np.arange(tile_rows * tile_columns * rows * columns), rows * columns)
    row, column = np.divmod(within, columns)
    return tile + 1, tile // tile_columns * rows + row, tile % tile_columns * columns + column


def join_places(*parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The places of tokens that follow one another."""
    tile, row, column = (np.concatenate(axis) for axis in zip(*parts, strict=True))
    return tile, row, column


def no_places(n: int, tile: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tile, row and column of ``n`` tokens without a grid."""
    return np.full(n, tile), np.full(n, -1), np.full(n, -1)


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
        The family's image inputs (``pixel_values`` …), whose first dimension runs over images or patches, or is 1.
    images
        One entry an image, in reading order.
    episode
        The episode's id.
    vision_map
        In families with cross-attention, what each key on the vision axis is; else ``None``.
    """

    ids: Tensor
    token_map: TokenMap
    inputs: dict[str, Tensor]
    images: tuple[ImageTokens, ...]
    episode: str
    vision_map: TokenMap | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_prompt(self) -> int:
        """The number of positions before the query's answer."""
        return int(self.token_map.answer[0])


Place = tuple[int, int, int, int, int, int]  # role, demonstration, image, tile, row, column


def tokenise(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerFast,
    image_token: int | None,
    images: Sequence[ImageTokens],
    inputs: dict[str, Tensor],
    episode: str,
) -> Encoding:
    """Tokenise a prompt in which every image is written out, and map every position.

    Parameters
    ----------
    prompt
        From :func:`~probe.models.prompt.expand_images`.
    tokenizer
        The model's.
    image_token
        The id that stands for image features, or ``None`` if they stand on an axis of their own.
    images, inputs
        What the family made of the images.
    episode
        Its id.

    Raises
    ------
    ProbeError
        If an image has another number of tokens in the text than features, or the query's answer has no token.
    """
    encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    opening = _opening(tokenizer, prompt)
    owner = _span_of_character(prompt)
    ids: list[int] = [*opening]
    places: list[Place] = [(ROLES.index("template"), NEITHER, -1, -1, -1, -1)] * len(opening)
    remaining = [iter(_places_of(image)) for image in images]
    n_straddling = 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        letters = [i for i in range(start, end) if not prompt.text[i].isspace()] or list(range(start, end))
        if not letters:  # a token without characters (byte fallback): it belongs to the character it stands at
            letters = [min(start, len(owner) - 1)]
        span = prompt.spans[owner[letters[0]]]
        n_straddling += any(owner[i] != owner[letters[0]] for i in letters)
        ids.append(token)
        place = next(remaining[span.image], None) if span.role == "image" and token == image_token else None
        if place is None or place[0]:  # text, or the end of a line of an image
            role = "delimiter" if span.role == "image" else span.role
            marks = span.image if image_token is None else -1
            places.append((ROLES.index(role), span.demonstration, marks, -1, -1, -1))
        else:
            places.append((ROLES.index("image"), span.demonstration, span.image, *place[1:]))
    if image_token is not None:
        wanted = sum(len(image) for image in images)
        if ids.count(image_token) != wanted or any(next(places, None) for places in remaining):
            raise ProbeError(
                f"Episode {episode}: the prompt has {ids.count(image_token)} image tokens for {wanted} image features; "
                "the tokenizer does not keep the image token whole."
            )
    places[0] = (ROLES.index("sink"), NEITHER, -1, -1, -1, -1)
    token_map = _token_map(places, prompt.shots, n_straddling)
    if len(token_map.answer) == 0 or token_map.answer[0] == 0:
        raise ProbeError(f"Episode {episode}: the query's answer has no token of its own; is it empty?")
    vision_map = None if image_token is not None else _vision_map(prompt, images)
    return Encoding(torch.tensor(ids), token_map, inputs, tuple(images), episode, vision_map)


def _opening(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    """What the tokenizer puts before a text (a token that begins every text), unless the prompt begins with it.

    An image may come before (PaliGemma).
    """
    begin = tokenizer.bos_token
    text = next((span.start for span in prompt.spans if span.role != "image"), 0)
    if begin and prompt.text.startswith(begin, text):
        return []
    return [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]


def _places_of(image: ImageTokens) -> list[tuple[bool, int, int, int]]:
    """For each token of an image: whether it is structural, and tile, row, column."""
    structural = image.structural if image.structural is not None else np.zeros(len(image), bool)
    return list(zip(structural.tolist(), image.tile.tolist(), image.row.tolist(), image.column.tolist(), strict=True))


def _vision_map(prompt: Prompt, images: Sequence[ImageTokens]) -> TokenMap:
    """What the keys on the vision axis are: the images' tokens, one image after the other."""
    owners = {span.image: span.demonstration for span in prompt.spans if span.image >= 0}
    places = [
        (PADDING if place[0] else ROLES.index("image"), owners[number], number, *place[1:])
        for number, image in enumerate(images)
        for place in _places_of(image)
    ]
    return _token_map(places, prompt.shots, 0)


def _token_map(places: Sequence[Place], shots: int, n_straddling: int) -> TokenMap:
    table = np.array(places, dtype=np.int64).reshape(-1, 6)
    return TokenMap(
        role=table[:, 0].astype(np.int8),
        demonstration=table[:, 1].astype(np.int16),
        image=table[:, 2].astype(np.int16),
        tile=table[:, 3].astype(np.int16),
        row=table[:, 4].astype(np.int16),
        column=table[:, 5].astype(np.int16),
        shots=shots,
        n_straddling=n_straddling,
    )


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

    def repeated(self, times: int) -> Batch:
        """Each episode several times in a row, as beam search reads them; of the inputs, only the ids."""
        ids = self.inputs["input_ids"].repeat_interleave(times, 0)
        encodings = tuple(encoding for encoding in self.encodings for _ in range(times))
        return Batch({"input_ids": ids}, encodings, tuple(pad for pad in self.pads for _ in range(times)))

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on another device."""
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(moved, self.encodings, self.pads)


def collate(encodings: Sequence[Encoding], pad_id: int, *, with_answer: bool = True, by_episode: bool = False) -> Batch:
    """Pad encodings on the left.

    Parameters
    ----------
    encodings
        One or more.
    pad_id
        Token for the padding.
    with_answer
        False stops each episode before the query's answer, ready to generate.
    by_episode
        Whether image inputs have one row an episode: an episode without images then has an empty one.
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
    inputs = {"input_ids": ids, "attention_mask": mask}
    for name in dict.fromkeys(name for e in encodings for name in e.inputs):
        given = [e.inputs.get(name) for e in encodings]
        like = next(value for value in given if value is not None)
        empty = like.new_zeros(1, *(0 for _ in like.shape[1:]))
        inputs[name] = _join([empty if v is None else v for v in given if v is not None or by_episode])
    return Batch(inputs, tuple(encodings), pads)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Join along the first dimension, with zeros where a part is smaller than others in a later one."""
    sizes = [max(lengths) for lengths in zip(*(part.shape[1:] for part in parts), strict=True)]

    def pad(part: Tensor) -> Tensor:
        missing = [size - length for size, length in zip(sizes, part.shape[1:], strict=True)]
        return torch.nn.functional.pad(part, [n for extra in reversed(missing) for n in (0, extra)])

    return torch.cat([pad(part) for part in parts])
