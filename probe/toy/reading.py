"""The trained model on the synthetic tasks, many episodes at a time: what it would answer, and without which head.

One forward over an episode that ends in the right answer tells what greedy generation would say: it says exactly that
answer if, at each of its positions, the most likely token is the right one. So nothing has to be generated, and the
pictures of an episode are encoded once for all that is asked about it. The decoder is transformers' own, and ablation
is a plain torch hook: neither ``probe.models`` nor ``probe.trace`` is used, so that they can be judged against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from probe.data.scenes import render
from probe.data.tasks import Item
from probe.toy.architecture import ImageEncoder
from probe.toy.curriculum import ID, lay_out, pad_rows
from probe.toy.vision import to_patches
from probe.toy.vocabulary import END, IMAGE, words

BATCH = 100
WORDS = words()


@dataclass(frozen=True)
class Prepared:
    """An episode with its pictures seen: items (the query last) and ``[pictures, image tokens, hidden]``."""

    items: tuple[Item, ...]
    features: Tensor | None


@dataclass(frozen=True)
class Answers:
    """One entry for each episode: whether the whole answer and its end are right, and the first word that was said."""

    right: np.ndarray
    said: list[str]

    def pairs(self) -> list[tuple[bool, str]]:
        """(right, said) of each episode."""
        return list(zip(self.right.tolist(), self.said, strict=True))


class Reader:
    """A trained model, ready to read.

    Parameters
    ----------
    directory
        In Hugging Face layout.
    """

    def __init__(self, directory: Path) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        self._encoder = ImageEncoder(self.model)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """All (layer, head)."""
        text = self.model.config.get_text_config()
        return [(layer, head) for layer in range(text.num_hidden_layers) for head in range(text.num_attention_heads)]

    @torch.no_grad()
    def see(self, items: Sequence[Item], pictures: Sequence[int], *, as_text: bool = False) -> Prepared:
        """Render the pictures of an episode from their seeds, and encode them; a text-only twin has none."""
        if as_text:
            return Prepared(tuple(items), None)
        drawn = [np.asarray(render(item.scene, seed)) for item, seed in zip(items, pictures, strict=True)]
        return Prepared(tuple(items), self._encoder(to_patches(torch.from_numpy(np.stack(drawn)))))

    @torch.no_grad()
    def answer(self, episodes: Sequence[Prepared]) -> Answers:
        """Read episodes and answer their queries."""
        right: list[bool] = []
        said: list[str] = []
        text = cast(Any, self.model.model.language_model)
        for start in range(0, len(episodes), BATCH):
            batch = episodes[start : start + BATCH]
            rows = [lay_out(e.items, as_text=e.features is None) for e in batch]
            ids, positions, _, _ = pad_rows(rows)
            embedded = text.embed_tokens(ids)
            seen = [e.features.flatten(0, 1) for e in batch if e.features is not None]
            if seen:
                embedded = embedded.masked_scatter((ids == ID[IMAGE])[..., None], torch.cat(seen))
            # Padding stands behind, where a causal reader cannot see it: no mask is needed.
            states = text(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
            for row, episode, state in zip(rows, batch, states, strict=True):
                wanted = [*(ID[word] for word in episode.items[-1].answer.split()), ID[END]]
                end = len(row.ids) - 1
                best = self.model.lm_head(state[end - len(wanted) : end]).argmax(-1).tolist()
                right.append(best == wanted)
                said.append(WORDS[best[0]])
        return Answers(np.array(right), said)

    @contextmanager
    def without(self, layer: int, head: int) -> Iterator[None]:
        """Set a head's output to zero at every position."""
        attention = self.model.model.language_model.layers[layer].self_attn
        part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

        def cut(_module: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            mixed = inputs[0].clone()
            mixed[..., part] = 0
            return (mixed,)

        handle = attention.o_proj.register_forward_pre_hook(cast(Callable[..., Any], cut))
        try:
            yield
        finally:
            handle.remove()
