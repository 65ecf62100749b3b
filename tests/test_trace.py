"""Reading and editing a forward, against plain transformers and plain torch hooks."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from transformers import AttentionInterface

from probe.errors import UsageError
from probe.models.load import load
from probe.trace.ablate import zero_head
from probe.trace.edit import Edit
from probe.trace.generate import generate
from probe.trace.read import noted_calls, read
from tests.tiny_qwen import make_episode, make_module, make_processor

EPISODES = [make_episode(0, seed=1), make_episode(3, seed=2, images=2), make_episode(1, seed=3, images=0)]


@pytest.fixture(scope="module")
def model():
    processor = make_processor()
    return load(make_module(processor), processor=processor)


@pytest.fixture(scope="module")
def batch(model):
    return model.batch([model.encode(episode) for episode in EPISODES])


def plain(model, batch, keep=3):
    with torch.no_grad():
        return model.module(**model.inputs(batch), logits_to_keep=keep, use_cache=False).logits


def hooked(model, batch, layer, change):
    """Logits with a plain torch hook on the heads' outputs of one layer."""

    def hook(_module, arguments):
        heads = arguments[0].unflatten(2, (model.n_heads, -1))
        return (change(heads).flatten(2),)

    handle = model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
    try:
        return plain(model, batch)
    finally:
        handle.remove()


def keep_everything(values):
    a = values.attention
    return {"q": a.q, "k": a.k, "v": a.v, "heads": values.heads}


def test_recording_changes_no_bit_of_the_logits(model, batch):
    untouched = plain(model, batch)
    idle = read(model, batch, logits_to_keep=3).logits
    recorded = read(model, batch, ("attention", "heads"), keep_everything, logits_to_keep=3).logits
    assert torch.equal(untouched, idle)
    assert torch.equal(idle, recorded)
    assert torch.equal(plain(model, batch), untouched)  # and leaves nothing behind


def test_values_are_those_of_the_model(model, batch):
    """Head outputs equal the input of the output projection as a torch hook sees it; values follow from v_proj."""
    seen = {}
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, a, i=i: seen.__setitem__((i, "z"), a[0]))
        for i, layer in enumerate(model.layers)
    ]
    handles += [
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _a, out, i=i: seen.__setitem__((i, "v"), out))
        for i, layer in enumerate(model.layers)
    ]
    plain(model, batch)
    for handle in handles:
        handle.remove()
    reading = read(model, batch, ("attention", "heads"), keep_everything)
    for i in range(model.n_layers):
        assert torch.equal(reading.layers[i]["heads"].flatten(2), seen[i, "z"])
        v = reading.layers[i]["v"].transpose(1, 2).flatten(2)
        assert torch.equal(v, seen[i, "v"])


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 3), (2, 2)])
def test_zeroing_a_head_equals_a_torch_hook(model, batch, layer, head):
    def change(heads):
        heads = heads.clone()
        heads[:, :, head] = 0
        return heads

    edited = read(model, batch, edits=[zero_head(layer, head)], logits_to_keep=3).logits
    assert torch.equal(edited, hooked(model, batch, layer, change))
    assert (edited - plain(model, batch)).abs().max() > 1e-3
    assert torch.equal(plain(model, batch), read(model, batch, logits_to_keep=3).logits)  # the edit is gone


def test_a_layer_is_read_before_its_own_edits_and_after_those_below(model, batch):
    clean = read(model, batch, ("heads",), lambda v: {"z": v.heads}).layers
    edited = read(model, batch, ("heads",), lambda v: {"z": v.heads}, edits=[zero_head(1, 0)]).layers
    assert torch.equal(clean[0]["z"], edited[0]["z"])
    assert torch.equal(clean[1]["z"], edited[1]["z"])
    assert not torch.equal(clean[2]["z"], edited[2]["z"])


def test_edits_of_one_layer_apply_in_order(model, batch):
    double = Edit("heads", 1, lambda value, context: value * 2)
    shift = Edit("heads", 1, lambda value, context: value + context.attention.scale)
    both = read(model, batch, edits=[double, shift], logits_to_keep=3).logits
    scale = model.head_dim**-0.5
    assert torch.equal(both, hooked(model, batch, 1, lambda heads: heads * 2 + scale))


def test_the_gradient_through_an_edit_equals_that_through_a_hook(model, batch):
    gain = torch.nn.Parameter(torch.linspace(0.5, 1.5, model.n_heads))
    edit = Edit("heads", 1, lambda value, context: value * gain[:, None])
    logits = read(model, batch, edits=[edit], logits_to_keep=3, gradients=True).logits
    (ours,) = torch.autograd.grad(logits.logsumexp(-1).sum(), gain)

    handle = model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _m, a: ((a[0].unflatten(2, (model.n_heads, -1)) * gain[:, None]).flatten(2),)
    )
    logits = model.module(**model.inputs(batch), logits_to_keep=3, use_cache=False).logits
    handle.remove()
    (hook,) = torch.autograd.grad(logits.logsumexp(-1).sum(), gain)
    assert torch.equal(ours, hook)
    assert ours.abs().max() > 0


