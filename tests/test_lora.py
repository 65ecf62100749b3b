"""LoRA: other weights in place of edits, in a model that leaves the given one as it is."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Idefics2Config, Idefics2ForConditionalGeneration

import probe
from probe.errors import UsageError
from probe.experiments.compare import compare
from probe.experiments.ov_copying import head_weights
from probe.experiments.ways import ways_for
from probe.models.load import load
from probe.models.model import Model
from probe.models.sites import find_sites
from probe.models.weights import acting_weight
from probe.trace.gradients import frozen
from probe.trace.read import read
from probe.trace.steer import Steered, inject
from probe.vectors.hificl import Hificl
from probe.vectors.i2cl import I2cl
from probe.vectors.live import Live
from probe.vectors.lora import PROJECTIONS, Lora, layer_of
from probe.vectors.random import random_like
from probe.vectors.teacher import Teacher
from probe.vectors.training import Training, losses_of
from probe.vectors.vector import InContextVector, model_facts
from tests.test_vectors import EPISODES, batch_of, moved, tiny, vector
from tests.tiny_families import FAMILIES, build
from tests.tiny_qwen import make_episode, make_module, make_processor


def adapter(method: Lora, model: Model, *, seed: int = 0) -> InContextVector:
    """Drawn at random, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    start = method.start(model, generator)
    parameters = {
        name: value if name.endswith(".A") else 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in start.items()
    }
    return InContextVector(method, parameters, {"model": model_facts(model)})


def merged(model: Model, one: InContextVector, *, scale: float = 1.0, layers: Any = None) -> Model:
    """A copy whose weights are W + (alpha / r) B A, written there by hand."""
    module = copy.deepcopy(model.module)
    method: Any = one.method
    with torch.no_grad():
        for name, target in method.targets(model).items():
            if layers is None or layer_of(name) in layers:
                a, b = (one.parameters[f"{name}.{side}"] for side in ("A", "B"))
                weight: Any = module.get_submodule(target).weight
                weight += scale * method.alpha / method.rank * b @ a
    return dataclasses.replace(model, module=module)


@cache
def plain() -> Model:
    """One that nothing was ever put into."""
    processor = make_processor()
    return load(make_module(processor), processor=processor)


@cache
def plain_of(name: str) -> Model:
    made = build(name)
    return load(made.module, processor=made.processor)


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("where", ["text", "everywhere"])
def test_it_is_the_model_with_these_weights(name, where):
    """In every family: of all layers, of some, at a scale; bit for bit zero-shot while B is zero, and at scale 0."""
    model = tiny(name)
    method = Lora(rank=4, alpha=8.0, where=where)
    one = adapter(method, model)
    batch = batch_of(model, [make_episode(2, seed=4)])
    own = model.logits(batch, logits_to_keep=3)
    bound = 2e-5 * float(own.abs().max())
    for options in ({}, {"scale": 0.5}, {"layers": one.layers[:1]}):
        found = inject(model, one, **options).logits(batch, logits_to_keep=3)
        assert moved(found, merged(model, one, **options).logits(batch, logits_to_keep=3)) < bound
        assert moved(found, own) > 10 * bound
    assert torch.equal(inject(model, one, scale=0.0).logits(batch, logits_to_keep=3), own)
    nothing = InContextVector(method, method.start(model, torch.Generator()))
    assert torch.equal(inject(model, nothing).logits(batch, logits_to_keep=3), own)


