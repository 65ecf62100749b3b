"""Edits at every site against plain torch hooks, positions, and models that stay edited."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

import probe
from probe.errors import UsageError
from probe.experiments.answering import answering
from probe.models.load import load
from probe.trace.edit import Edit
from probe.trace.generate import generate
from probe.trace.likelihood import answer_log_probability, likelihoods
from probe.trace.read import read
from probe.trace.steer import Steered, inject
from tests.tiny_families import FAMILIES, build
from tests.tiny_qwen import make_episode, make_module, make_processor

EPISODES = [make_episode(0, seed=1), make_episode(3, seed=2, images=2), make_episode(1, seed=3, images=0)]
OUTPUTS = ("attention_output", "mlp_output", "layer_output")


@pytest.fixture(scope="module")
def model():
    processor = make_processor()
    return load(make_module(processor), processor=processor)


@pytest.fixture(scope="module")
def batch(model):
    return model.batch([model.encode(episode) for episode in EPISODES])


@dataclass
class Push:
    """Adds a number to every MLP's output: the smallest thing that can be injected."""

    size: float = 0.5
    label: str = "push"
    site: str = "mlp_output"

    def check(self, model):
        pass

    def edits(self, *, scale=1.0, layers=None, heads=None, rows=None):
        def fn(value, context):
            return value + scale * self.size * torch.linspace(-1, 1, value.shape[-1])

        return [Edit(self.site, layer, fn) for layer in (layers if layers is not None else range(3))]

    def into(self, model, **where):
        return model, self.edits(**where)


def owner(layer, site):
    return {"attention_output": layer.self_attn.o_proj, "mlp_output": layer.mlp, "layer_output": layer}[site]


@pytest.mark.parametrize("site", OUTPUTS)
def test_an_edit_of_an_output_equals_a_torch_hook(model, batch, site):
    torch.manual_seed(0)
    shift = torch.randn(model.text_config.hidden_size)

    def hook(_module, _inputs, output):
        return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

    handle = owner(model.layers[1], site).register_forward_hook(hook)
    hooked = model.logits(batch, logits_to_keep=3)
    handle.remove()
    edited = read(model, batch, edits=[Edit(site, 1, lambda v, _: v + shift)], logits_to_keep=3).logits
    assert torch.equal(edited, hooked)
    assert (edited - model.logits(batch, logits_to_keep=3)).abs().max() > 1e-3


def test_outputs_are_read_as_a_torch_hook_sees_them(model, batch):
    seen = {}
    handles = [
        owner(layer, site).register_forward_hook(
            lambda _m, _i, out, at=(i, site): seen.__setitem__(at, out[0] if isinstance(out, tuple) else out)
        )
        for i, layer in enumerate(model.layers)
        for site in OUTPUTS
    ]
    model.logits(batch)
    for handle in handles:
        handle.remove()
    got = read(model, batch, OUTPUTS, lambda v: {site: getattr(v, site) for site in OUTPUTS}).layers
    for (layer, site), value in seen.items():
        assert torch.equal(got[layer][site], value), (layer, site)


def test_an_output_is_read_after_its_own_edits(model, batch):
    edit = Edit("layer_output", 0, lambda value, _: value * 0)
    got = read(model, batch, ("layer_output", "residual"), lambda v: {"o": v.layer_output, "r": v.residual}, [edit])
    assert not got.layers[0]["o"].any()
    assert torch.equal(got.layers[1]["r"], got.layers[0]["o"])


def test_attention_is_known_to_edits_of_heads_alone(model, batch):
    with pytest.raises(UsageError, match="heads only"):
        read(model, batch, edits=[Edit("mlp_output", 0, lambda value, context: value * context.attention.scale)])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_edited_at_every_output(name):
    tiny = build(name)
    model = load(tiny.module, processor=tiny.processor)
    episode = make_episode(1, seed=4)
    batch = model.batch([model.encode(episode)])
    own = model.logits(batch)
    positioned = dataclasses.replace(batch, inputs={**batch.inputs, "position_ids": model.positions(batch)})
    assert torch.allclose(model.logits(positioned), own, atol=1e-4)
    for site in OUTPUTS:
        edits = [Edit(site, layer, lambda v, _: v + 1) for layer in range(model.n_layers)]
        assert (read(model, batch, edits=edits).logits - own).abs().max() > 1e-4, site
    assert torch.equal(model.logits(batch), own)


def test_positions_are_those_that_the_model_counts_itself(model, batch):
    """With padding, an image and a text-only row; and moving them apart changes what the model says."""
    own = model.logits(batch)
    positions = model.positions(batch)
    assert positions.shape[0] == 3  # time, row, column
    same = dataclasses.replace(batch, inputs={**batch.inputs, "position_ids": positions})
    assert torch.allclose(model.logits(same), own, atol=1e-5)
    apart = positions + torch.arange(batch.length) // 5
    moved = dataclasses.replace(batch, inputs={**batch.inputs, "position_ids": apart})
    assert (model.logits(moved) - own).abs().max() > 1e-3


# --- Steered models --------------------------------------------------------------------------------------------------


