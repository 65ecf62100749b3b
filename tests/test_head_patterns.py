"""Pattern scores and copying: heads built by hand, plain loops over eager attention, and explicit matrices."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch

import probe
from probe.errors import UsageError
from probe.experiments import repeats
from probe.experiments.ov_copying import ov_copying
from probe.experiments.repeats import Repeat, opening_token, plain_tokens, repeated_images, repeated_tokens
from probe.measures.head_patterns import PATTERNS, attention_to, mean_over_rows, repeat_keys
from probe.models.load import load
from probe.toy.architecture import seed_look_back
from tests.tiny_families import build
from tests.tiny_qwen import make_module, make_processor

S = 20
EXACT = 2e-5  # two kernels in float32
SCORES = (*PATTERNS, "duplicate_shuffled", "induction_shuffled")


@cache
def models(kind):
    """The same weights twice: with the kernel that users run, and eager."""
    made, eager = build(kind), build(kind, attn="eager")
    return load(made.module, processor=made.processor), load(eager.module, processor=eager.processor)


def means(result):
    return {name: result[name].mean("sequence").values for name in SCORES}


# --- The measures by themselves --------------------------------------------------------------------------------------


def test_keys_of_a_sequence_without_a_gap():
    rows, keys = repeat_keys(torch.arange(1, 6), torch.arange(6, 11))
    assert rows.tolist() == list(range(1, 11))
    assert keys[:, 0, 0].tolist() == [-1, *range(1, 10)]  # what stands before the first is none of them
    assert keys[5:, 1, 0].tolist() == [q - 5 for q in range(6, 11)]
    assert keys[5:, 2, 0].tolist() == [q - 5 + 1 for q in range(6, 11)]
    assert (keys[:5, 1:] == -1).all()


def test_keys_of_a_sequence_with_gaps():
    """Two pictures of two tokens, shown twice, each with text around it."""
    rows, keys = repeat_keys(torch.tensor([3, 4, 8, 9]), torch.tensor([13, 14, 18, 19]))
    assert rows.tolist() == [3, 4, 8, 9, 13, 14, 18, 19]
    assert keys[:, 0, 0].tolist() == [-1, 3, -1, 8, -1, 13, -1, 18]
    assert keys[4:, 1, 0].tolist() == [3, 4, 8, 9]
    assert keys[4:, 2, 0].tolist() == [4, 8, 9, 13]


def test_a_token_that_is_neither_row_nor_key():
    """The first of a prompt that begins with an image."""
    rows, keys = repeat_keys(torch.tensor([-1, 1, 2]), torch.tensor([5, 6, 7]))
    assert rows.tolist() == [1, 2, 5, 6, 7]
    assert keys[..., 0].tolist() == [[-1, -1, -1], [1, -1, -1], [-1, -1, 1], [5, 1, 2], [6, 2, 5]]


def test_attention_is_summed_over_keys_and_averaged_over_rows():
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 0.0, 0.0]])[None, None]
    keys = torch.tensor([[[0, 2], [-1, -1], [-1, -1]], [[3, -1], [0, -1], [-1, -1]], [[-1, -1], [1, 0], [-1, -1]]])[
        None
    ]
    paid = attention_to(attention, keys)
    nan = float("nan")
    expected = torch.tensor([[0.4, nan, nan], [0.1, 0.4, nan], [nan, 1.0, nan]])[None, None]
    torch.testing.assert_close(paid, expected, equal_nan=True)
    torch.testing.assert_close(mean_over_rows(paid), torch.tensor([[[0.25, 0.7, nan]]]), equal_nan=True)


# --- A model built by hand -------------------------------------------------------------------------------------------

CODE, BEFORE = slice(0, 40), slice(40, 80)  # of the residual stream: a token's code, and that of the one before it
WIDTH, TURNING = 64, 12  # of a head; how many of its rotary frequencies turn within such a sequence
STILL = [*range(TURNING, 32), *range(32 + TURNING, 64)]  # the dimensions that hardly turn


@cache
def by_hand():
    """Head 0.0 looks one back and writes what it sees as BEFORE; layer 1 has an induction head that copies (0), a head
    that writes the opposite (1), one that finds the same token (2), and one that looks S - 1 back (3).
    """
    processor = make_processor()
    rope = {"rope_type": "default", "rope_theta": 1e12, "mrope_section": [TURNING, 10, 10]}
    module = make_module(processor, std=0.01, hidden_size=256, num_hidden_layers=2, rope_parameters=rope)
    text, identity = module.model.language_model, torch.eye(40)
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            if name.endswith("bias") or "down_proj" in name:
                parameter.zero_()
        codes = torch.nn.functional.normalize(torch.randn(len(text.embed_tokens.weight), 40), dim=-1)
        text.embed_tokens.weight.normal_(0, 0.01)[:, CODE] = codes
        module.lm_head.weight.copy_(text.embed_tokens.weight)
        first, second = (layer.self_attn for layer in text.layers)
        by_head = {
            (name, i): getattr(attention, f"{name}_proj").weight.data.view(-1, WIDTH, 256)
            for name in "qkv"
            for i, attention in enumerate((first, second))
        }
        by_head["v", 0][0, :40, CODE] = identity / 16  # the norm makes a code 16 long
        first.o_proj.weight[BEFORE, :40] = identity
        by_head["q", 1][0][STILL, CODE] = 4 * identity
        by_head["k", 1][0][STILL, BEFORE] = 4 * identity
        by_head["v", 1][0][:40, CODE] = identity / 16
        second.o_proj.weight[CODE, :40] = identity
        second.o_proj.weight[CODE, WIDTH : WIDTH + 40] = -identity
        by_head["q", 1][2][STILL, CODE] = 4 * identity
        by_head["k", 1][1][STILL, CODE] = 4 * identity
        seed_look_back(module, {(0, 0): 1, (1, 3): S - 1}, 16.0)
    return load(module, processor=processor)


def test_planted_heads_are_found():
    result = repeated_tokens(by_hand(), length=S, n=8)
    found = means(result)
    planted = {"previous_token": (0, 0), "induction": (1, 0), "duplicate_token": (1, 2)}
    assert found["previous_token"][0, 0] > 0.9
    assert found["induction"][1, 0] > 0.9
    assert found["duplicate_token"][1, 2] > 0.35  # about half is on the row's own token
    for name, place in planted.items():
        others = np.ones((2, 4), bool)
        others[place] = others[1, 3] = False
        assert found[name][others].max() < 0.2, name


def test_a_shuffle_tells_content_from_distance():
    found = means(repeated_tokens(by_hand(), length=S, n=8))
    assert 0 <= found["induction_shuffled"][1, 0] < 3 / S
    assert 0 <= found["duplicate_shuffled"][1, 2] < 3 / S
    assert found["induction"][1, 3] > 0.9  # it looks as far back as an induction head would
    assert found["induction_shuffled"][1, 3] > 0.9
    even = np.mean([1 / (q + 1) for q in range(S + 1, 2 * S + 1)])
    assert found["induction_shuffled"][0, 2] == pytest.approx(even, abs=0.01)  # a head of noise


def test_planted_copying_is_found():
    result = ov_copying(by_hand())
    scores, null = result["ov_copying"].values, result["ov_copying_null"].values
    assert scores[1, 0] > 0.9
    assert scores[1, 1] < -0.9  # shares the values of head 0, and writes the opposite
    others = np.ones((2, 4), bool)
    others[1, :2] = False
    assert abs(scores[others]).max() < 0.4
    assert null.shape == (5, 2, 4)
    assert abs(null).max() < 0.5


# --- Against plain loops over eager attention ------------------------------------------------------------------------


def record(monkeypatch):
    """What is read from now on: a list of batches, in turn as they are and shuffled."""
    units, read_repeats = [], repeats.read_repeats
    monkeypatch.setattr(repeats, "read_repeats", lambda model, unit: units.append(unit) or read_repeats(model, unit))
    return units


def eager_weights(model, encoding):
    """``[layer, head, query, key]`` of every self-attention, as transformers' eager kernel gives them."""
    seen = []
    handles = [
        model.module.get_submodule(site.attention).register_forward_hook(lambda _m, _a, out: seen.append(out[1][0]))
        for site in model.sites
        if site.axis == "text"
    ]
    with torch.no_grad():
        model.module(**model.batch([encoding]).inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def loop(weights, places):
    """Scores ``[pattern, layer, head]``, from the places of the tokens of the first copy and then the second."""
    half, at = len(places) // 2, weights.permute(2, 3, 0, 1)
    previous = [at[q, q - 1] for q in places if q >= 0 and q - 1 >= 0 and q - 1 in places]
    duplicate = [at[places[half + j], places[j]] for j in range(half) if places[j] >= 0]
    induction = [at[places[half + j], places[j + 1]] for j in range(half)]
    return torch.stack([sum(found) / len(found) for found in (previous, duplicate, induction)]).numpy()


def image_places(encoding):
    """In reading order; -1 for the sink, if it is an image token."""
    places = encoding.token_map.where("image").tolist()
    return [-1] * (len(places) % 2) + places


def agree(result, units, eager, places_of):
    for number in range(result.sizes["sequence"]):
        for shuffled in (0, 1):
            (repeat,) = units[2 * number + shuffled]
            expected = loop(eager_weights(eager, repeat.encoding), places_of(repeat.encoding))
            names = ("duplicate_shuffled", "induction_shuffled") if shuffled else PATTERNS
            for name, scores in zip(names, expected[-len(names) :], strict=True):
                np.testing.assert_allclose(result[name][number].values, scores, atol=EXACT, rtol=0, err_msg=name)


# Gemma 3 has windows of 8 keys, PaliGemma a prefix that sees itself, Mllama layers that are skipped; all share keys
# among heads but Idefics.
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "paligemma", "idefics", "mllama"])
def test_text_scores_are_those_of_a_plain_loop(kind, monkeypatch):
    model, eager = models(kind)
    units = record(monkeypatch)
    result = repeated_tokens(model, length=12, n=2, batch_size=1)
    assert result.sizes["layer"] == len(model.choose_layers(None))
    agree(result, units, eager, lambda encoding: list(range(1, 25)))
    for plain, shuffled in zip(units[::2], units[1::2], strict=True):
        ids, again = plain[0].encoding.ids.tolist(), shuffled[0].encoding.ids.tolist()
        assert ids[1:13] == ids[13:] == again[1:13]
        assert sorted(again[13:]) == sorted(ids[13:])
        assert not any(x == y for x, y in zip(ids[13:], again[13:], strict=True))
        assert len(set(ids)) == 13
    visible = result["visible"]
    if kind == "gemma3":  # the third layer has no window
        windows = [not layer.self_attn.is_sliding for layer in model.layers]
        assert (visible.sel(pattern="induction") == windows).all()
    else:
        assert (visible == 1).all()


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_next", "gemma3", "paligemma", "idefics3", "internvl"])
def test_image_scores_are_those_of_a_plain_loop(kind, monkeypatch):
    model, eager = models(kind)
    units = record(monkeypatch)
    result = repeated_images(model, length=3, n=2)
    agree(result, units, eager, image_places)
    (plain,), (shuffled,) = units[:2]
    pictures = [plain.encoding.token_map.image[places[places >= 0]] for places in (plain.first, plain.second)]
    assert set(pictures[0]) == {0, 1, 2}
    assert set(pictures[1]) == {3, 4, 5}
    assert torch.equal(plain.encoding.ids, shuffled.encoding.ids)  # the pictures differ, not what stands for them
    pixels = plain.encoding.inputs["pixel_values"], shuffled.encoding.inputs["pixel_values"]
    ours, theirs = (values.flatten(0, 1) if values.shape[0] == 1 else values for values in pixels)
    halves = ours.unflatten(0, (2, 3, -1))
    assert torch.equal(halves[0], halves[1])
    again = theirs.unflatten(0, (2, 3, -1))
    assert torch.equal(again[0], halves[0])
    assert not any(torch.equal(x, y) for x, y in zip(again[0], again[1], strict=True))


