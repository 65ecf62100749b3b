"""What heads do in sequences that are shown twice: look back, find the same again, find what followed.

Random tokens, or pictures of noise, follow no rule, so a head that looks at what followed the first copy of a token has
found it by its content (an induction head) or by its distance. A *shuffle* tells the two apart: the second half then
holds the same items, none of them in its place. Attention by distance still goes to the same positions; attention by
content no longer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from probe.data.example import Episode, Example
from probe.errors import UsageError
from probe.experiments.answering import facts, within_memory
from probe.measures.head_patterns import PATTERNS, attention_to, batch_rows, mean_over_rows, repeat_keys
from probe.measures.mass import row_attention, row_visibility
from probe.models.encoding import Encoding
from probe.models.model import Model
from probe.models.token_map import ROLES, TokenMap
from probe.segments import NEITHER, QUERY
from probe.trace.read import LayerValues, read

QUESTION, ANSWER = "?", "yes"
"""What stands beside every picture: a turn needs a question and an answer."""

SQUARES = 8
"""Squares of noise on a side of a picture: finer noise is the same grey to all that average over a patch."""

CELLS = 2**26
"""How many weights of attention are held at a time."""


@dataclass(frozen=True)
class Repeat:
    """Items shown twice.

    Attributes
    ----------
    encoding
        The whole sequence.
    first, second
        Where the items' tokens stand when they are shown first, and again; -1 in ``first`` for one that is the sink.
    """

    encoding: Encoding
    first: NDArray[np.intp]
    second: NDArray[np.intp]


Draw = Callable[[np.random.Generator], tuple[Repeat, Repeat]]


def repeated_tokens(
    model: Model,
    *,
    length: int = 50,
    n: int = 32,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Score all heads on random tokens that are shown twice.

    A sequence is the token that the model's own prompts begin with, then ``length`` different tokens of plain letters
    in random order, then the same again.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    length
        Tokens that are repeated, S.
    n
        Number of sequences.
    seed
        Of the tokens and shuffles; sequence i does not depend on ``n``.
    batch_size
        Sequences in one forward.
    progress
        Called with the number of sequences done after every batch.

    Returns
    -------
    xarray.Dataset
        Over (sequence, layer, head), shares of attention in [0, 1]: ``previous_token``, ``duplicate_token`` and
        ``induction`` (:mod:`probe.measures.head_patterns`), and the last two at the same positions where the second
        half is shuffled, ``duplicate_shuffled`` and ``induction_shuffled``: near 0 for a head that goes by content,
        below 1/S for one that looks everywhere alike, and as high as unshuffled for one that goes by distance.
        ``visible`` (pattern, layer) is the share of rows that can see their key at all; below 1 in layers with a
        sliding window, where a low score says nothing about shorter distances. Layers with cross-attention alone are
        left out.

    Raises
    ------
    UsageError
        If a number is out of range, or the vocabulary has fewer plain words than ``length``.
    """
    _check(length, n, seed, batch_size)
    vocabulary = plain_tokens(model)
    if len(vocabulary) < length:
        raise UsageError(
            f"{model.name} has {len(vocabulary)} tokens of plain letters, fewer than the {length} that are to be "
            "shown; choose a smaller length."
        )
    opening = opening_token(model)

    def draw(rng: np.random.Generator) -> tuple[Repeat, Repeat]:
        shown, order = rng.choice(vocabulary, length, replace=False), shuffle(rng, length)
        first = np.arange(1, length + 1)
        made = (token_encoding([opening, *shown, *again]) for again in (shown, shown[order]))
        plain, shuffled = (Repeat(encoding, first, first + length) for encoding in made)
        return plain, shuffled

    result = _score(model, draw, n, seed, batch_size, progress)
    spelled = model.tokenizer.convert_ids_to_tokens(opening)
    about = {"experiment": "repeated_tokens", "opening": spelled, "n_vocabulary": len(vocabulary)}
    return result.assign_attrs(**about, length=length, n=n, seed=seed, rows="text tokens, on text tokens")


