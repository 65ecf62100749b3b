"""What vectors do to a model: identities of every method, where they act, and what is stored of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import probe
from probe.data.example import Example
from probe.errors import ProbeError, UsageError
from probe.models.encoding import Batch
from probe.models.load import load
from probe.models.model import Model
from probe.segments import NEITHER, QUERY
from probe.trace.generate import generate
from probe.trace.read import read
from probe.trace.steer import inject
from probe.vectors.function_vector import FunctionVector
from probe.vectors.hificl import Hificl
from probe.vectors.i2cl import I2cl
from probe.vectors.icv import Icv
from probe.vectors.live import Live
from probe.vectors.m2iv import M2iv
from probe.vectors.mean import MeanDifference
from probe.vectors.method import Method, Trained
from probe.vectors.methods import METHODS, method_of
from probe.vectors.mimic import Mimic
from probe.vectors.mtv import Mtv
from probe.vectors.one_layer import OneLayer
from probe.vectors.pairs import alone, encode_pair
from probe.vectors.task_vector import TaskVector
from probe.vectors.teacher import Teacher
from probe.vectors.training import Training, losses_of
from probe.vectors.vector import CARD, TENSORS, InContextVector, model_facts
from tests.tiny_families import FAMILIES, build
from tests.tiny_qwen import make_episode, make_module, make_processor

EPISODES = [make_episode(0, seed=1), make_episode(3, seed=2, images=2), make_episode(1, seed=3, images=0)]
LONG = make_episode(1, seed=2, images=0)
LONG = dataclasses.replace(LONG, query=dataclasses.replace(LONG.query, answers=("a small brown cat with a long tail",)))
CROSSING = "mllama"
"""Some of its layers have no attention to the text."""

TRAINED: dict[str, Method] = {
    "live": Live(),
    "live of the MLP": Live(site="mlp_output"),
    "live of attention": Live(site="attention_output"),
    "live as released": Live(released=True),
    "mimic": Mimic(),
    "mimic, shared": Mimic(size="shared"),
    "mimic, constant": Mimic(size="constant"),
    "mimic as released": Mimic(released=True),
    "m2iv": M2iv(),
    "hificl": Hificl(),
    "hificl, added": Hificl(pairs=3, rank_k=0, rank_v=2, merge=False),
    "i2cl": I2cl(),
}
FOUND: dict[str, Method] = {"icv": Icv(strength=0.5), "mtv": Mtv()}
ONE_LAYER: dict[str, Method] = {each.name: each(layer=1) for each in (MeanDifference, TaskVector, FunctionVector)}
EVERYWHERE: dict[str, Method] = {**TRAINED, **FOUND}
ALL: dict[str, Method] = {**EVERYWHERE, **ONE_LAYER}
NOT_LINEAR = ("hificl", "hificl, added", "i2cl", *FOUND, "task-vector")
"""A scale is no factor on their vectors."""


@cache
def tiny(name: str) -> Model:
    made = build(name)
    return load(made.module, processor=made.processor)


@cache
def exact(name: str) -> Model:
    """In float64 from end to end: the norms of transformers compute in float32 whatever their input."""
    made = build(name)
    module = made.module.double()
    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = _norm(part, 1.0 if name in ("gemma3", "paligemma") else 0.0)
    return load(module, processor=made.processor)


def _norm(part: Any, offset: float) -> Any:
    epsilon = getattr(part, "variance_epsilon", None) or part.eps

    def forward(x: Tensor) -> Tensor:
        return (offset + part.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))

    return forward


def batch_of(model: Model, episodes: Any, **options: Any) -> Batch:
    """With the pictures in the model's type, as its vision tower wants them."""
    batch = model.batch([model.encode(episode) for episode in episodes], **options)
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value for name, value in batch.inputs.items()
    }
    return dataclasses.replace(batch, inputs=inputs)