def test_scores_are_those_of_the_patterns_of_transformer_lens(monkeypatch):
    from transformer_lens import head_detector

    model, eager = models("qwen2_5_vl")
    units = record(monkeypatch)
    result = repeated_tokens(model, length=12, n=1)
    encoding = units[0][0].encoding
    weights, tokens = eager_weights(eager, encoding), encoding.ids[None]

    def total(pattern):
        return (weights * pattern).sum((-1, -2))

    scores = {
        # Theirs has the first token's look at the opening too.
        "previous_token": (total(head_detector.get_previous_token_head_detection_pattern(tokens)) - weights[..., 1, 0])
        / 23,
        "duplicate_token": total(head_detector.get_duplicate_token_head_detection_pattern(tokens)) / 12,
        "induction": total(head_detector.get_induction_head_detection_pattern(tokens)) / 12,
    }
    for name, expected in scores.items():
        np.testing.assert_allclose(result[name][0].values, expected.numpy(), atol=EXACT, rtol=0, err_msg=name)


def test_added_tokens_are_no_ordinary_ones():
    """Special or not, and whatever their letters."""
    made = build("qwen2_5_vl")
    before = plain_tokens(load(made.module, processor=made.processor))
    made.processor.tokenizer.add_tokens(["added"])
    assert plain_tokens(load(made.module, processor=made.processor)) == before
    assert len(before) > 100