def repeated_images(
    model: Model,
    *,
    length: int = 4,
    n: int = 16,
    seed: int = 0,
    side: int = 112,
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Score all heads on pictures of noise that are shown twice, each with the same short question and answer.

    Only image tokens are rows and keys: what followed a token is the next image token, at the end of a picture the
    first of the next picture.

    Parameters
    ----------
    model
        From :func:`probe.load`; its text reads images as tokens.
    length
        Pictures that are repeated; 2 or more.
    n, seed, batch_size, progress
        As in :func:`repeated_tokens`.
    side
        Width and height of a picture in pixels; some families turn any size into the same number of tokens.

    Returns
    -------
    xarray.Dataset
        As :func:`repeated_tokens` gives it. In the shuffled sequences whole pictures change their places;
        ``previous_token`` counts image tokens that stand directly behind another.

    Raises
    ------
    UsageError
        If a number is out of range, or the text reads images through cross-attention.
    """
    _check(length, n, seed, batch_size, side)
    if not model.reads_images_in_text:
        raise UsageError(
            f"In {model.family.name} no image is a token of the text, so no image token attends to another there; "
            "repeated_tokens scores the heads of its self-attention on text."
        )

    def draw(rng: np.random.Generator) -> tuple[Repeat, Repeat]:
        pictures, order = [noise(rng, side) for _ in range(length)], shuffle(rng, length)
        plain, shuffled = (
            image_repeat(model, [*pictures, *again]) for again in (pictures, [pictures[at] for at in order])
        )
        return plain, shuffled

    result = _score(model, draw, n, seed, batch_size, progress)
    about = {"experiment": "repeated_images", "side": side, "question": QUESTION, "answer": ANSWER}
    return result.assign_attrs(**about, length=length, n=n, seed=seed, rows="image tokens, on image tokens")


def plain_tokens(model: Model) -> list[int]:
    """Ids of the vocabulary's tokens that read as letters and nothing else, beside a space."""
    tokenizer = model.tokenizer
    apart = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, model.image_token}
    ids = [token for token in range(len(tokenizer)) if token not in apart]
    texts = tokenizer.batch_decode([[token] for token in ids])
    return [token for token, text in zip(ids, texts, strict=True) if text.strip().isalpha()]


def opening_token(model: Model) -> int:
    """What the model's own prompts begin with: the token that begins every text, where the tokenizer has one."""
    return int(model.encode(Episode("opening", (), Example("opening", (), QUESTION, (ANSWER,)))).ids[0])


def shuffle(rng: np.random.Generator, length: int) -> NDArray[np.intp]:
    """A random order that leaves nothing in its place."""
    places = np.arange(length)
    while ((order := rng.permutation(length)) == places).any():
        pass
    return order


def token_encoding(ids: Sequence[int]) -> Encoding:
    """Given tokens as a query without images: the first is the sink, the last the answer, the others the question."""
    role = np.full(len(ids), ROLES.index("question"), np.int8)
    role[0], role[-1] = ROLES.index("sink"), ROLES.index("answer")
    owner = np.full(len(ids), QUERY, np.int16)
    owner[0] = NEITHER
    none = np.full(len(ids), -1, np.int16)
    token_map = TokenMap(role, owner, none, none, none, none, shots=0, n_straddling=0)
    return Encoding(torch.tensor(np.asarray(ids, np.int64)), token_map, {}, (), "repeated tokens")


def noise(rng: np.random.Generator, side: int) -> Image.Image:
    """Squares of random colours."""
    squares = Image.fromarray(rng.integers(0, 256, (SQUARES, SQUARES, 3), dtype=np.uint8))
    return squares.resize((side, side), Image.Resampling.NEAREST)