def vector(method: Method, model: Any, *, seed: int = 0, size: float = 1.0) -> InContextVector:
    """Drawn at random, large enough to be seen: shifts of a fifth of what they are added to, sizes of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    spread = {"v": 0.2, "w": 0.1, "b": 1.0, "alpha": 0.5, "k": 0.5, "lambda": 0.5, "beta": 0.3, "chosen": 0.0}
    hidden, heads = model.text_config.hidden_size, (model.n_layers, model.n_heads)
    start: dict[str, Tensor] = {}
    if isinstance(method, Trained):
        start = method.start(model, generator)
    if isinstance(method, OneLayer):
        start["v"] = torch.zeros(hidden)
    elif isinstance(method, Icv):
        start["v"] = torch.zeros(model.n_layers, hidden)
    elif isinstance(method, Mtv):
        start |= {
            "v": torch.zeros(*heads, model.head_dim),
            "chosen": (torch.rand(heads, generator=generator) > 0.4) * 1.0,
        }
    elif isinstance(method, I2cl):
        start |= {name: torch.zeros(model.n_layers, hidden) for name in ("v_attention", "v_mlp")}
    parameters = {
        name: value + size * spread[name.split("_")[0]] * torch.randn(value.shape, generator=generator)
        for name, value in start.items()
    }
    if isinstance(method, Mimic) and method.size != "constant":
        parameters["b"] += 2.0  # so that mu is not near 0, for Z2 is of tens of keys
    return InContextVector(method, parameters, {"model": model_facts(model)} if isinstance(model, Model) else {})


def changed(one: InContextVector, **parameters: Any) -> InContextVector:
    """With every number of some parameters replaced."""
    filled = {name: torch.full_like(one.parameters[name], value) for name, value in parameters.items()}
    return dataclasses.replace(one, parameters={**one.parameters, **filled})


def moved(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# ------------------------------------------------------------------------------------------------------ every method


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_paired_and_every_parameter_of_every_method_gets_a_gradient(name):
    """One forward and one backward of each; in every layer, in every head."""
    model = tiny(name)
    images = 0 if name == "llava_onevision" else 1  # see below
    episodes = [make_episode(2, seed=seed, images=images) for seed in (3, 4)]
    for kind in ("live", "m2iv", "mimic", "hificl"):
        method: Any = TRAINED[kind]
        teacher = Teacher(model)
        lessons = teacher.lessons(episodes, method.objective.align_site if method.objective.align else None)
        parameters = {
            part: torch.nn.Parameter(value if kind != "hificl" else 0.1 * torch.ones_like(value))
            for part, value in method.start(model, torch.Generator().manual_seed(0)).items()
        }
        if name == CROSSING and kind in ("mimic", "hificl"):
            with pytest.raises(UsageError, match="no attention to the text"):
                losses_of(method.student(model, parameters)(), lessons, teacher, method.objective)
            continue
        terms = losses_of(method.student(model, parameters)(), lessons, teacher, method.objective)
        terms["loss"].backward()
        for part, value in parameters.items():
            assert value.grad is not None
            assert value.grad.dtype == torch.float32
            assert torch.isfinite(value.grad).all()
            # a layer and, of heads, each
            size = (
                value.grad.abs().flatten(1 + (method.name == "mimic" and part != "b"))
                if value.dim() > 1
                else value.grad
            )
            assert (size.abs().amax(-1) if value.dim() > 1 else size.abs()).min() > 0, (kind, part)


@pytest.mark.parametrize("kind", ["live", "mimic", "mimic, shared", "m2iv", "hificl"])
def test_gradients_flow_under_autocast(kind):
    model, method = tiny("qwen2_5_vl"), TRAINED[kind]
    episodes = [make_episode(2, seed=seed) for seed in (3, 4)]

    def run(autocast: bool) -> tuple[float, dict[str, Tensor]]:
        teacher = Teacher(model)
        parameters = {name: torch.nn.Parameter(value) for name, value in vector(method, model).parameters.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            lessons = teacher.lessons(episodes, "mlp_output")
            loss = losses_of(method.student(model, parameters)(), lessons, teacher, method.objective)["loss"]
        loss.backward()
        return float(loss.detach()), {name: value.grad for name, value in parameters.items()}

    (coarse, rough), (fine, sharp) = run(True), run(False)
    assert coarse == pytest.approx(fine, rel=0.05)
    assert coarse != fine
    for name, gradient in rough.items():
        assert torch.isfinite(gradient).all()
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), sharp[name].flatten(), 0)
        assert cosine > 0.9, name


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_parameters_may_be_on_any_device(monkeypatch, kind):
    """Values without storage show what would meet on two devices."""
    monkeypatch.setattr("probe.vectors.hificl.full_precision", lambda _: nullcontext())  # of no such device
    for module in ("mimic", "hificl"):
        monkeypatch.setattr(f"probe.vectors.{module}.log_partition", lambda q, *_: q.new_zeros(q.shape[:3]))
    stub = SimpleNamespace(n_layers=2, n_heads=4, head_dim=8, text_config=SimpleNamespace(hidden_size=32))
    one = vector(EVERYWHERE[kind], stub)
    there = {name: value if name == "chosen" else value.to("meta") for name, value in one.parameters.items()}
    q, k = torch.empty(1, 4, 3, 8, device="meta"), torch.empty(1, 2, 3, 8, device="meta")
    call = probe.trace.edit.Attention(0, "text", q, k, k, None, 1.0, True)
    for parameters in (there, one.parameters):
        for edit in EVERYWHERE[kind].edits(parameters, scale=0.5):
            value = torch.empty((1, 3, 4, 8) if edit.site == "heads" else (1, 3, 32), device="meta")
            if parameters is one.parameters:  # a vector stays on the CPU, and the model is elsewhere
                assert edit.fn(value, SimpleNamespace(attention=call)).device.type == "meta"
            else:
                assert edit.fn(value, SimpleNamespace(attention=call)).shape == value.shape


def test_counts_are_those_of_the_papers():
    stub: Any = SimpleNamespace(n_layers=32, n_heads=32, head_dim=128, text_config=SimpleNamespace(hidden_size=4096))
    counts = {
        kind: InContextVector(TRAINED[kind], TRAINED[kind].start(stub, torch.Generator())).n_parameters  # type: ignore[attr-defined]
        for kind in ("live", "mimic", "m2iv", "mimic, shared", "mimic, constant", "hificl")
    }
    assert counts == {
        "live": 131_104,
        "mimic": 263_168,
        "m2iv": 262_208,
        "mimic, shared": 32 * (2 * 4096 + 1),
        "mimic, constant": 131_072,
        "hificl": 2_228_224,
    }
    i2cl = vector(I2cl(), stub)
    assert i2cl.n_parameters == 262_272
    assert sum(value.numel() for value in I2cl().start(stub, torch.Generator()).values()) == 128
    assert vector(Icv(), stub).n_parameters == 131_072
    assert vector(Mtv(), stub).n_parameters == 131_072 + 32 * 32
    one = InContextVector(Live(), Live().start(stub, torch.Generator()))
    assert one.n_bytes == 4 * one.n_parameters


def test_starts_are_those_of_the_released_codes():
    stub: Any = SimpleNamespace(n_layers=32, n_heads=32, head_dim=128, text_config=SimpleNamespace(hidden_size=4096))
    live, mimic = (method.start(stub, torch.Generator().manual_seed(0)) for method in (Live(), Mimic()))
    assert float(live["v"].std()) == pytest.approx(0.01, rel=0.02)
    assert (live["alpha"] == 0.1).all()
    assert float(mimic["v"].std()) == pytest.approx(0.001, rel=0.02)
    assert float(mimic["w"].std()) == pytest.approx(0.02, rel=0.02)
    assert not mimic["b"].any()
    assert (Live().step_size("v"), Live().step_size("alpha"), Mimic().step_size("w")) == (1e-3, 1e-2, 5e-3)
    assert (Live().objective.kl, Live().objective.ce) == (1.0, 0.5)
    assert (Mimic().objective.align, Mimic().objective.ce, Mimic().objective.kl) == (1.0, 0.5, 0.0)
    again = Mimic().start(stub, torch.Generator().manual_seed(0))
    other = Mimic().start(stub, torch.Generator().manual_seed(1))
    assert all(torch.equal(again[name], mimic[name]) for name in mimic)
    assert not torch.equal(other["v"], mimic["v"])


# --------------------------------------------------------------------------------------------------- what does nothing


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vector_of_nothing_changes_nothing(name):
    """Bit for bit where zeros are added, to rounding where a norm is restored; and one of something does."""
    model = tiny(name)
    batch = batch_of(model, [make_episode(1, seed=4)])
    own = model.logits(batch, logits_to_keep=4)
    layers = sorted({site.layer for site in model.sites if site.axis == "text"})

    def logits(one: InContextVector, **options: Any) -> Tensor:
        return inject(model, one, layers=layers, **options).logits(batch, logits_to_keep=4)

    for kind in ("mimic", "mimic, constant", "mimic, shared", "m2iv"):
        one = vector(TRAINED[kind], model)
        assert moved(logits(one), own) > 1e-2, kind
        assert torch.equal(logits(one, scale=0.0), own), kind
        nothing = changed(one, v=0.0) if kind != "m2iv" else changed(one, v_attention=0.0, alpha_mlp=0.0)
        assert torch.equal(logits(nothing), own), kind
        if "b" in one.parameters:
            assert torch.equal(logits(changed(one, b=-1e9)), own), kind
    for kind in ("live", "live of the MLP"):
        one = vector(TRAINED[kind], model)
        assert moved(logits(one), own) > 1e-2
        for same in (logits(one, scale=0.0), logits(changed(one, alpha=0.0)), logits(changed(one, v=0.0))):
            assert moved(same, own) < 1e-4 * float(own.abs().max())


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in NOT_LINEAR])
def test_scale_is_a_factor_on_the_vectors(kind):
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, EPISODES)
    one = vector(ALL[kind], model)
    larger = dataclasses.replace(
        one,
        parameters={
            name: 2.5 * value if name.split("_")[0] == "v" else value for name, value in one.parameters.items()
        },
    )
    scaled = inject(model, one, scale=2.5).logits(batch)
    torch.testing.assert_close(scaled, inject(model, larger).logits(batch), rtol=0, atol=1e-4)
    assert moved(scaled, inject(model, one).logits(batch)) > 1e-3
    assert "x 2.5" in inject(model, one, scale=2.5).name


# ----------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("site", ["layer_output", "mlp_output", "attention_output"])
def test_live_keeps_norms(name, site):
    model = tiny(name)
    batch = batch_of(model, [make_episode(1, seed=4)])
    one = vector(Live(site=site), model)
    first = [edit for edit in one.edits() if edit.layer == 0]

    def at_first(edits: Any) -> Tensor:
        reading = read(model, batch, (site,), lambda values: {"x": getattr(values, site)}, edits, layers=[0])
        return reading.layers[0]["x"]

    before, after = at_first([]), at_first(first)
    assert moved(before, after) > 1e-2
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("released", [False, True])
def test_live_is_finite_where_it_cannot_keep_a_norm(released):
    """h + alpha v = 0; and where there is nothing to turn: a state of zeros, as padding may have, stays one."""
    method = Live(released=released)
    [edit] = method.edits({"v": torch.ones(1, 4), "alpha": torch.ones(1)})
    assert torch.isfinite(edit.fn(-torch.ones(1, 1, 4), None)).all()
    [nothing] = method.edits({"v": torch.ones(1, 4), "alpha": torch.ones(1)}, scale=0.0)
    zeros = torch.zeros(1, 1, 4)
    assert torch.equal(edit.fn(zeros, None), zeros)
    assert torch.equal(nothing.fn(zeros, None), zeros)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_constant_in_front_of_the_output_projection_is_its_image_behind_it(name):
    """The same as a bias of the projection, too: what merging it into the weights would be."""
    model = tiny(name)
    batch = batch_of(model, [make_episode(1, seed=4)])
    own = model.logits(batch, logits_to_keep=3)
    one = vector(Mimic(size="constant"), model)
    sites = {site.layer: model.module.get_submodule(site.attention) for site in model.sites if site.axis == "text"}
    steered = inject(model, one, layers=sorted(sites)).logits(batch, logits_to_keep=3)
    images = {layer: part.o_proj.weight @ one.parameters["v"][layer].flatten() for layer, part in sites.items()}
    behind = [
        probe.trace.edit.Edit("attention_output", layer, lambda value, _, image=image: value + image)
        for layer, image in images.items()
    ]
    bound = 2e-5 * float(own.abs().max())
    assert moved(steered, own) > 100 * bound
    assert moved(read(model, batch, edits=behind, logits_to_keep=3).logits, steered) < bound

    def biased(_module: Any, _inputs: Any, output: Tensor, image: Tensor) -> Tensor:
        return output + image

    handles = [
        part.o_proj.register_forward_hook(lambda m, i, o, image=images[layer]: biased(m, i, o, image))
        for layer, part in sites.items()
    ]
    merged = model.logits(batch, logits_to_keep=3)
    for handle in handles:
        handle.remove()
    assert moved(merged, steered) < bound


EXACT = ["qwen2_5_vl", "llava", "gemma3", "idefics"]  # rotary positions of 3 kinds; a window; a gate


def one_by_one(model: Model, batch: Batch, edits: Any) -> Tensor:
    """Logits of the answer's tokens, each read alone with the cache of what was before it."""
    from transformers import DynamicCache

    positions, n = model.positions(batch), batch.encodings[0].n_prompt
    cache = DynamicCache(config=model.text_config)
    found = []
    whole = dict(batch.inputs)
    for start, end in [(0, n), *((i, i + 1) for i in range(n, batch.length))]:
        inputs = {name: value for name, value in whole.items() if start == 0}
        for name in ("mm_token_type_ids", "token_type_ids", "image_attention_mask"):
            if name in inputs:
                inputs[name] = inputs[name][:, :n]
        inputs |= {
            "input_ids": whole["input_ids"][:, start:end],
            "attention_mask": torch.ones(1, end, dtype=torch.long),
        }
        inputs |= {"position_ids": positions[..., start:end], "past_key_values": cache}
        found.append(read(model, dataclasses.replace(batch, inputs=inputs), edits=edits).logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("name", EXACT[:3])
@pytest.mark.parametrize(
    "kind", ["live", "m2iv", "mimic", "mimic, shared", "mimic as released", "hificl", "i2cl", "icv"]
)
def test_token_by_token_with_a_cache_is_the_same_as_all_at_once(name, kind):
    """To 1e-12 in float64. The released MimIC sums over keys that a cache does not have yet."""
    model = exact(name)
    batch = batch_of(model, [LONG])
    n_answer = batch.length - batch.encodings[0].n_prompt
    assert n_answer > 2
    one = vector(EVERYWHERE[kind], model, size=3.0)
    both = read(model, batch, edits=one.edits(), logits_to_keep=n_answer + 1).logits[0]
    assert moved(both, model.logits(batch, logits_to_keep=n_answer + 1)[0]) > 1e-2
    apart = moved(one_by_one(model, batch, one.edits()), both)
    if kind == "mimic as released":
        assert apart > 1e-4
    else:
        assert apart < 1e-12 * float(both.abs().max())


@pytest.mark.parametrize("name", EXACT)
def test_a_later_token_does_not_reach_back(name):
    """Exactly; in the released MimIC it does."""
    model = exact(name)
    batch = batch_of(model, [make_episode(1, seed=2, images=0)])
    other = dict(batch.inputs)
    other["input_ids"] = other["input_ids"].clone()
    other["input_ids"][0, -1] = other["input_ids"][0, -2]
    swapped = dataclasses.replace(batch, inputs=other)
    for kind, method in EVERYWHERE.items():
        edits = vector(method, model).edits()
        one, two = (read(model, each, edits=edits, logits_to_keep=4).logits[0] for each in (batch, swapped))
        assert moved(one[-1], two[-1]) > 1e-3
        if kind == "mimic as released":
            assert moved(one[:-1], two[:-1]) > 1e-6
        else:
            assert torch.equal(one[:-1], two[:-1]), kind


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_queries_are_the_same_alone_padded_and_generated(name, images):
    """Behind the rotary embedding, which tells absolute positions to whatever reads them; to 1e-13 in float64."""
    model = exact(name)
    episodes = [make_episode(shots, seed=shots + 2, images=images) for shots in (1, 3)]
    if name == CROSSING and images:  # whose batches want equally many images
        episodes[0] = make_episode(3, seed=7, images=1)
        episodes[0] = dataclasses.replace(episodes[0], query=dataclasses.replace(episodes[0].query, question="Which?"))
    batch, single = (batch_of(model, some, with_answer=False) for some in (episodes, episodes[:1]))
    assert batch.pads[0] > 0
    seen: dict[tuple[str, int], Tensor] = {}

    def note(where: str) -> list[Any]:
        def fn(value: Tensor, context: Any) -> Tensor:
            seen[where, context.step] = context.attention.q[0, :, -3:].clone()
            return value

        return [probe.trace.edit.Edit("heads", 0, fn)]

    for where, given in (("padded", batch), ("alone", single)):
        read(model, given, edits=note(f"{where}, read"))
        generate(model, given, max_new_tokens=3, stop=False, edits=note(f"{where}, generated"))
    for step in range(3):
        assert moved(seen["padded, generated", step], seen["alone, generated", step]) < 1e-13
    for where in ("padded", "alone"):
        assert moved(seen[f"{where}, read", 0], seen["alone, generated", 0]) < 1e-13
    assert moved(seen["alone, generated", 1], seen["alone, generated", 0]) > 1e-3


@pytest.mark.parametrize("name", EXACT)
def test_padding_does_not_matter(name):
    """To 1e-12 in float64, for the padded ones of a batch; in the released MimIC it does."""
    model = exact(name)
    episodes = [make_episode(shots, seed=shots + 2, images=0) for shots in (1, 3)]
    batch = batch_of(model, episodes)
    assert batch.pads[0] > 10
    alone_ = batch_of(model, episodes[:1])
    for kind, method in EVERYWHERE.items():
        edits = vector(method, model).edits()
        padded, plain = (read(model, each, edits=edits).logits[0] for each in (batch, alone_))
        if kind == "mimic as released":
            assert moved(padded, plain) > 1e-4
        else:
            assert moved(padded, plain) < 1e-12 * float(plain.abs().max()), kind


def test_what_is_added_commutes_and_what_is_turned_does_not():
    model = exact("qwen2_5_vl")
    batch = batch_of(model, [make_episode(1, seed=2, images=0)])
    for kind in ("m2iv", "mimic", "mimic, constant", "mean-difference", "live"):
        first, second = (vector(ALL[kind], model, seed=seed) for seed in (1, 2))
        one = inject(inject(model, first), second).logits(batch)
        two = inject(inject(model, second), first).logits(batch)
        assert moved(one, inject(model, first).logits(batch)) > 1e-3
        if kind == "live":
            assert moved(one, two) > 1e-4
        else:
            assert moved(one, two) < 1e-12 * float(one.abs().max()), kind


# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", [*(kind for kind in EVERYWHERE if kind != "mimic as released"), "answer rows"])
def test_generation_with_a_cache_equals_reading_again(kind):
    """Greedy, a padded batch, token by token against forwards of everything so far, one episode at a time."""
    model = tiny("qwen2_5_vl")
    one = vector(EVERYWHERE["mimic" if kind == "answer rows" else kind], model, size=3.0)
    edits = one.edits(rows="answer" if kind == "answer rows" else None)
    prompts = model.batch([model.encode(episode) for episode in EPISODES], with_answer=False)
    said = generate(model, prompts, max_new_tokens=5, edits=edits)
    assert said != model.generate(prompts, max_new_tokens=5)
    for row, episode in enumerate(EPISODES):
        single = model.batch([model.encode(episode)], with_answer=False)
        grown, ids = single, []
        for _ in range(5):
            # What a generated position is to ``rows`` is one of the answer, as in an episode whose answer it is.
            ids.append(int(read(model, grown, edits=edits_of(one, kind, len(ids), single)).logits[0, -1].argmax()))
            if ids[-1] == model.tokenizer.eos_token_id:
                break
            inputs = dict(grown.inputs)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[ids[-1]]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
            grown = dataclasses.replace(grown, inputs=inputs)
        assert model.tokenizer.decode(ids, skip_special_tokens=True).strip() == said[row]


def edits_of(one: InContextVector, kind: str, n: int, single: Batch) -> list[Any]:
    """The same edits; of the rows from the last of the prompt on, by hand."""
    if kind not in ("answer rows", "mtv"):
        return one.edits()
    begin = single.length - 1

    def late(edit: Any) -> Any:
        def fn(value: Tensor, context: Any) -> Tensor:
            return torch.cat([value[:, :begin], edit.fn(value, context)[:, begin:]], 1)

        return dataclasses.replace(edit, fn=fn)

    return [late(edit) for edit in one.edits(rows="all")]


@pytest.mark.parametrize("kind", ["live", "mimic", "m2iv", "hificl", "mean-difference", "task-vector"])
def test_beams_run_and_one_beam_is_greedy(kind):
    model = tiny("qwen2_5_vl")
    prompts = model.batch([model.encode(episode) for episode in EPISODES], with_answer=False)
    steered = inject(model, vector(ALL[kind], model, size=5.0))
    beams = steered.generate(prompts, max_new_tokens=4, num_beams=3)
    assert len(beams) == len(EPISODES)
    assert beams != model.generate(prompts, max_new_tokens=4, num_beams=3)


# -------------------------------------------------------------------------------------------------------- where it acts


def hooked(model: Model, batch: Batch, hooks: Any) -> Tensor:
    """Logits with plain torch hooks: (module, whether before it, change of the value)."""
    handles = []
    for part, before, change in hooks:
        if before:
            handles.append(part.register_forward_pre_hook(lambda _m, a, f=change: (f(a[0]),)))
        else:
            handles.append(
                part.register_forward_hook(
                    lambda _m, _a, o, f=change: (f(o[0]), *o[1:]) if isinstance(o, tuple) else f(o)
                )
            )
    try:
        return model.logits(batch, logits_to_keep=4)
    finally:
        for handle in handles:
            handle.remove()


def test_heads_and_layers_are_these_alone():
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, EPISODES)
    one = vector(Mimic(size="constant"), model)
    heads = [(1, 2), (2, 0), (2, 3)]

    def change(layer: int) -> Any:
        def run(value: Tensor) -> Tensor:
            value = value.unflatten(2, (model.n_heads, -1)).clone()
            for at, head in heads:
                if at == layer:
                    value[:, :, head] += one.parameters["v"][layer, head]
            return value.flatten(2)

        return run

    by_hand = hooked(model, batch, [(model.layers[layer].self_attn.o_proj, True, change(layer)) for layer in (1, 2)])
    found = inject(model, one, heads=heads)
    assert torch.equal(found.logits(batch, logits_to_keep=4), by_hand)
    assert [edit.layer for edit in found.edits] == [1, 2]
    # One of the layers of these heads.
    by_hand = hooked(model, batch, [(model.layers[2].self_attn.o_proj, True, change(2))])
    assert torch.equal(inject(model, one, heads=heads, layers=[2]).logits(batch, logits_to_keep=4), by_hand)

    both = vector(M2iv(), model)
    shift = {
        name: both.parameters[f"alpha_{name}"][1] * both.parameters[f"v_{name}"][1] for name in ("attention", "mlp")
    }
    block: Any = model.layers[1]
    hooks = [
        (block.self_attn.o_proj, False, lambda value: value + shift["attention"]),
        (block.mlp, False, lambda value: value + shift["mlp"]),
    ]
    assert torch.equal(inject(model, both, layers=[1]).logits(batch, logits_to_keep=4), hooked(model, batch, hooks))