# --- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_a_batch_reads_as_its_sequences_alone(kind, monkeypatch):
    model, _ = models(kind)
    for experiment in (repeated_tokens, repeated_images):
        alone = experiment(model, length=4, n=3, batch_size=1, seed=3)
        monkeypatch.setattr(repeats, "CELLS", 700)  # a few rows at a time
        for n, batch_size in ((3, 3), (2, 2)):
            together = experiment(model, length=4, n=n, batch_size=batch_size, seed=3)
            for name in SCORES:
                np.testing.assert_allclose(together[name], alone[name][:n], atol=EXACT, rtol=0)
        other = experiment(model, length=4, n=3, seed=4)
        assert abs(other["induction"] - alone["induction"]).max() > 1e-3


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3", "paligemma"])
def test_padding_is_not_read(kind):
    """Sequences of different lengths side by side, text beside images."""
    model, _ = models(kind)
    rng = np.random.default_rng(0)
    units = [repeats.image_repeat(model, [repeats.noise(rng, 56) for _ in range(2)] * 2)]
    for length in (5, 9):
        shown, first = rng.choice(plain_tokens(model), length, replace=False), np.arange(1, length + 1)
        encoding = repeats.token_encoding([opening_token(model), *shown, *shown])
        units.append(Repeat(encoding, first, first + length))
    together = repeats.read_repeats(model, units)
    for number, unit in enumerate(units):
        alone = repeats.read_repeats(model, [unit])
        for name in ("score", "visible"):
            torch.testing.assert_close(together[name][number], alone[name][0], atol=EXACT, rtol=0)


