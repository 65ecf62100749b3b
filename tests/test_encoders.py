"""Encoders against direct calls of what they run, and a cache that computes nothing twice."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from probe.data.tasks import synthetic_episodes
from probe.errors import ProbeError, UsageError
from probe.models import vector_cache
from probe.models.encoders import Encoder, checkpoint_encoder, own_encoder, tfidf_encoder
from probe.models.load import load
from probe.models.model import Model
from probe.models.oracle import observed
from probe.models.vector_cache import cached
from probe.toy.architecture import GRID, ImageEncoder
from tests.test_names import COMMIT, store
from tests.tiny_families import CLIP, MODEL_TYPES, SIGLIP, TEXT, build, square
from tests.tiny_qwen import picture

SIZES = ((84, 56), (30, 20), (120, 30))
PICTURES = [picture(seed, size) for seed, size in enumerate(SIZES)]
TEXTS = ["What colour is the cat?", "red", "How many dogs are on the table? 3"]
CROSS = ("idefics", "mllama")


@cache
def model_of(kind: str) -> Model:
    if kind == "toy":
        return load("toy")
    made = build(kind)
    made.processor.chat_template = made.chat_template
    return load(made.module, processor=made.processor)


# ------------------------------------------------------------------------------------------------ the analysed model


def test_pictures_of_the_bundled_model_are_means_of_what_its_tower_makes():
    model = model_of("toy")
    episodes = synthetic_episodes("recognition", shots=2, n=2)
    pictures = [image for episode in episodes for example in episode.examples for image in example.images]
    patches = model.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = ImageEncoder(model.module)(patches.view(len(pictures), GRID[1] * GRID[2], -1))
    vectors = own_encoder(model).images(pictures)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, features.mean(1), atol=1e-5)
    assert len(np.unique(vectors.round(4), axis=0)) > 1


@pytest.mark.parametrize("kind", [kind for kind in MODEL_TYPES if kind not in CROSS])
def test_pictures_are_means_of_what_enters_the_first_layer(kind):
    """Of a batch of pictures of unlike sizes, in which some prompts are padded; and each alone."""
    model = model_of(kind)
    encoder = own_encoder(model, batch_size=2)
    vectors = encoder.images(PICTURES)
    for image, vector in zip(PICTURES, vectors, strict=True):
        np.testing.assert_allclose(encoder.images([image])[0], vector, atol=1e-5)
        [episode] = synthetic_episodes("recognition", shots=0, n=1)
        encoding = model.encode(episode, [image])  # the text around the picture does not matter
        batch = model.batch([encoding])
        with torch.no_grad():
            entering = model.module(**batch.inputs, output_hidden_states=True).hidden_states[0][0]
        is_image = torch.from_numpy(
            encoding.token_map.role == encoding.token_map.role[encoding.token_map.where("image")[0]]
        )
        np.testing.assert_allclose(vector, entering[is_image].mean(0), atol=1e-5)
    assert not model.layers[0]._forward_pre_hooks


@pytest.mark.parametrize("kind", CROSS)
def test_pictures_of_models_with_cross_attention_are_means_over_their_keys(kind):
    """The values are linear in what the keys are made from, and are seen here through the attention call."""
    model = model_of(kind)
    encoder = own_encoder(model, batch_size=2)
    vectors = encoder.images(PICTURES)
    for image, vector in zip(PICTURES, vectors, strict=True):
        np.testing.assert_allclose(encoder.images([image])[0], vector, atol=1e-5)
        [episode] = synthetic_episodes("recognition", shots=0, n=1)
        encoding = model.encode(episode, [image])
        values = []

        def look(site, q, k, v, *_):
            if site.axis == "vision":
                values.append(v[0])  # noqa: B023

        with observed(model, look), torch.no_grad():
            model.module(**model.batch([encoding]).inputs, use_cache=False)
        project = model.module.get_submodule(next(s for s in model.sites if s.axis == "vision").attention).v_proj
        is_image = torch.from_numpy(encoding.vision_map.where("image"))
        assert values[0].shape[1] == len(encoding.vision_map)
        mean = values[0][:, is_image].mean(1)  # [head, width]
        projected = project(torch.from_numpy(vector)).unflatten(0, (-1, mean.shape[1]))
        projected = projected.repeat_interleave(len(mean) // len(projected), 0)
        np.testing.assert_allclose(mean, projected.detach(), atol=1e-5)


@pytest.mark.parametrize("kind", ["toy", "gemma3", "idefics"])
def test_texts_are_means_of_embeddings(kind):
    model = model_of(kind)
    texts = ["What is this?", " what \n", "red"]
    vectors = own_encoder(model, batch_size=2).texts(texts)
    table = model.module.get_input_embeddings().weight
    scale = model.text_config.hidden_size**0.5 if kind == "gemma3" else 1
    for text, vector in zip(texts, vectors, strict=True):
        ids = model.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        np.testing.assert_allclose(vector, table[ids].mean(0).detach() * scale, atol=1e-5)


def test_the_name_says_whose_vectors_they_are():
    toy, control = load("toy"), load("toy-no-binding")
    assert own_encoder(toy).name.startswith(f"toy [{toy.fingerprint}, ")
    assert own_encoder(toy).name == own_encoder(load("toy")).name
    assert own_encoder(toy).name != own_encoder(control).name
    assert own_encoder(toy).name != own_encoder(load("toy", dtype="bfloat16")).name


def test_what_has_no_vector_is_refused(tmp_path):
    encoder = own_encoder(model_of("toy"))
    for call in (encoder.images, encoder.texts, cached(encoder, tmp_path / "v").images):
        with pytest.raises(UsageError, match="nothing to encode"):
            call([])
    with pytest.raises(ProbeError, match=r"no token for the text ' '; leave out"):
        encoder.texts(["red", " "])
    with pytest.raises(ProbeError, match=r"there is no image .*gone\.png"):
        encoder.images([tmp_path / "gone.png"])
    broken = build("llava")
    broken.processor.chat_template = broken.chat_template
    with torch.no_grad():
        broken.module.get_input_embeddings().weight[5:] = float("nan")
    with pytest.raises(ProbeError, match="2 of 2 vectors are not finite"):
        own_encoder(load(broken.module, processor=broken.processor)).texts(["red", "cat"])


def test_files_and_images_in_memory_are_alike(tmp_path):
    PICTURES[0].save(tmp_path / "a.png")
    encoder = own_encoder(model_of("toy"))
    image = PICTURES[0].convert("RGBA")
    np.testing.assert_array_equal(encoder.images([tmp_path / "a.png"]), encoder.images([image]))


# ------------------------------------------------------------------------------------------------------------- words


def test_tfidf():
    encoder = tfidf_encoder(["A cat", "a dog", "2 dogs"])
    vectors = encoder.texts(["a CAT!", "2", "zebra", "a"])
    assert vectors.shape == (4, 5)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.sqrt(vectors.multiply(vectors).sum(1)).ravel(), [[1, 1, 0, 1]], rtol=1e-6)
    # The weights, by hand: ln((1 + texts) / (1 + texts with the word)) + 1, then unit length.
    rare, common = np.log(4 / 2) + 1, np.log(4 / 3) + 1
    np.testing.assert_allclose(vectors[0].max(), rare / np.hypot(rare, common), rtol=1e-6)
    assert encoder.images is None
    assert cached(encoder, Path("nowhere")) is encoder
    assert (
        encoder.name == tfidf_encoder(["A cat", "a dog", "2 dogs"]).name != tfidf_encoder(["A cat", "a dog2 dogs"]).name
    )
    with pytest.raises(UsageError, match="corpus of 2 texts has no words"):
        tfidf_encoder(["?", ""])


# ------------------------------------------------------------------------------------------------- other checkpoints


def make_tokenizer(longest: int, opening: str, closing: str, pad: str) -> hf.PreTrainedTokenizerFast:
    """Words, between one token before and one behind (``closing`` has the highest id, as CLIP wants it)."""
    words = sorted({word for text in TEXTS for word in text.lower().replace("?", " ?").split()})
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys((pad, "<unk>", opening, *words, closing)))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ids = [(token, vocabulary[token]) for token in (opening, closing)]
    core.post_processor = processors.TemplateProcessing(f"{opening} $A {closing}", special_tokens=ids)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token=pad, eos_token=closing, model_max_length=longest
    )


SMALL = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"} | {"num_hidden_layers": 2}


def save_checkpoint(kind: str, directory: Path) -> hf.PreTrainedModel:
    """A random checkpoint; weights large enough that texts and pictures differ."""
    tokenizer = make_tokenizer(*{"clip": (12, "<s>", "</s>", "</s>")}.get(kind, (12, "<s>", "</s>", "<pad>")))
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**SMALL, **ids, "bos_token_id": 2, "max_position_embeddings": 12, "projection_size": 64}
    torch.manual_seed(0)
    if kind == "clip":
        hf.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square(24)).save_pretrained(directory)
        module = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=CLIP, projection_dim=32))
    elif kind == "siglip":
        hf.SiglipImageProcessorPil(size=square(24)).save_pretrained(directory)
        vision = {**SIGLIP, "vision_use_head": True, "image_size": 24, "hidden_size": 64}
        module = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))
    elif kind == "bert":
        module = hf.BertForMaskedLM(hf.BertConfig(**text))  # without the layer that pools the first token
    else:
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
        module = hf.T5EncoderModel(hf.T5Config(**sizes, **ids, decoder_start_token_id=0))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    module.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return module


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    found = {}
    for kind in ("clip", "siglip", "bert", "t5"):
        directory = tmp_path_factory.mktemp(kind)
        found[kind] = (directory, save_checkpoint(kind, directory))
    return found


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_dual_encoders_equal_direct_calls_one_by_one(checkpoints, kind):
    directory, module = checkpoints[kind]
    encoder = checkpoint_encoder(directory)
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    processor = hf.CLIPImageProcessorPil if kind == "clip" else hf.SiglipImageProcessorPil
    processor = processor.from_pretrained(directory)
    padding = {"padding": "max_length"} if kind == "siglip" else {}
    with torch.no_grad():
        images = [module.get_image_features(**processor(p, return_tensors="pt")).pooler_output for p in PICTURES]
        texts = [module.get_text_features(**tokenizer(t, return_tensors="pt", **padding)).pooler_output for t in TEXTS]
    np.testing.assert_allclose(encoder.images(PICTURES), torch.cat(images), atol=1e-5)
    np.testing.assert_allclose(encoder.texts(TEXTS), torch.cat(texts), atol=1e-5)
    np.testing.assert_allclose(encoder.texts(TEXTS[1:2]), texts[1], atol=1e-5)
    assert float((texts[0] - texts[1]).norm()) > 0.1
    assert float((images[0] - images[1]).norm()) > 0.1
    with pytest.raises(ProbeError, match=r"reads at most 12 tokens, but a text has 22: 'red red .*Shorten"):
        encoder.texts(["red", "red " * 20])
    assert checkpoint_encoder(directory, dtype="bfloat16").images(PICTURES).dtype == np.float32


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_text_encoders_equal_a_mean_by_hand(checkpoints, kind):
    directory, module = checkpoints[kind]
    encoder = checkpoint_encoder(directory)
    assert encoder.images is None
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    vectors = encoder.texts(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        tokens = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = (module.bert if kind == "bert" else module)(**tokens).last_hidden_state[0]
        np.testing.assert_allclose(vector, states.mean(0), atol=1e-5)
        np.testing.assert_allclose(vector, encoder.texts([text])[0], atol=1e-5)
    with pytest.raises(ProbeError, match="reads at most 12 tokens"):
        encoder.texts(["red " * 11])
    with pytest.raises(ProbeError, match="the empty text ''"):
        encoder.texts([""])


def test_a_checkpoint_of_the_hub_is_named_by_its_commit(checkpoints, tmp_path, monkeypatch):
    store(tmp_path, "someone/clip", checkpoints["clip"][0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    encoder = checkpoint_encoder("someone/clip")
    assert encoder.name.startswith(f"someone/clip@{COMMIT} [")
    np.testing.assert_array_equal(encoder.texts(TEXTS), checkpoint_encoder(checkpoints["clip"][0]).texts(TEXTS))
    with pytest.raises(ProbeError, match="someone/siglip is not on this machine"):
        checkpoint_encoder("someone/siglip")


def test_checkpoints_that_cannot_be_used(checkpoints, tmp_path):
    with pytest.raises(UsageError, match="is neither a known model nor a directory"):
        checkpoint_encoder("clip")
    with pytest.raises(ProbeError, match="holds no safetensors"):
        checkpoint_encoder(tmp_path)
    directory, module = tmp_path / "clip", checkpoints["clip"][1]
    weights = {name: value for name, value in module.state_dict().items() if "projection" not in name}
    module.save_pretrained(directory, state_dict=weights)
    hf.AutoTokenizer.from_pretrained(checkpoints["clip"][0]).save_pretrained(directory)
    with pytest.raises(ProbeError, match=r"cannot be loaded: Can't load image processor"):
        checkpoint_encoder(directory)
    hf.CLIPImageProcessorPil().save_pretrained(directory)
    with pytest.raises(ProbeError, match=r"lacks 2 weights, such as text_projection"):
        checkpoint_encoder(directory)


# --------------------------------------------------------------------------------------------------------- the cache


class Counting:
    """An encoder whose vectors follow from the input, and that remembers what it was asked."""

    def __init__(self, name: str = "stub", broken_after: int = 10**9) -> None:
        self.asked: list[int] = []
        self.broken_after = broken_after
        self.encoder = Encoder(name, self.images, self.texts)

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return self.count([float(np.asarray(image).mean()) for image in pictures])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return self.count([float(len(text)) for text in texts])

    def count(self, values: list[float]) -> np.ndarray:
        if len(self.asked) == self.broken_after:
            raise KeyboardInterrupt
        self.asked.append(len(values))
        return np.array([[value, 1 / 3] for value in values], np.float32)


def test_nothing_is_computed_twice(tmp_path):
    path, stub = tmp_path / "made" / "vectors.sqlite", Counting()
    encoder = cached(stub.encoder, path)
    plain = stub.encoder.images(PICTURES)
    stub.asked.clear()
    first = encoder.images([*PICTURES, PICTURES[0].copy()])
    assert stub.asked == [3]
    np.testing.assert_array_equal(first, [*plain, plain[0]])
    assert first.dtype == np.float32
    PICTURES[1].save(tmp_path / "copy.png")
    again = cached(Counting(broken_after=0).encoder, path).images([tmp_path / "copy.png", PICTURES[0].copy()])
    np.testing.assert_array_equal(again, plain[[1, 0]])
    changed = PICTURES[0].copy()
    changed.putpixel((0, 0), (1, 2, 3))
    encoder.images([PICTURES[2], changed])
    assert stub.asked == [3, 1]
    np.testing.assert_array_equal(encoder.texts(["ab", "abc", "ab"])[:, 0], [2, 3, 2])
    np.testing.assert_array_equal(encoder.texts(["abc", "abcd"])[:, 0], [3, 4])
    assert stub.asked == [3, 1, 2, 1]
    other = Counting("another")
    cached(other.encoder, path).images(PICTURES)
    assert other.asked == [3]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert cached(Encoder("blind", None, stub.texts), path).images is None


def test_what_was_computed_survives_a_stop(tmp_path):
    texts = ["x" * n for n in range(1, 81)]
    stopped = Counting(broken_after=2)
    with pytest.raises(KeyboardInterrupt):
        cached(stopped.encoder, tmp_path / "v").texts(texts)
    rest = Counting()
    vectors = cached(rest.encoder, tmp_path / "v").texts(texts)
    assert (stopped.asked, rest.asked) == ([32, 32], [16])
    np.testing.assert_array_equal(vectors, Counting().encoder.texts(texts))


def test_two_may_write_at_once(tmp_path):
    """While one computes, another writes the same and more."""
    quick = cached(Counting().encoder, tmp_path / "v")

    def slow(texts):
        return quick.texts([*texts, "more"])[:-1]

    texts = ["a", "bb"]
    np.testing.assert_array_equal(cached(Encoder("stub", None, slow), tmp_path / "v").texts(texts)[:, 0], [1, 2])
    assert cached(Counting(broken_after=0).encoder, tmp_path / "v").texts(["more", "a"])[0, 0] == 4


def test_a_file_that_cannot_be_used(tmp_path, monkeypatch):
    path, stub = tmp_path / "v", Counting()
    path.write_bytes(b"these are no vectors " * 100)
    with pytest.raises(ProbeError, match=r"file of vectors .* is damaged: file is not a database. Delete it"):
        cached(stub.encoder, path).texts(["a"])
    path.unlink()
    encoder = cached(stub.encoder, path)
    encoder.texts(["x" * n for n in range(1, 200)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ProbeError, match="is damaged"):
        encoder.texts(["x" * n for n in range(1, 200)])
    path.write_bytes(whole)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE vectors SET vector = x'0011' WHERE key = (SELECT key FROM vectors LIMIT 1)")
    file.close()
    with pytest.raises(ProbeError, match="is damaged"):
        encoder.texts(["x" * n for n in range(1, 200)])
    monkeypatch.setattr(vector_cache, "PATIENCE", 0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ProbeError, match=r"cannot be read or written: database is locked\. Wait"):
        encoder.texts(["new", "newer"])
    other.close()
    with pytest.raises(ProbeError, match="unable to open database file"):
        cached(stub.encoder, tmp_path).texts(["a"])
    with pytest.raises(ProbeError, match="Cannot make the directory"):
        cached(stub.encoder, path / "below").texts(["a"])


def test_a_real_encoder_through_the_cache(tmp_path):
    encoder = own_encoder(model_of("toy"))
    for _ in range(2):
        np.testing.assert_array_equal(cached(encoder, tmp_path / "v").images(PICTURES), encoder.images(PICTURES))
        np.testing.assert_array_equal(cached(encoder, tmp_path / "v").texts(["red"]), encoder.texts(["red"]))