@pytest.mark.parametrize("rows", ["all", "answer", "first", "query/image", "demos+query/question", None])
def test_rows_are_these_alone(rows):
    """In a padded batch, by what the encodings say of their positions."""
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, EPISODES)
    chosen = torch.zeros(len(batch), batch.length, dtype=torch.bool)
    for row, encoding, pad in zip(chosen, batch.encodings, batch.pads, strict=True):
        tokens = encoding.token_map
        places: Any = {
            "all": range(-pad, len(tokens)),
            "answer": tokens.answer - 1,
            "first": tokens.answer[:1] - 1,
            None: tokens.answer[:1] - 1,  # as the method has it
            "query/image": tokens.where("image", QUERY),
            "demos+query/question": [
                *(i for i in range(len(tokens)) if tokens.demonstration[i] >= 0),
                *tokens.where("question", QUERY),
            ],
        }[rows]
        row[[int(place) + pad for place in places]] = True
    one = vector(MeanDifference(layer=1), model, size=5.0)

    def change(value: Tensor) -> Tensor:
        return value + chosen[..., None] * one.parameters["v"]

    found = inject(model, one, rows=rows).logits(batch, logits_to_keep=4)
    torch.testing.assert_close(found, hooked(model, batch, [(model.layers[1], False, change)]), rtol=0, atol=1e-6)
    assert moved(found, model.logits(batch, logits_to_keep=4)) > 1e-3


