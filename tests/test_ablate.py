"""Edits that take something away, against an eager model that is handed an explicit additive mask."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import probe
from probe.errors import UsageError
from probe.models.load import load
from probe.models.model import Model
from probe.models.token_map import ROLES, parse_selection
from probe.segments import QUERY
from probe.trace.ablate import N_KINDS, _blocked, hide_keys, kinds, mean_heads, uniform_attention, zero_head
from probe.trace.generate import generate
from probe.trace.read import read
from tests.tiny_families import MODEL_TYPES, build
from tests.tiny_qwen import make_episode

SIZES = ((84, 56), (56, 84), (40, 40), (120, 30))
EPISODES = [make_episode(2, seed=2, sizes=SIZES), make_episode(2, seed=5, sizes=SIZES)]
UNLIKE = [make_episode(0, seed=1), make_episode(3, seed=2, images=2), make_episode(1, seed=3, images=0)]
EXACT = 3e-5  # two kernels in float32, on logits of up to 10


@cache
def models(kind: str) -> tuple[Model, Model]:
    """The same weights twice: with the kernel that users run, and eager."""
    made, eager = build(kind), build(kind, attn="eager")
    return load(made.module, processor=made.processor), load(eager.module, processor=eager.processor)


@cache
def encoded(kind: str) -> tuple[Any, ...]:
    return tuple(models(kind)[0].encode(episode) for episode in EPISODES)


@contextmanager
def patched(model: Model, change: Callable[..., Any]) -> Iterator[None]:
    """Call ``change(site, q, mask)`` for the mask of every eager attention of the text stack."""
    sites = {model.module.get_submodule(site.attention): site for site in model.sites}
    home = sys.modules[type(next(iter(sites))).__module__]
    original = home.eager_attention_forward

    def run(module, query, key, value, attention_mask, *args, **kwargs):
        if module in sites:
            attention_mask = change(sites[module], query, key, attention_mask)
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    home.eager_attention_forward = run
    try:
        yield
    finally:
        home.eager_attention_forward = original


def hide(batch, layers, axis, keys, rows, heads=None):
    """An additive mask by hand: minus infinity at (row, key), for the prompt and for what is generated."""
    length = batch.length

    def change(site, query, key, mask):
        if site.layer not in layers or site.axis != axis:
            return mask
        added = torch.zeros(len(batch), query.shape[1], query.shape[2], key.shape[2])
        for b, (encoding, pad) in enumerate(zip(batch.encodings, batch.pads, strict=True)):
            if axis == "text":
                last = length - 1 + (decoded[0] if query.shape[2] == 1 else 0)
                start = last + 1 - key.shape[2]  # a window has dropped the keys before
                at = [pad + p - start for p in keys(encoding.token_map) if pad + p < length and pad + p >= start]
            else:
                at = list(keys(encoding.vision_map))
            if query.shape[2] == 1:
                here = [0] if rows == "answer" else []
            else:
                here = [pad + p for p in rows_of(encoding, rows) if pad + p < length]
            for row in here:
                for column in at:
                    added[b, slice(None) if heads is None else list(heads), row, column] = float("-inf")
        return added if mask is None else mask.float() + added

    decoded = [0]
    return change, decoded


def rows_of(encoding, rows):
    if rows == "answer":
        return [int(p) - 1 for p in encoding.token_map.answer]
    return [int(p) for p in np.flatnonzero(encoding.token_map.demonstration == QUERY)]


def images(token_map):
    return np.flatnonzero((token_map.role == ROLES.index("image")) & (token_map.demonstration >= 0))


def texts(token_map):
    text = np.isin(token_map.role, [ROLES.index("question"), ROLES.index("answer")])
    return np.flatnonzero(text & (token_map.demonstration == 1))


@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.parametrize(("name", "keys"), [("demos/image", images), ("demo1/text", texts)])
@pytest.mark.parametrize("rows", ["answer", "query"])
def test_a_knockout_equals_an_additive_mask_on_an_eager_model(kind, name, keys, rows):
    ours, eager = models(kind)
    axis = "text"
    if name.endswith("image") and not ours.reads_images_in_text:
        # Text after the query's image sees no other; of that one, every second token is hidden.
        axis, name = "vision", lambda encoding: own_image(encoding.vision_map)
        keys = lambda vision_map: np.flatnonzero(own_image(vision_map))  # noqa: E731
    batch = ours.batch(encoded(kind))
    layers = ours.choose_layers(None, axis)
    edits = hide_keys(layers, name, rows, heads=[0, 3], axis=axis)
    found = read(ours, batch, edits=edits, logits_to_keep=4).logits
    change, _ = hide(batch, layers, axis, keys, rows, heads=[0, 3])
    with patched(eager, change):
        wanted = read(eager, batch, logits_to_keep=4).logits
    untouched = read(ours, batch, logits_to_keep=4).logits
    assert (found - wanted).abs().max() < EXACT
    assert (found - untouched).abs().max() > 30 * EXACT


def own_image(vision_map):
    return (vision_map.demonstration == QUERY) & (np.arange(len(vision_map)) % 2 == 0)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics", "mllama", "paligemma", "internvl"])
def test_generation_under_a_knockout_equals_that_of_a_masked_eager_model(kind):
    """With a cache, padding, and cross-attention."""
    ours, eager = models(kind)
    batch = ours.batch(encoded(kind), with_answer=False)
    layers = ours.choose_layers(None)
    found = generate(ours, batch, max_new_tokens=6, edits=hide_keys(layers, "demos/text+query/question", heads=[1, 2]))

    def text(token_map):
        role = np.isin(token_map.role, [ROLES.index("question"), ROLES.index("answer")])
        own = (token_map.demonstration == QUERY) & (token_map.role == ROLES.index("question"))
        return np.flatnonzero(role & (token_map.demonstration >= 0) | own)

    change, decoded = hide(batch, layers, "text", text, "answer", heads=[1, 2])
    calls = [0]

    def counted(site, query, key, mask):
        if site.axis == "text" and site.layer == layers[0]:
            decoded[0], calls[0] = calls[0], calls[0] + 1
        return change(site, query, key, mask)

    with patched(eager, counted):
        wanted = generate(eager, batch, max_new_tokens=6)
    assert calls[0] == 6
    assert found == wanted
    assert found != generate(ours, batch, max_new_tokens=6)


def test_keys_are_the_last_ones_where_a_window_drops_the_first():
    ours, _ = models("gemma3")
    batch = ours.batch([ours.encode(e) for e in UNLIKE], with_answer=False)
    windows: set[int] = set()

    def note(value, context):
        width = context.attention.k.shape[2]
        windows.add(width)
        for name in ("query", "query/delimiter"):
            blocked = _blocked(parse_selection(name), context)
            for row, encoding, pad in zip(blocked, batch.encodings, batch.pads, strict=True):
                prompt = parse_selection(name).of(encoding.token_map)[: encoding.n_prompt]
                whole = [False] * pad + prompt.tolist() + [False] * context.step  # what is said is never hidden
                assert row.tolist() == whole[-width:]
        return value

    generate(
        ours, batch, max_new_tokens=4, edits=[probe.Edit("heads", layer, note) for layer in ours.choose_layers(None)]
    )
    assert min(windows) < batch.length < max(windows)


def test_generation_asks_for_edits_at_every_step():
    ours, _ = models("qwen2_5_vl")
    batch = ours.batch([ours.encode(e) for e in UNLIKE], with_answer=False)
    steps: list[int] = []

    def note(value, context):
        steps.append(context.step)
        assert value.shape[1] == (batch.length if context.step == 0 else 1)
        return value

    plain = generate(ours, batch, max_new_tokens=5)
    assert generate(ours, batch, max_new_tokens=5, edits=[probe.Edit("heads", 1, note)]) == plain
    assert steps == list(range(5))
    assert generate(ours, batch, max_new_tokens=5) == plain


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics"])
def test_what_hides_nothing_changes_no_bit(kind):
    ours, _ = models(kind)
    batch = ours.batch(encoded(kind))
    layers = ours.choose_layers(None)
    plain = read(ours, batch, logits_to_keep=4).logits
    for edits in (
        hide_keys(layers, "demo7"),
        hide_keys(layers, "demos", "demo7"),
        hide_keys(layers, "demos", heads=[]),
    ):
        assert torch.equal(read(ours, batch, edits=edits, logits_to_keep=4).logits, plain)
    later = hide_keys(layers, "query/answer", "demos")  # demonstrations cannot see it anyway
    assert torch.equal(read(ours, batch, edits=later, logits_to_keep=4).logits, plain)


def test_episodes_of_a_batch_are_edited_as_if_alone():
    ours, _ = models("qwen2_5_vl")
    encodings = [ours.encode(episode) for episode in UNLIKE]
    for edits in (hide_keys(range(3), "demos/image+query/text", "query"), uniform_attention(range(1, 3), "query", [1])):
        together = read(ours, ours.batch(encodings), edits=edits).logits[:, -1]
        for row, encoding in zip(together, encodings, strict=True):
            alone = read(ours, ours.batch([encoding]), edits=edits).logits[0, -1]
            assert (row - alone).abs().max() < EXACT


def test_where_nothing_is_left_the_heads_write_nothing():
    ours, _ = models("qwen2_5_vl")
    batch = ours.batch([ours.encode(episode) for episode in UNLIKE])
    edits = hide_keys([1], "all", "query")
    below = edits[0]
    written = {}

    def look(value, context):
        written["z"] = below.fn(value, context)
        return written["z"]

    assert torch.isfinite(read(ours, batch, edits=[probe.Edit("heads", 1, look)]).logits).all()
    for row, encoding, pad in zip(written["z"], batch.encodings, batch.pads, strict=True):
        asked = torch.from_numpy(parse_selection("query").of(encoding.token_map))
        asked[encoding.n_prompt :] = False  # an answer still sees what it has said
        norms = row[pad:].norm(dim=(1, 2))
        assert (norms[asked] == 0).all()
        assert (norms[~asked] > 0).all()
        assert asked.sum() > 1


def test_uniform_attention_writes_the_mean_of_visible_values():
    ours, _ = models("qwen2_5_vl")
    batch = ours.batch([ours.encode(episode) for episode in UNLIKE])
    seen = {}

    def look(value, context):
        seen["before"], seen["v"] = value, context.attention.v
        seen["after"] = uniform_attention([1], heads=[2])[0].fn(value, context)
        return seen["after"]

    read(ours, batch, edits=[probe.Edit("heads", 1, look)])
    group = 2 // (ours.n_heads // seen["v"].shape[1])
    for b, (encoding, pad) in enumerate(zip(batch.encodings, batch.pads, strict=True)):
        row = pad + encoding.n_prompt - 1
        mean = seen["v"][b, group, pad : row + 1].mean(0)
        assert (seen["after"][b, row, 2] - mean).abs().max() < 1e-5
        seen["after"][b, pad + encoding.token_map.answer - 1, 2] = 0
        seen["before"][b, pad + encoding.token_map.answer - 1, 2] = 0
    assert torch.equal(seen["after"], seen["before"])  # nowhere else


def test_means_stand_in_for_heads_by_kind_of_position():
    ours, _ = models("qwen2_5_vl")
    batch = ours.batch([ours.encode(episode) for episode in UNLIKE])
    means = torch.arange(N_KINDS)[:, None] + torch.linspace(0, 0.5, ours.head_dim)
    found = {}

    def look(value, context):
        found["z"] = mean_heads({(1, 2): means, (2, 0): means})[0].fn(value, context)
        found["at answers"] = mean_heads({(1, 2): means}, rows="answer")[0].fn(value, context)
        found["own"] = value
        return value

    read(ours, batch, edits=[probe.Edit("heads", 1, look)])
    for b, (encoding, pad) in enumerate(zip(batch.encodings, batch.pads, strict=True)):
        kind = torch.from_numpy(kinds(encoding))
        assert torch.equal(found["z"][b, pad:, 2], means[kind])
        assert torch.equal(found["z"][b, pad:, [0, 1, 3]], found["own"][b, pad:, [0, 1, 3]])
        answers = kind == 0
        assert answers.nonzero()[:, 0].tolist() == [p - 1 for p in encoding.token_map.answer]
        assert torch.equal(found["at answers"][b, pad:, 2][answers], means[:1].expand(int(answers.sum()), -1))
        assert torch.equal(found["at answers"][b, pad:, 2][~answers], found["own"][b, pad:, 2][~answers])
    nothing = {(1, 2): torch.zeros(N_KINDS, ours.head_dim)}
    everywhere = read(ours, batch, edits=mean_heads(nothing)).logits
    assert torch.equal(everywhere, read(ours, batch, edits=[zero_head(1, 2)]).logits)
    prompt = ours.batch([ours.encode(episode) for episode in UNLIKE], with_answer=False)
    words = generate(ours, prompt, max_new_tokens=5, edits=mean_heads(nothing))
    assert words == generate(ours, prompt, max_new_tokens=5, edits=[zero_head(1, 2)])


def test_gradients_pass_a_knockout():
    ours, _ = models("qwen2_5_vl")
    batch = ours.batch([ours.encode(EPISODES[0])])
    gain = torch.nn.Parameter(torch.ones(()))
    edits = [probe.Edit("heads", 0, lambda value, context: value * gain), *hide_keys([1, 2], "demos/image")]

    def loss():
        return read(ours, batch, edits=edits, gradients=True).logits.logsumexp(-1).sum()

    (slope,) = torch.autograd.grad(loss(), gain)
    with torch.no_grad():
        gain += 1e-2
        up = loss()
        gain -= 2e-2
        down = loss()
    assert float(slope) == pytest.approx(float(up - down) / 2e-2, rel=2e-2)


@pytest.mark.parametrize("name", ["demo", "demos/picture", "images", "query/", "demo1/image/0", ""])
def test_names_that_mean_nothing_are_refused(name):
    with pytest.raises(UsageError, match="There are no tokens"):
        hide_keys([0], name)
    with pytest.raises(UsageError, match="There are no tokens"):
        uniform_attention([0], rows=name)


def test_heads_that_are_not_there_are_refused():
    ours, _ = models("qwen2_5_vl")
    batch = ours.batch([ours.encode(EPISODES[0])])
    for edits in (
        hide_keys([1], "demos", heads=[4]),
        uniform_attention([1], heads=[-1]),
        mean_heads({(1, 9): torch.zeros(N_KINDS, 8)}),
    ):
        with pytest.raises(UsageError, match="Layer 1 has heads 0 to 3"):
            read(ours, batch, edits=edits)


def test_an_answer_always_sees_what_it_has_said():
    """Hiding the whole query hides its prompt alone, in a forward as in a generation."""
    ours, _ = models("qwen2_5_vl")
    episodes = [make_episode(1, seed=seed) for seed in (1, 2)]
    batch = ours.batch([ours.encode(episode) for episode in episodes])
    layers = range(3)
    whole = read(ours, batch, edits=hide_keys(layers, "query", "all"), logits_to_keep=4).logits
    parts = "query/image+query/question+query/delimiter"
    prompt = read(ours, batch, edits=hide_keys(layers, parts, "all"), logits_to_keep=4).logits
    assert torch.equal(whole, prompt)
    plain = read(ours, batch, logits_to_keep=4).logits
    assert torch.equal(
        read(ours, batch, edits=hide_keys(layers, "query/answer", "all"), logits_to_keep=4).logits, plain
    )


def test_a_kind_of_position_without_a_mean_is_an_error():
    ours, _ = models("qwen2_5_vl")
    batch = ours.batch([ours.encode(EPISODES[0])])
    means = torch.zeros(N_KINDS, ours.head_dim)
    used = set(kinds(batch.encodings[0]).tolist())
    means[[kind for kind in range(N_KINDS) if kind not in used]] = float("nan")
    read(ours, batch, edits=mean_heads({(1, 0): means}))  # what is not there is not asked for
    means[next(iter(used))] = float("nan")
    with pytest.raises(UsageError, match="no mean of what heads write"):
        read(ours, batch, edits=mean_heads({(1, 0): means}))