def test_a_model_that_was_read_can_be_freed():
    processor = make_processor()
    model = load(make_module(processor), processor=processor)
    read(model, model.batch([model.encode(EPISODES[0])]), ("heads",), lambda v: {"z": v.heads})
    module = weakref.ref(model.module)
    del model
    gc.collect()
    assert module() is None


def test_what_notes_the_attention_calls_is_gone_afterwards(model, batch):
    """When the forward ends, when an edit fails, and when the model fails while an edit waits for its call."""
    own = AttentionInterface.get_interface
    edit = Edit("heads", 1, lambda value, context: value * context.attention.scale)
    read(model, batch, edits=[edit])
    assert AttentionInterface.get_interface is own
    prompts = model.batch([model.encode(episode) for episode in EPISODES], with_answer=False)
    generate(model, prompts, max_new_tokens=3, edits=[edit])
    assert AttentionInterface.get_interface is own

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read(model, batch, edits=[Edit("heads", 1, fail)])
    assert AttentionInterface.get_interface is own
    handle = model.layers[1].self_attn.q_proj.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        read(model, batch, edits=[edit])
    handle.remove()
    assert AttentionInterface.get_interface is own


def test_two_that_watch_at_once_each_see_their_own_and_leave_nothing(model, batch):
    """As two threads would: the first ends while the second still waits."""
    own = AttentionInterface.get_interface
    layers = [layer.self_attn for layer in model.layers[:2]]
    first, second = noted_calls(layers[0]), noted_calls(layers[1])
    noted = [first.__enter__(), second.__enter__()]
    model.logits(batch)
    first.__exit__(None, None, None)
    assert [[call[0] for call in calls] for calls in noted] == [[layers[0]], [layers[1]]]
    model.logits(batch)
    second.__exit__(None, None, None)
    model.logits(batch)
    assert [len(calls) for calls in noted] == [1, 2]
    assert AttentionInterface.get_interface is own


def test_two_models_of_one_module_agree(model, batch):
    """A model with another template wraps the same module a second time."""
    other = dataclasses.replace(model, name="other")
    first = read(model, batch, ("heads",), lambda v: {"z": v.heads}, logits_to_keep=3)
    second = read(other, batch, ("heads",), lambda v: {"z": v.heads}, edits=[zero_head(2, 1)], logits_to_keep=3)
    again = read(model, batch, ("heads",), lambda v: {"z": v.heads}, edits=[zero_head(2, 1)], logits_to_keep=3)
    assert torch.equal(first.layers[2]["z"], second.layers[2]["z"])
    assert torch.equal(second.logits, again.logits)
    assert not torch.equal(first.logits, again.logits)


def test_what_is_kept_holds_no_more_than_itself(model, batch):
    reading = read(model, batch, ("heads",), lambda v: {"z": v.heads[:, :1, 0]})
    for values in reading.layers.values():
        assert values["z"].untyped_storage().nbytes() == values["z"].nbytes


def test_an_error_in_a_reducer_leaves_the_model_usable(model, batch):
    def fail(values):
        raise KeyError("from the reducer")

    with pytest.raises(KeyError, match="from the reducer"):
        read(model, batch, ("heads",), fail)
    assert torch.equal(plain(model, batch), read(model, batch, logits_to_keep=3).logits)


def test_requests_that_make_no_sense_are_refused(model, batch):
    with pytest.raises(UsageError, match="sites and a reducer"):
        read(model, batch, ("heads",))
    with pytest.raises(UsageError, match="asked for 7"):
        read(model, batch, edits=[zero_head(7, 0)])
    with pytest.raises(UsageError, match="heads 0 to 3; asked for 4"):
        read(model, batch, edits=[zero_head(0, 4)])


def test_generation_is_greedy_whatever_the_checkpoint_says(model):
    """A repetition penalty or a temperature in the checkpoint must not change what the model answers."""
    batch = model.batch([model.encode(episode) for episode in EPISODES], with_answer=False)
    answers = generate(model, batch, max_new_tokens=6)
    module = model.module
    old = module.generation_config.to_dict()
    try:
        module.generation_config.update(do_sample=True, temperature=3.0, top_k=3, top_p=0.5, repetition_penalty=5.0)
        module.generation_config.update(no_repeat_ngram_size=1, min_new_tokens=3, suppress_tokens=[5, 6, 7])
        assert generate(model, batch, max_new_tokens=6) == answers
    finally:
        module.generation_config = type(module.generation_config).from_dict(old)
    # The same tokens by hand: the whole sequence again for every token, no cache, one episode at a time.
    for i, episode in enumerate(EPISODES):
        encoding = model.encode(episode)
        single = model.batch([encoding], with_answer=False)
        ids = single.inputs["input_ids"]
        for _ in range(6):
            inputs = {**single.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            inputs |= model.family.finish(model, dataclasses.replace(single, inputs=inputs))
            with torch.no_grad():
                best = model.module(**inputs, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], 1)
            if best.item() == model.tokenizer.eos_token_id:
                break
        text = model.tokenizer.decode(ids[0, single.length :], skip_special_tokens=True).strip()
        assert text == answers[i]