def test_the_first_row_is_not_generated_and_the_answer_is():
    """The mean difference acts once; asked to act on the answer, in every step."""
    model = tiny("qwen2_5_vl")
    prompts = model.batch([model.encode(EPISODES[0])], with_answer=False)
    steps: list[tuple[int, bool]] = []
    [edit] = vector(MeanDifference(layer=1), model, size=5.0).edits()

    def fn(value: Tensor, context: Any) -> Tensor:
        found = edit.fn(value, context)
        steps.append((context.step, not torch.equal(found, value)))
        return found

    generate(model, prompts, max_new_tokens=3, edits=[dataclasses.replace(edit, fn=fn)])
    assert steps[0] == (0, True)
    assert len(steps) > 1
    assert not any(acts for _, acts in steps[1:])


def test_places_that_do_not_exist_are_refused():
    model = tiny("qwen2_5_vl")
    mimic, live = vector(Mimic(), model), vector(Live(), model)
    last = model.n_layers - 1
    for layers in ([model.n_layers], [-1], [0, 99]):
        with pytest.raises(UsageError, match=rf"does not act in layer (-1|99|{model.n_layers}); it does in 0, 1"):
            inject(model, live, layers=layers)
    for heads in ([(0, 4)], [(-1, 0)], [(0, -1)], [(0, 0), (last + 1, 0)]):
        with pytest.raises(UsageError, match=f"layers 0 to {last} with heads 0 to 3; asked for"):
            inject(model, mimic, heads=heads)
    for one in (live, *(vector(method, model) for method in (M2iv(), I2cl(), Icv(), *ONE_LAYER.values()))):
        with pytest.raises(UsageError, match="whole layers, not on single heads"):
            inject(model, one, heads=[(0, 0)])
    with pytest.raises(UsageError, match="does not act in layer 2; it does in 0"):
        inject(model, mimic, heads=[(0, 0)], layers=[2])
    for what in ("layer", "head"):
        with pytest.raises(UsageError, match=f"is to act in no {what};"):
            inject(model, mimic, **{f"{what}s": []})
    with pytest.raises(UsageError, match="no tokens 'nowhere'"):
        inject(model, live, rows="nowhere")