# --- Copying ---------------------------------------------------------------------------------------------------------


@cache
def copying_model(kind):
    """Norms with gains, which built models have not."""
    made = build(kind)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.module.named_parameters():
            if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return load(made.module, processor=made.processor)


def explicit(model, layer, head, order=slice(None)):
    """The score from all eigenvalues of the matrix of tokens by tokens."""
    block, text, config = model.layers[layer], model.module.get_decoder(), model.text_config
    text = getattr(text, "language_model", text)
    attention, width = block.self_attn, config.head_dim
    gemma = "gemma" in config.model_type

    def gain(norm):
        return (1 + norm.weight if gemma else norm.weight).detach().double()

    embedding, unembedding = text.embed_tokens.weight.double(), model.module.lm_head.weight.double()
    group = head // (config.num_attention_heads // config.num_key_value_heads)
    value = attention.v_proj.weight.double()[group * width : (group + 1) * width]
    output = attention.o_proj.weight.double()[:, head * width : (head + 1) * width]
    written = ((embedding * gain(block.input_layernorm)) @ value.T @ output.T)[order]
    if config.model_type == "gemma3_text":  # Gemma 1 gives a norm this name that comes before the feed-forward layer
        written = written * gain(block.post_attention_layernorm)
    matrix = (written * gain(text.norm)) @ unembedding[: len(embedding)].T
    eigenvalues = torch.linalg.eigvals(matrix.detach())
    return float(eigenvalues.real.sum() / eigenvalues.abs().sum())


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3", "paligemma"])
def test_copying_is_that_of_the_full_matrix(kind):
    model = copying_model(kind)
    result = ov_copying(model, draws=1, seed=7)
    n = len(model.module.lm_head.weight)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(7))
    for layer, head in ((0, 0), (0, 3), (2, 1), (3, 2)) if n < 1000 else ((2, 1),):
        assert float(result["ov_copying"][layer, head]) == pytest.approx(explicit(model, layer, head), abs=1e-4)
        null = float(result["ov_copying_null"][0, layer, head])
        assert null == pytest.approx(explicit(model, layer, head, order), abs=1e-4)
    tied = model.module.lm_head.weight is model.module.get_input_embeddings().weight
    assert tied == (kind != "qwen3_vl")