def test_counts_are_those_that_are_published_for_idefics2():
    """Its baseline acts on the vision tower and the resampler too; of sizes alone, nothing is allocated."""
    config = Idefics2Config(
        vision_config={"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16},
        perceiver_config={"hidden_size": 4096, "resampler_depth": 3, "resampler_n_heads": 16, "resampler_head_dim": 96},
        text_config={"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    )
    with torch.device("meta"):
        module = Idefics2ForConditionalGeneration(config)
    stub: Any = SimpleNamespace(module=module, sites=find_sites(module))
    for where, count in (("text", 13_631_488), ("everywhere", 17_588_224)):
        start = Lora(where=where).start(stub, torch.Generator())
        assert sum(value.numel() for value in start.values()) == count


def test_the_start_is_pefts():
    """A uniform within one over the root of the width, B zero."""
    model = tiny("qwen2_5_vl")
    start = Lora(rank=64).start(model, torch.Generator().manual_seed(0))
    width = model.text_config.hidden_size
    a = start["0.q_proj.A"]
    assert a.shape == (64, width)
    assert float(a.abs().max()) <= 1 / math.sqrt(width)
    assert float(a.std()) == pytest.approx(1 / math.sqrt(3 * width), rel=0.05)
    assert not any(value.any() for name, value in start.items() if name.endswith(".B"))
    assert {name.split(".")[1] for name in start} == set(PROJECTIONS)


def test_the_given_model_stays_as_it_is_and_lends_its_weights():
    model = plain()
    batch = batch_of(model, EPISODES)
    names, own = list(model.module.state_dict()), model.logits(batch)
    asked = [value.requires_grad for value in model.module.parameters()]
    assert any(asked)
    one = adapter(Lora(rank=2), model)
    steered = inject(model, one)
    assert moved(steered.logits(batch), own) > 1e-3
    assert list(model.module.state_dict()) == names
    assert [value.requires_grad for value in model.module.parameters()] == asked
    assert torch.equal(model.logits(batch), own)
    assert torch.equal(read(model, batch).logits, own)
    assert isinstance(steered, Steered)
    twin: Any = steered.plain
    shared = {value.data_ptr() for value in model.module.parameters()}
    added = [value for value in twin.module.parameters() if value.data_ptr() not in shared]
    assert sum(value.numel() for value in added) == one.n_parameters
    assert twin.fingerprint != model.fingerprint
    assert twin.fingerprint == inject(model, one).plain.fingerprint  # type: ignore[union-attr]
    assert twin.fingerprint != inject(model, one, scale=2.0).plain.fingerprint  # type: ignore[union-attr]


def test_putting_it_in_draws_nothing():
    model, one = plain(), adapter(Lora(rank=2), plain())
    state = torch.random.get_rng_state()
    inject(model, one)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_layers_of_cross_attention_are_layers_too():
    """Everywhere; in the text alone they have none."""
    model = tiny("mllama")
    batch = batch_of(model, [make_episode(2, seed=4)])
    one = adapter(Lora(rank=4, alpha=64.0, where="everywhere"), model)
    assert one.layers == list(range(model.n_layers))
    assert "1.vision.q_proj.A" in one.parameters
    assert adapter(Lora(rank=4), model).layers == [0, 2, 3, 5]
    found = inject(model, one, layers=[1]).logits(batch)
    assert moved(found, merged(model, one, layers=[1]).logits(batch)) < 1e-4
    assert moved(found, model.logits(batch)) > 1e-3


def test_adapters_that_are_off_or_in_the_weight_add_nothing():
    model = tiny("qwen2_5_vl")
    part = inject(model, adapter(Lora(rank=4), model)).plain.layers[0].self_attn.q_proj  # type: ignore[union-attr]
    own, changed = part.base_layer.weight.detach().clone(), acting_weight(part).detach()
    assert moved(own, changed) > 1e-3
    part.enable_adapters(False)
    assert torch.equal(acting_weight(part), own)
    part.enable_adapters(True)
    part.base_layer.weight = torch.nn.Parameter(own.clone())  # not the one that is shared
    part.merge()
    assert moved(acting_weight(part).detach(), changed) < 1e-6


def test_what_is_read_off_weights_is_read_off_these():
    """The direct paths of heads; an attention map's contributions, whose residual would stop the run."""
    model = tiny("qwen2_5_vl")
    one = adapter(Lora(rank=4), model)
    steered, by_hand = inject(model, one), merged(model, one)
    for layer in range(model.n_layers):
        found = steered.output_weight(layer).detach()
        assert moved(found, by_hand.output_weight(layer).detach()) < 1e-5
        assert moved(found, model.output_weight(layer).detach()) > 1e-3
        for mine, other in zip(*(head_weights(each, each.sites[layer]) for each in (steered, by_hand)), strict=True):
            assert moved(mine, other) < 1e-5
    episodes = [make_episode(2, seed=seed) for seed in (3, 4)]
    maps = [probe.attention_map(each, episodes) for each in (steered, by_hand, model)]
    for name in ("mass", "contribution"):
        first, second, other = (each[name].values for each in maps)
        assert abs(first - second)[~(first != first)].max() < 1e-4
        assert abs(first - other)[~(first != first)].max() > 1e-3


@pytest.mark.parametrize("beams", [1, 3])
def test_it_generates_as_the_model_with_these_weights(beams):
    model = tiny("qwen2_5_vl")
    prompts = model.batch([model.encode(episode) for episode in EPISODES], with_answer=False)
    one = adapter(Lora(rank=4, alpha=64.0), model)
    said = inject(model, one).generate(prompts, max_new_tokens=5, num_beams=beams)
    assert said == merged(model, one).generate(prompts, max_new_tokens=5, num_beams=beams)
    assert said != model.generate(prompts, max_new_tokens=5, num_beams=beams)


def test_it_goes_with_vectors_whichever_comes_first():
    """A vector for the given model is one for the model with adapters; two adapters are refused."""
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, EPISODES)
    lora, live = adapter(Lora(rank=4), model), vector(Live(), model)
    wanted = read(merged(model, lora), batch, edits=live.edits()).logits
    for first, second in ((lora, live), (live, lora)):
        both = inject(inject(model, first), second)
        assert moved(both.logits(batch), wanted) < 1e-4
        assert both.name.endswith(f"+ {first.label} + {second.label}")
    assert moved(inject(model, lora).logits(batch), wanted) > 1e-3
    with pytest.raises(UsageError, match="has adapters already"):
        inject(inject(model, lora), lora)
    with pytest.raises(UsageError, match="was steered"):
        Live().fit(inject(model, lora), EPISODES)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("where", ["text", "everywhere"])
def test_the_gradients_are_those_of_weights_that_are_written_out(where):
    """Of B A through W: dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, from a backward pass without PEFT."""
    model, teacher = plain(), Teacher(plain())
    lessons = teacher.lessons([make_episode(2, seed=seed) for seed in (3, 4)])
    method = Lora(rank=4, alpha=8.0, where=where)
    one = adapter(method, model)
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in one.parameters.items()}
    with frozen(model.module):
        student = method.student(model, parameters)
        losses_of(student(), lessons, teacher, method.objective)["loss"].backward()
    by_hand = merged(model, one)
    losses_of(by_hand, lessons, teacher, method.objective)["loss"].backward()
    for name, target in method.targets(model).items():
        weight: Any = by_hand.module.get_submodule(target).weight
        a, b = (one.parameters[f"{name}.{side}"] for side in ("A", "B"))
        for side, wanted in (("A", 2.0 * b.T @ weight.grad), ("B", 2.0 * weight.grad @ a.T)):
            gradient: Any = parameters[f"{name}.{side}"].grad
            assert float(wanted.abs().max()) > 0
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert all(value.grad is None for value in model.module.parameters())


def test_training_lowers_the_loss_and_touches_nothing_else():
    model = plain()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    episodes = [make_episode(1, seed=seed, images=0) for seed in range(3, 9)]
    training = Training(epochs=4, batch_size=3, validation=0.0, speed=20.0)
    found = Lora(rank=4).fit(model, episodes, training=training)
    losses = [point["loss"] for point in found.card["curve"]]
    assert losses[-1] < 0.8 * losses[0]
    assert {value.dtype for value in found.parameters.values()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    again = Lora(rank=4).fit(model, episodes, training=training)
    assert all(torch.equal(value, again.parameters[name]) for name, value in found.parameters.items())


def test_adapters_that_nothing_went_through_are_trained_on_where_they_were(tmp_path):
    """Those of the vision tower, of episodes without pictures: resumed to the same bits."""
    model = plain_of("llava")
    episodes = [make_episode(1, seed=seed, images=0) for seed in range(3, 9)]
    training = Training(epochs=2, batch_size=3, validation=0.0, speed=20.0)
    method = Lora(rank=2, where="everywhere")
    whole = method.fit(model, episodes, training=training)
    first = dataclasses.replace(training, epochs=2)
    for _ in range(2):
        found = method.fit(model, episodes, training=first, directory=tmp_path)
        assert all(torch.equal(value, whole.parameters[name]) for name, value in found.parameters.items())


@pytest.mark.parametrize("method", [Lora(rank=2), Hificl(pairs=2), I2cl()])
def test_without_a_teacher_no_demonstration_is_read(method):
    """Another method may ask for it later."""
    model = plain()
    episodes = [make_episode(1, seed=seed, images=0) for seed in range(3, 9)]
    teacher = Teacher(model)
    method.fit(model, episodes, training=Training(epochs=1, batch_size=3), teacher=teacher)
    assert teacher.n_read == 0
    assert "0 episodes read" in str(teacher)
    Live().fit(model, episodes, training=Training(epochs=1, batch_size=3), teacher=teacher)
    assert teacher.n_read == len(episodes)
    [lesson] = Teacher(model).lessons(episodes[:1], logits=False)
    with pytest.raises(ValueError, match="were not asked for"):
        losses_of(model, [lesson], teacher, Live().objective)


# ------------------------------------------------------------------------------------------------------------- storage


def test_what_is_saved_is_what_is_loaded(tmp_path):
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, EPISODES)
    one = adapter(Lora(rank=4, where="everywhere"), model)
    one.save(tmp_path)
    again = InContextVector.load(tmp_path)
    assert again.method == one.method
    assert again.layers == list(range(model.n_layers))
    assert torch.equal(inject(model, again).logits(batch), inject(model, one).logits(batch))
    with pytest.raises(UsageError, match="made for another model or revision"):
        inject(plain(), dataclasses.replace(again, card={"model": {**again.card["model"], "fingerprint": "0"}}))


def test_a_random_one_writes_as_much_elsewhere():
    one = adapter(Lora(rank=4), tiny("qwen2_5_vl"))
    other = random_like(one, seed=1)
    for name in ("0.q_proj", "3.o_proj"):
        (a, b), (c, d) = ((each.parameters[f"{name}.A"], each.parameters[f"{name}.B"]) for each in (one, other))
        assert torch.equal(a, c)
        assert moved(b @ a, d @ c) > 1e-2
        torch.testing.assert_close(torch.linalg.svdvals(d @ c), torch.linalg.svdvals(b @ a), rtol=1e-4, atol=1e-5)


def test_it_has_no_edits_and_no_heads_or_rows():
    model = tiny("qwen2_5_vl")
    one = adapter(Lora(rank=2), model)
    for edits in (one.edits, lambda: one.method.edits(one.parameters)):
        with pytest.raises(UsageError, match=r"changes weights, and has no edits; .*probe\.inject"):
            edits()
    for where in ({"heads": [(0, 0)]}, {"rows": "answer"}):
        with pytest.raises(UsageError, match="for all heads and positions; choose layers"):
            inject(model, one, **where)
    with pytest.raises(UsageError, match="does not act in layer 9; it does in 0, 1, 2, 3"):
        inject(model, one, layers=[9])
    with pytest.raises(UsageError, match="The rank of LoRA is 1 or more"):
        Lora(rank=0)
    with pytest.raises(UsageError, match="LoRA does not act 'texts'; did you mean text"):
        Lora(where="texts")  # type: ignore[arg-type]


def test_a_comparison_takes_it_like_any_vector():
    """As the model with these weights, read and generated; beside a random one."""
    model = tiny("qwen2_5_vl")
    one = adapter(Lora(rank=4, alpha=64.0), model)
    episodes = [make_episode(2, seed=seed) for seed in (3, 4, 5)]
    result = compare(model, episodes, ways_for({"lora": one}), max_new_tokens=4, distances=2)
    own, other = result.sel(way="lora"), result.sel(way="zero-shot")
    by_hand = merged(model, one)
    queries = by_hand.batch([by_hand.encode(dataclasses.replace(e, demonstrations=())) for e in episodes])
    wanted: Tensor = probe.trace.likelihood.answer_log_probability(by_hand, queries)
    assert own["log_probability"].values == pytest.approx(wanted, abs=1e-4)
    assert abs(own["log_probability"].values - other["log_probability"].values).max() > 1e-2
    assert int(own["n_parameters"]) == one.n_parameters
    assert float(own["distance"].isel(episode=0).max()) > 0