# ---------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_student_reads_the_teachers_tokens_but_for_the_demonstrations(name, images):
    """In every family with its own template, or its family's format where it has none."""
    model, episode = tiny(name), make_episode(2, seed=3, images=images)
    if name == "llava_onevision" and images == 1:  # it cuts a single image into tiles, and several not
        with pytest.raises(ProbeError, match=r"Episode episode3: .* other tokens, not just fewer"):
            encode_pair(model, episode)
        return
    pair = encode_pair(model, episode)
    teacher, student = pair.teacher, pair.student
    assert len(pair.kept) == len(student)
    assert torch.equal(teacher.ids[torch.from_numpy(pair.kept)], student.ids)
    assert (pair.kept[1:] > pair.kept[:-1]).all()
    # The last tokens are the query's own, and of the same role; the sink is the only place that may move.
    n = len(pair.query)
    assert (pair.kept[pair.query] == range(len(teacher) - n, len(teacher))).all()
    assert (teacher.token_map.role[pair.kept[pair.query]] == student.token_map.role[pair.query]).all()
    assert set(student.token_map.demonstration[: len(student) - n]) == {NEITHER}
    assert teacher.ids[teacher.n_prompt :].tolist() == student.ids[student.n_prompt :].tolist()
    # What ends an answer stands behind every demonstration's.
    for shot in range(2):
        assert int(teacher.ids[teacher.token_map.where("answer", shot)[-1] + 1]) == pair.end
    ends = {"idefics": "\n", "paligemma": "\n", "gemma3": "<end_of_turn>"}
    assert model.tokenizer.decode([pair.end]) == ends.get(name, model.tokenizer.decode([pair.end]))
    if name not in ends:
        assert pair.end in model.tokenizer.all_special_ids