def test_cross_attention_has_no_copying_score():
    """Its layers are left out, and embeddings of tokens that cannot be said have no part."""
    model, _ = models("mllama")
    result = ov_copying(model, draws=0)
    assert result["layer"].values.tolist() == model.choose_layers(None) == [0, 2, 3, 5]
    assert np.isfinite(result["ov_copying"]).all()
    assert result.attrs["n_tokens"] == len(model.module.lm_head.weight)
    assert result["ov_copying_null"].shape == (0, 4, 4)


def test_copying_is_seeded():
    model = copying_model("gemma3")
    one, same, other = (ov_copying(model, draws=2, seed=seed) for seed in (0, 0, 1))
    assert one.identical(same)
    assert (one["ov_copying"] == other["ov_copying"]).all()
    assert abs(one["ov_copying_null"] - other["ov_copying_null"]).max() > 0.01


# --- What cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["idefics", "mllama"])
def test_no_image_rows_where_text_reads_images_through_cross_attention(kind):
    with pytest.raises(UsageError, match="no image is a token of the text"):
        repeated_images(models(kind)[0])


def test_requests_that_cannot_be_met():
    model, _ = models("qwen2_5_vl")
    with pytest.raises(UsageError, match=r"tokens of plain letters, fewer than the 5000"):
        repeated_tokens(model, length=5000)
    for wrong in ({"length": 1}, {"n": 0}, {"seed": -1}, {"batch_size": 0}):
        with pytest.raises(UsageError, match="2 or more items"):
            repeated_tokens(model, **wrong)
    with pytest.raises(UsageError, match="pixels a side"):
        repeated_images(model, side=0)
    with pytest.raises(UsageError, match="0 or more"):
        ov_copying(model, draws=-1)


# --- The bundled model ------------------------------------------------------------------------------------------------


def test_seeded_heads_of_the_bundled_model():
    """Two of its heads were made to look one back, before training."""
    model = probe.load("toy")
    done = []
    result = repeated_tokens(model, n=6, batch_size=4, progress=done.append)
    assert done == [4, 6]
    previous = means(result)["previous_token"]
    assert previous[0, 1] > 0.4
    assert previous[2, 0] > 0.4
    assert np.sort(previous.ravel())[-3] < 0.1
    assert result.attrs["opening"] == "<|im_start|>"
    assert "toy" in result.attrs["caveat"]
    words = model.tokenizer.convert_ids_to_tokens(plain_tokens(model))
    assert {"red", "dax", "what"} < set(words)
    assert not {"<|image_pad|>", ";", "0", "<think>", "<|spare_0|>"} & set(words)


def test_copying_alone_imports_transformer_lens():
    """It takes seconds, but starts no process and asks nothing of the network."""
    code = """
import sys
import probe.experiments.ov_copying, probe.experiments.repeats, probe.measures.ov_copying
assert "transformer_lens" not in sys.modules
watched = "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.connect", "socket.getaddrinfo"
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(watched) else None)
from transformer_lens import FactoredMatrix
assert seen == [], seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)