def test_no_public_way_gives_an_unedited_value_and_the_original_stays(model, batch):
    prompts = model.batch([model.encode(e) for e in EPISODES], with_answer=False)
    candidates = [["a cat", "red"]] * 3
    before = model.logits(batch), model.generate(prompts, max_new_tokens=4)
    with inject(model, Push(2.0)) as steered:
        assert isinstance(steered, Steered)
        edits = Push(2.0).edits()
        by_hand = read(model, batch, edits=edits).logits
        assert (by_hand - before[0]).abs().max() > 1e-2
        said = generate(model, prompts, max_new_tokens=4, edits=edits)
        assert said != before[1]
        assert torch.equal(steered.logits(batch), by_hand)
        assert torch.equal(read(steered, batch).logits, by_hand)
        assert steered.generate(prompts, max_new_tokens=4) == said
        assert generate(steered, prompts, max_new_tokens=4) == said
        told = answer_log_probability(steered, batch)
        assert (told == answer_log_probability(model, batch, edits)).all()
        assert not (told == answer_log_probability(model, batch)).any()
        assert likelihoods(steered, EPISODES, candidates)[0].total != pytest.approx(
            likelihoods(model, EPISODES, candidates)[0].total
        )
        assert list(answering(steered, EPISODES, max_new_tokens=4).prediction.values) != list(
            answering(model, EPISODES, max_new_tokens=4).prediction.values
        )
        for run in (
            lambda: steered.module(**batch.inputs),
            lambda: steered.module.forward(**batch.inputs),
            lambda: steered.module.model(**batch.inputs),
            lambda: steered.module.model.language_model(inputs_embeds=torch.zeros(1, 2, 4)),
            lambda: steered.module.generate(**prompts.inputs),
        ):
            with pytest.raises(UsageError, match="by hand"):
                run()
        # The original, within the block and after it.
        assert torch.equal(model.logits(batch), before[0])
    assert torch.equal(model.logits(batch), before[0])
    assert model.generate(prompts, max_new_tokens=4) == before[1]


def test_injections_nest(model, batch):
    inner = inject(model, Push(0.5))
    both = inject(inner, Push(0.25))
    assert len(both.edits) == 6
    assert torch.allclose(both.logits(batch), inject(model, Push(0.75)).logits(batch), atol=1e-5)
    assert torch.equal(inner.logits(batch), inject(model, Push(0.5)).logits(batch))
    assert both.name.endswith("+ push + push")


def test_scale_and_layers_reach_the_vector(model, batch):
    assert torch.equal(inject(model, Push(), scale=0).logits(batch), model.logits(batch))
    assert [edit.layer for edit in inject(model, Push(), layers=[1]).edits] == [1]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("site", ["heads", *OUTPUTS])
def test_generation_with_a_cache_equals_reading_again(model, beams, site):
    """Padded prompts, token by token: the best continuation by a forward without a cache, edited, is what is said."""
    prompts = model.batch([model.encode(e) for e in EPISODES], with_answer=False)

    def fn(value, context):
        rows = len(context.batch)
        assert len(value) == rows == 3 * beams
        assert len(context.batch.pads) == rows
        return value + 3.0 * torch.linspace(-1, 1, value.shape[-1])

    edits = [Edit(site, layer, fn) for layer in range(model.n_layers)]
    said = generate(model, prompts, max_new_tokens=3, num_beams=beams, edits=edits)
    assert said != generate(model, prompts, max_new_tokens=3, num_beams=beams)
    if beams > 1:
        return
    for row, text in enumerate(said):
        one = model.batch([model.encode(EPISODES[row])], with_answer=False)
        inputs, ids = dict(one.inputs), []

        def again(value, _):
            return value + 3.0 * torch.linspace(-1, 1, value.shape[-1])

        again_edits = [Edit(site, layer, again) for layer in range(model.n_layers)]
        for _ in range(3):
            ids.append(
                int(read(model, dataclasses.replace(one, inputs=inputs), edits=again_edits).logits[0, -1].argmax())
            )
            token = torch.tensor([[ids[-1]]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
            if ids[-1] == model.tokenizer.eos_token_id:
                break
        assert model.tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_beams_find_what_an_exhaustive_search_over_edited_forwards_finds(model):
    """Two tokens, as many beams as words: beam search is exact, so it can be checked against all pairs."""
    episode = EPISODES[0]
    prompts = model.batch([model.encode(episode)] * 2, with_answer=False)

    def fn(value, _):
        return value + 3.0 * torch.linspace(-1, 1, value.shape[-1])

    edits = [Edit("mlp_output", 1, fn)]
    n = model.text_config.vocab_size
    one = dataclasses.replace(prompts, inputs={k: v for k, v in prompts.inputs.items()})
    first = read(model, one, edits=edits).logits[0, -1].log_softmax(-1)
    best = first.topk(min(8, n)).indices.tolist()
    eos = model.tokenizer.eos_token_id
    scores = {}
    for token in best:
        if token == eos:
            scores[(token,)] = float(first[token])
            continue
        inputs = dict(prompts.inputs)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.full((2, 1), token)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
        then = read(model, dataclasses.replace(prompts, inputs=inputs), edits=edits).logits[0, -1].log_softmax(-1)
        scores[(token, int(then.argmax()))] = float(first[token] + then.max())
    winner = max(scores, key=scores.__getitem__)
    said = generate(model, prompts, max_new_tokens=2, num_beams=8, edits=edits)
    assert said == [model.tokenizer.decode(winner, skip_special_tokens=True).strip()] * 2


def test_probe_offers_it():
    assert probe.inject is inject