SEEN = (
    "{% set seen = namespace(images=false) %}{% for message in messages %}{% for part in message['content'] "
    "if part['type'] == 'image' %}{% set seen.images = true %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("You are a helpful", "You are a {% if seen.images %}helpful{% else %}small{% endif %}"),
        ("You are", "{% if seen.images %}You are{% endif %}"),
        # One more at the beginning, but not the first token of a turn, which may be left out.
        (
            "{% for message in messages %}{% if",
            "{% if seen.images %}<|im_end|>{% endif %}{% for message in messages %}{% if",
        ),
    ],
)
def test_a_template_that_writes_a_query_alone_otherwise_is_refused(old, new):
    """Here by whether a picture is seen, as Mllama's does: as many tokens and others, or fewer."""
    processor = make_processor()
    assert old in processor.chat_template
    processor.chat_template = SEEN + processor.chat_template.replace(old, new)
    model = load(make_module(processor), processor=processor)
    encode_pair(model, make_episode(2, seed=3))
    for each in (model, tiny("mllama")):
        with pytest.raises(ProbeError, match=r"Episode episode3: without its demonstrations .* other tokens, not just"):
            encode_pair(each, bare(make_episode(2, seed=3)))


def bare(episode: Any) -> Any:
    """With a query that shows nothing."""
    return dataclasses.replace(episode, query=Example("bare", (), "What colour is the cat?", ("red",)))