def image_repeat(model: Model, pictures: Sequence[Image.Image]) -> Repeat:
    """Pictures, of which the second half are those of the first, as demonstrations and query."""
    shown = [Example(str(place), (picture,), QUESTION, (ANSWER,)) for place, picture in enumerate(pictures)]
    encoding = model.encode(Episode("repeated images", tuple(shown[:-1]), shown[-1]))
    positions = encoding.token_map.where("image")
    again = encoding.token_map.image[positions] >= len(pictures) // 2
    first, second = positions[~again], positions[again]
    sink = np.full(len(second) - len(first), -1)  # where the prompt begins with the image (PaliGemma)
    return Repeat(encoding, np.concatenate([sink, first]), second)


def _check(length: int, n: int, seed: int, batch_size: int, side: int = SQUARES) -> None:
    if length < 2 or min(n, batch_size) < 1 or seed < 0 or side < SQUARES:
        raise UsageError(
            "A repeat needs 2 or more items, a run and a batch 1 or more sequences, a seed is 0 or more, and a picture "
            f"has {SQUARES} or more pixels a side; asked for {length}, {n}, {batch_size}, {seed} and {side}."
        )


def _score(
    model: Model, draw: Draw, n: int, seed: int, batch_size: int, progress: Callable[[int], None] | None
) -> xr.Dataset:
    """Read ``n`` sequences as they are and shuffled."""
    parts: list[list[dict[str, Tensor]]] = [[], []]
    for start in range(0, n, batch_size):
        stop = min(start + batch_size, n)
        both = zip(*(draw(np.random.default_rng((seed, number))) for number in range(start, stop)), strict=True)
        with within_memory(model, stop - start):
            for kept, unit in zip(parts, both, strict=True):
                kept.append(read_repeats(model, unit))
        if progress:
            progress(stop)
    plain, shuffled = (torch.cat([part["score"] for part in kept]).unbind(-1) for kept in parts)
    scores = dict(zip(PATTERNS, plain, strict=True))
    scores |= {"duplicate_shuffled": shuffled[1], "induction_shuffled": shuffled[2]}
    dims = ("sequence", "layer", "head")
    return xr.Dataset(
        {name: (dims, score.numpy()) for name, score in scores.items()}
        | {"visible": (("pattern", "layer"), torch.cat([p["visible"] for p in parts[0]]).mean(0).T.numpy())},
        coords={
            **{"sequence": range(n), "layer": model.choose_layers(None), "head": range(model.n_heads)},
            "pattern": list(PATTERNS),
        },
        attrs={**facts(model), "null": "the items of the second half shuffled, none in its place"},
    )


def read_repeats(model: Model, repeats: Sequence[Repeat]) -> dict[str, Tensor]:
    """Read a batch; attention is reduced to the scores layer by layer, a few rows at a time.

    Returns
    -------
    dict of Tensor
        ``score`` ``[sequence, layer, head, pattern]`` and ``visible`` ``[sequence, layer, pattern]``, the share of rows
        that can see their key.
    """
    batch = model.batch([repeat.encoding for repeat in repeats])
    pairs = [repeat_keys(torch.from_numpy(repeat.first), torch.from_numpy(repeat.second)) for repeat in repeats]
    rows, keys = (part.to(model.device) for part in batch_rows(pairs, batch.pads))

    def reduce(values: LayerValues) -> dict[str, Tensor]:
        at = values.attention
        assert at is not None  # a reducer for this site
        at_once = max(1, CELLS // (at.q.shape[0] * at.q.shape[1] * at.k.shape[2]))
        paid, seen = [], []
        for some, wanted in zip(rows.split(at_once, 1), keys.split(at_once, 1), strict=True):
            paid.append(attention_to(row_attention(at.q, at.k, at.mask, at.scale, at.causal, some), wanted))
            visible = row_visibility(at.mask, at.causal, some, at.q.shape[2], at.k.shape[2])
            seen.append(attention_to(visible[:, None].float(), wanted))
        return {"score": mean_over_rows(torch.cat(paid, 2)), "visible": mean_over_rows(torch.cat(seen, 2))[:, 0]}

    layers = model.choose_layers(None)
    reading = read(model, batch, ("attention",), reduce, layers=layers)
    return {name: torch.stack([reading.layers[layer][name] for layer in layers], 1) for name in ("score", "visible")}
