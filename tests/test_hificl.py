"""HiFICL: attention to keys and values that were never read."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.modeling_utils as hf
from torch import Tensor

from probe.errors import UsageError
from probe.measures.partition import log_partition
from probe.models.model import Model
from probe.trace.read import read
from probe.trace.steer import inject
from probe.vectors.hificl import Hificl, whole
from probe.vectors.random import random_like
from tests.test_vectors import EPISODES, EXACT, batch_of, exact, moved, tiny, vector
from tests.tiny_qwen import make_episode


def prefixed(model: Model, parameters: Any, run: Any) -> Any:
    """What a function gives while heads attend to learned keys and values before their own, by a plain loop."""
    keys, values = whole(parameters, "k"), whole(parameters, "v")
    layers = {id(layer.self_attn): number for number, layer in enumerate(model.layers)}

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        if id(module) not in layers:
            return own(module, q, k, v, mask, scaling=scaling, **_)
        layer, groups = layers[id(module)], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        n, width = q.shape[2], k.shape[2]
        seen = torch.ones(n, width, dtype=torch.bool).tril(width - n) if mask is None else mask
        out = torch.zeros_like(q)
        for b in range(len(q)):
            for h in range(q.shape[1]):
                extra_k, extra_v = keys[layer, h].to(k), values[layer, h].to(v)
                scores = scaling * torch.cat([q[b, h] @ extra_k.T, q[b, h] @ k[b, h].T], 1)
                visible = seen.expand(len(q), q.shape[1], n, width)[b, h] if seen.dim() == 4 else seen
                visible = visible if visible.dtype == torch.bool else visible == 0
                scores[:, len(extra_k) :] = scores[:, len(extra_k) :].masked_fill(~visible, -torch.inf)
                out[b, h] = scores.softmax(-1) @ torch.cat([extra_v, v[b, h]])
        return out.transpose(1, 2), None

    own = hf.ALL_ATTENTION_FUNCTIONS["sdpa"]
    hf.ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
    try:
        return run()
    finally:
        hf.ALL_ATTENTION_FUNCTIONS.register("sdpa", own)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("options", [{}, {"pairs": 3, "rank_k": 0, "rank_v": 2}, {"pairs": 1}])
def test_it_is_attention_to_appended_keys_and_values(name, options):
    """To 1e-10 in float64, the whole model, in a padded batch; the gate and the window are the family's own."""
    model = exact(name)
    batch = batch_of(model, [make_episode(shots, seed=shots + 2, images=0) for shots in (1, 3)])
    one = vector(Hificl(**options), model)
    own = model.logits(batch)
    wanted = prefixed(model, one.parameters, lambda: model.logits(batch))
    assert moved(own, wanted) > 1e-2
    assert moved(inject(model, one).logits(batch), wanted) < 1e-10 * float(wanted.abs().max())


def test_with_one_pair_it_is_mimic_with_a_value_in_place_of_a_shift():
    """o + mu (V - o), with mu the mass on the virtual key."""
    model = exact("qwen2_5_vl")
    batch = batch_of(model, EPISODES)
    one = vector(Hificl(pairs=1, rank_k=0, rank_v=0), model)
    k, v = (whole(one.parameters, name)[0, :, 0].double() for name in ("k", "v"))
    [edit] = one.edits(layers=[0])
    seen: dict[str, Any] = {}

    def keep(values: Any) -> dict[str, Tensor]:
        at = values.attention
        mu = torch.sigmoid(
            at.scale * torch.einsum("bhnd,hd->bnh", at.q, k)
            - log_partition(at.q, at.k, at.mask, at.scale, at.causal).transpose(1, 2)
        )
        seen["wanted"] = values.heads + mu[..., None] * (v - values.heads)
        seen["found"] = edit.fn(values.heads, SimpleNamespace(attention=at))
        return {}

    read(model, batch, ("attention", "heads"), keep, layers=[0])
    assert moved(seen["wanted"], seen["found"]) < 1e-12


def test_values_of_zero_take_from_what_heads_write_and_added_ones_do_not():
    """The start of training is not zero-shot, unless alpha stays 1: then it is, bit for bit."""
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, EPISODES)
    own = model.logits(batch)
    for merge in (True, False):
        method = Hificl(merge=merge)
        one = vector(method, model, size=0.0)
        assert not whole(one.parameters, "v").any()
        assert whole(one.parameters, "k").std() == pytest.approx(0.01 * 8**0.5, rel=0.1)
        changed = moved(inject(model, one).logits(batch), own)
        assert changed > 1e-2 if merge else changed == 0


def test_heads_are_these_alone():
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, EPISODES)
    one = vector(Hificl(), model)
    for chosen in ([(1, 2)], [(1, 2), (3, 0)]):
        for layer in {layer for layer, _ in chosen}:
            [edit] = one.edits(heads=chosen, layers=[layer])
            [every] = one.edits(layers=[layer])
            found: dict[str, Tensor] = {}

            def keep(values: Any, edit: Any = edit, every: Any = every, found: Any = found) -> dict[str, Tensor]:
                context = SimpleNamespace(attention=values.attention)
                found.update(own=values.heads, some=edit.fn(values.heads, context), all=every.fn(values.heads, context))
                return {}

            read(model, batch, ("attention", "heads"), keep, layers=[layer])
            for head in range(model.n_heads):
                same = "all" if (layer, head) in chosen else "own"
                assert torch.equal(found["some"][:, :, head], found[same][:, :, head])


def test_random_values_keep_lengths_and_angles():
    model = tiny("qwen2_5_vl")
    for options in ({}, {"rank_v": 0}, {"pairs": 40, "rank_v": 0}):
        one = vector(Hificl(**options), model)
        other = random_like(one, seed=1)
        v, drawn = (whole(each.parameters, "v") for each in (one, other))
        assert moved(v, drawn) > 0.1
        torch.testing.assert_close(drawn @ drawn.mT, v @ v.mT, rtol=1e-4, atol=1e-4)
        assert torch.equal(whole(one.parameters, "k"), whole(other.parameters, "k"))
        again, another = (random_like(one, seed=seed) for seed in (1, 2))
        assert torch.equal(again.parameters["v_b"], other.parameters["v_b"])
        assert moved(another.parameters["v_b"], other.parameters["v_b"]) > 0.1


def test_options_that_mean_nothing_are_refused():
    for options in ({"pairs": 0}, {"rank_k": -1}, {"rank_v": -1}):
        with pytest.raises(UsageError, match="one pair in a head or more"):
            Hificl(**options)
    with pytest.raises(UsageError, match="cross-attention alone"):
        Hificl().fit(tiny("mllama"), [make_episode(1, seed=9)] * 5)
    assert Hificl(rank_k=0).label == "hificl rank_k=0"
    assert dataclasses.asdict(Hificl().objective)["ce"] == 1.0