def test_a_query_without_a_picture_has_a_pair_too():
    model = tiny("qwen2_5_vl")
    pair = encode_pair(model, bare(make_episode(2, seed=3)))
    assert pair.teacher.images
    assert not pair.student.images
    assert torch.equal(pair.teacher.ids[torch.from_numpy(pair.kept)], pair.student.ids)


def test_layers_that_do_not_run_without_a_picture_have_no_states():
    """Those of cross-attention alone: a sentence, wherever states of all layers are wanted."""
    model = tiny(CROSSING)
    episodes = [make_episode(2, seed=seed, images=0) for seed in (3, 4, 5)]
    options = Training(epochs=1, batch_size=2)
    for method in (M2iv(), MeanDifference(layer=0)):
        with pytest.raises(UsageError, match=r"Without an image .* leaves out its layers 1, 4"):
            method.fit(model, episodes, training=options)
    Live().fit(model, episodes, training=options)


def test_episodes_without_demonstrations_are_refused():
    model = tiny("qwen2_5_vl")
    with pytest.raises(UsageError, match="Episode episode1 has no demonstrations"):
        encode_pair(model, EPISODES[0])
    for method in (Mimic(), MeanDifference()):
        with pytest.raises(UsageError, match="no demonstrations"):
            method.fit(model, [make_episode(1, seed=5), EPISODES[0]], training=Training(epochs=1, validation=0.5))


def test_alone_is_the_query():
    episode = dataclasses.replace(make_episode(2, seed=2), perturbations=("shuffle",))
    assert alone(episode).examples == (episode.query,)
    assert alone(episode).perturbations == ()


# -------------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("kind", ALL)
def test_what_is_saved_is_what_is_loaded(tmp_path, kind):
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, EPISODES)
    one = vector(ALL[kind], model)
    one.save(tmp_path / "v")
    again = InContextVector.load(tmp_path / "v")
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == [CARD, TENSORS]
    assert again.method == one.method
    assert again.label == one.label
    assert torch.equal(inject(model, again).logits(batch), inject(model, one).logits(batch))
    assert again.card["model"] == one.card["model"]
    card = json.loads((tmp_path / "v" / CARD).read_text())
    assert card["stamp"]["probe_version"]
    assert card["tensors"] == hashlib.sha256((tmp_path / "v" / TENSORS).read_bytes()).hexdigest()
    # A vector that was loaded can be stored again, and has the same content.
    again.save(tmp_path / "w")
    assert (tmp_path / "w" / TENSORS).read_bytes() == (tmp_path / "v" / TENSORS).read_bytes()
    assert InContextVector.load(tmp_path / "w").method == one.method


def test_a_card_cannot_say_what_it_is_not(tmp_path):
    one = InContextVector(Live(), vector(Live(), tiny("qwen2_5_vl")).parameters, {"method": "mimic", "tensors": "0"})
    one.save(tmp_path)
    assert InContextVector.load(tmp_path).method == Live()


@pytest.fixture
def stored(tmp_path):
    vector(Live(), tiny("qwen2_5_vl")).save(tmp_path)
    return tmp_path


