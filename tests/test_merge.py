"""Vectors in weights: the model answers as with the vector injected, and the given one stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probe.errors import UsageError
from probe.models.load import load
from probe.trace.read import read
from probe.trace.steer import Steered, inject
from probe.vectors.hificl import Hificl
from probe.vectors.i2cl import I2cl
from probe.vectors.live import Live
from probe.vectors.lora import Lora
from probe.vectors.m2iv import M2iv
from probe.vectors.mean import MeanDifference
from probe.vectors.merge import merge
from probe.vectors.mimic import Mimic
from probe.vectors.vector import InContextVector
from tests.test_vectors import EPISODES, _norm, batch_of, moved, tiny, vector
from tests.tiny_families import FAMILIES
from tests.tiny_qwen import make_episode, make_module, make_processor

METHODS: dict[str, Any] = {"m2iv": M2iv(), "i2cl": I2cl(), "mimic": Mimic(size="constant")}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", METHODS)
def test_it_is_the_same_model_to_rounding(kind, bias):
    """To 1e-12 in float64; of projections with a bias, and of ones that get their first; at a scale, in a layer."""
    processor = make_processor()
    module: Any = make_module(processor).double()
    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = _norm(part, 0.0)
    for layer in module.model.language_model.layers if bias else ():
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.bias = torch.nn.Parameter(torch.linspace(-1, 1, projection.out_features).double())
    model = load(module, processor=processor)
    batch = batch_of(model, EPISODES)
    one = vector(METHODS[kind], model)
    own = model.logits(batch)
    for options in ({}, {"scale": 0.5}, {"layers": [2]}):
        merged, steered = merge(model, one, **options), inject(model, one, **options)
        assert moved(merged.logits(batch), steered.logits(batch)) < 1e-12 * float(own.abs().max())
        assert moved(own, merged.logits(batch)) > 0.01
        assert not isinstance(merged, Steered)
        assert merged.fingerprint not in (model.fingerprint, merge(model, one, scale=3.0).fingerprint)
    assert torch.equal(model.logits(batch), own)
    assert torch.equal(read(model, batch).logits, read(merge(model, one, scale=0.0), batch).logits)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_every_family_can_be_merged_and_generates_the_same(name, kind):
    model = tiny(name)
    layers = sorted({site.layer for site in model.sites if site.axis == "text"}) if kind == "mimic" else None
    batch = batch_of(model, [make_episode(1, seed=4)])
    prompts = batch_of(model, [make_episode(1, seed=4)], with_answer=False)
    one = vector(METHODS[kind], model)
    before, names = model.logits(batch), list(model.module.state_dict())
    merged, steered = merge(model, one, layers=layers), inject(model, one, layers=layers)
    wanted = steered.logits(batch)
    assert moved(merged.logits(batch), wanted) < 2e-5 * float(wanted.abs().max())
    assert moved(before, wanted) > 1e-3
    assert merged.generate(prompts, max_new_tokens=4) == steered.generate(prompts, max_new_tokens=4)
    assert torch.equal(model.logits(batch), before)
    assert list(model.module.state_dict()) == names


def test_what_depends_on_what_is_read_cannot_be_merged():
    model = tiny("qwen2_5_vl")
    for method in (Live(), Mimic(), Mimic(size="shared"), Hificl(), MeanDifference(layer=1)):
        with pytest.raises(UsageError, match=r"cannot be merged into weights. What can is m2iv, i2cl and mimic"):
            merge(model, vector(method, model))
    one = vector(M2iv(), model)
    with pytest.raises(UsageError, match="does not act in layer 9"):
        merge(model, one, layers=[9])
    with pytest.raises(UsageError, match="was steered"):
        merge(inject(model, one), one)
    with pytest.raises(UsageError, match="made for another model"):
        merge(tiny("llava"), one)
    with pytest.raises(UsageError, match=r"Layer 1 of .* has no attention to the text"):
        merge(tiny("mllama"), vector(Mimic(size="constant"), tiny("mllama")))
    lora = InContextVector(Lora(rank=2), Lora(rank=2).start(model, torch.Generator()))
    adapted = inject(model, lora).plain
    with pytest.raises(UsageError, match="no plain projection o_proj"):
        merge(adapted, InContextVector(M2iv(), one.parameters))  # type: ignore[arg-type]