def edited_card(directory: Any, **entries: Any) -> None:
    card = json.loads((directory / CARD).read_text())
    (directory / CARD).write_text(json.dumps({**card, **entries}))


def test_pickles_and_single_files_are_never_opened(stored):
    for name in ("icv.pt", "vector.pkl", TENSORS):
        file = stored / name
        if not file.exists():
            torch.save({"v": 1}, file)
        with pytest.raises(ProbeError, match="is a file, and a vector is a directory"):
            InContextVector.load(file)


def test_what_is_missing_or_damaged_is_a_sentence(stored, tmp_path):
    with pytest.raises(ProbeError, match=r"There is no vector in .*card\.json is missing"):
        InContextVector.load(tmp_path / "elsewhere")
    data = (stored / TENSORS).read_bytes()
    (stored / TENSORS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ProbeError, match=r"is not the file that card\.json was written for"):
        InContextVector.load(stored)
    (stored / TENSORS).write_bytes(b"no tensors")
    edited_card(stored, tensors=hashlib.sha256(b"no tensors").hexdigest())
    with pytest.raises(ProbeError, match="cannot be read"):
        InContextVector.load(stored)
    (stored / TENSORS).unlink()
    with pytest.raises(ProbeError, match=r"vector\.safetensors is missing"):
        InContextVector.load(stored)
    for text in ("{", "[]", "3", '{"method": "live"}', "\udcff"):
        (stored / TENSORS).write_bytes(data)
        (stored / CARD).write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ProbeError, match="cannot be read"):
            InContextVector.load(stored)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"method": "lief"}, "There is no method 'lief'; did you mean live"),
        ({"method": 3}, "cannot be read"),
        ({"options": {"sight": "mlp_output"}}, "live has no option 'sight'; did you mean site"),
        ({"options": {"site": "mlp_outputs"}}, "There is no site 'mlp_outputs' here; did you mean mlp_output"),
        ({"options": {"site": 3}}, "option site of live cannot be 3"),
        ({"options": {"alpha": "x"}}, "option alpha of live cannot be 'x'"),
        ({"options": {"alpha": True}}, "option alpha of live cannot be True"),
        ({"options": {"kl": float("nan")}}, "option kl of live cannot be nan"),
        ({"options": {"released": 1}}, "option released of live cannot be 1"),
        ({"options": [1]}, "cannot be read"),
        ({"method": "mimic", "options": {"size": 2}}, "option size of mimic cannot be 2"),
        ({"method": "mimic", "options": {"size": "heads"}}, "There is no size 'heads' of MimIC; did you mean head"),
        ({"method": "mimic", "options": {}}, "cannot be read"),  # the tensors are those of LIVE
        ({"method": "mean-difference", "options": {"layer": 1.5}}, "option layer of mean-difference cannot be 1.5"),
        ({"model": 3}, "cannot be read"),
    ],
)
def test_a_card_that_was_edited_by_hand_is_a_sentence(stored, entries, match):
    edited_card(stored, **entries)
    with pytest.raises(ProbeError, match=match):
        InContextVector.load(stored)


def test_numbers_of_a_card_may_be_whole(stored):
    edited_card(stored, options={"alpha": 1})
    assert InContextVector.load(stored).method == Live(alpha=1)


def test_options_of_all_methods_are_read_back():
    for name, method in METHODS.items():
        assert method_of(name) == method()
        assert method_of(name, dataclasses.asdict(method())) == method()
    assert Mimic(released=True, align=2.0).label == "mimic align=2.0 released=True"
    assert Live().label == "live"


# ------------------------------------------------------------------------------------------------------ the right model


def test_another_model_is_refused():
    """Other weights, another template; the same model is not, and neither is one that the card says nothing of."""
    model = tiny("qwen2_5_vl")
    one = vector(Live(), model)
    one.check(model)
    inject(inject(model, one), one)
    made = build("qwen2_5_vl", seed=1)
    other = load(made.module, processor=made.processor)
    with pytest.raises(UsageError, match="The vector live was made for another model or revision"):
        inject(other, one)
    revised = dataclasses.replace(model, fingerprint="0" * 16)
    with pytest.raises(UsageError, match=r"another model or revision .*load the model that it was made for"):
        one.check(revised)
    written = dataclasses.replace(model, chat_template=model.chat_template + " ")
    with pytest.raises(UsageError, match="another template of the prompt"):
        inject(written, one)
    for fact, words in (("layers", "number of layers"), ("hidden", "width"), ("head_dim", "width of heads")):
        card = {"model": {**one.card["model"], fact: 7}}
        with pytest.raises(UsageError, match=f"made for another {words} .7."):
            dataclasses.replace(one, card=card).check(model)
    dataclasses.replace(one, card={}).check(model)


def test_mimic_is_refused_where_layers_have_no_heads_to_act_on_before_anything_is_read(monkeypatch):
    crossing = tiny(CROSSING)
    monkeypatch.setattr(Teacher, "lessons", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UsageError, match="cross-attention alone"):
        Mimic().fit(crossing, [make_episode(1, seed=9)] * 5)


def test_a_mean_difference_is_not_fitted_to_a_steered_model():
    model = tiny("qwen2_5_vl")
    vector = InContextVector(Live(), Live().start(model, torch.Generator().manual_seed(0)))
    with pytest.raises(UsageError, match="was steered"):
        MeanDifference(layer=0).fit(probe.inject(model, vector), [make_episode(1, seed=9)] * 5)
