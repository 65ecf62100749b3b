"""The bundled model: its shortcuts equal the plain forward, its training resumes, and what ships is whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import probe
from probe.data.scenes import HEIGHT, WIDTH
from probe.models.load import TOY
from probe.toy import train
from probe.toy.architecture import GRID, ImageEncoder, Size, build, seed_look_back
from probe.toy.curriculum import ID, Mixture, draw_batch
from probe.toy.train import to_patches
from probe.toy.vocabulary import make_image_processor, make_tokenizer, words

EVERYTHING = Mixture(flipped=0.5, text_only=0.4)


@pytest.fixture(scope="module")
def model():
    return build(Size(), seed=3).eval()


def test_patches_are_those_of_the_image_processor():
    from PIL import Image

    pictures = np.random.default_rng(0).integers(0, 255, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
    theirs = make_image_processor()(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [list(GRID)] * 3
    assert torch.equal(to_patches(torch.from_numpy(pictures)).flatten(0, 1), theirs["pixel_values"])


def test_the_fast_image_encoder_is_the_vision_tower(model):
    patches = torch.randn(4, GRID[1] * GRID[2], 1176)
    with torch.no_grad():
        ours = ImageEncoder(model)(patches)
        theirs = model.model.visual(patches.flatten(0, 1), grid_thw=torch.tensor([GRID] * 4))
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=1e-5, rtol=1e-5)


def test_training_episodes_read_as_the_chat_template_writes_them(model):
    """Tokens and 3-D positions of the curriculum against transformers' own."""
    batch = draw_batch(np.random.default_rng(1), 24, 4, EVERYTHING)
    tokenizer = make_tokenizer()
    assert {"vqa", "recognition", "binding-cued", "binding-uncued"} < set(batch.tasks)
    for row in range(24):
        ids = batch.ids[row][batch.ids[row] != ID["<|endoftext|>"]]
        text = tokenizer.decode(ids)
        messages = []
        for item in text.removeprefix("<|im_start|>").split(";")[:-1]:
            question, answer = item.split("A:")
            content = [{"type": "text", "text": question.replace("<|image_pad|>", "").strip()}]
            messages.append({"role": "user", "content": [{"type": "image"}] * ("<|image_pad|>" in item) + content})
            messages.append({"role": "assistant", "content": answer.strip()})
        rendered = tokenizer.apply_chat_template(messages, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * 6)
        assert tokenizer(rendered)["input_ids"] == ids.tolist()
        is_image = (ids == ID["<|image_pad|>"])[None].int()
        grids = torch.tensor([GRID] * (int(is_image.sum()) // 6)) if is_image.any() else None
        positions, _ = model.model.get_rope_index(ids[None], is_image, image_grid_thw=grids)
        assert torch.equal(positions[:, 0], batch.positions[:, row, : len(ids)])


def test_losses_stand_where_the_answer_can_be_known():
    batch = draw_batch(np.random.default_rng(2), 60, 6, EVERYTHING)
    names = words()
    for row, task in enumerate(batch.tasks):
        ids, targets = batch.ids[row].tolist(), batch.targets[row].tolist()
        trained = [i for i, target in enumerate(targets) if target != -100]
        assert all(ids[i + 1] == targets[i] for i in trained)
        answers = [ids[i + 1] for i in range(len(ids) - 1) if names[ids[i]] == "A:"]
        if task.startswith("binding"):
            first = len(set(answers))
            assert len(trained) == len(answers) - first
        ends = [i for i, target in enumerate(batch.end_targets[row].tolist()) if target != -100]
        assert len(ends) == len(answers)
    for episode, query, key in batch.guides.tolist():
        assert names[batch.ids[episode, query]] == "A:"
        assert batch.ids[episode, key] == batch.ids[episode, query + 1]
        assert key < query


def test_a_seeded_head_looks_back_by_its_distance(model):
    """With the content of queries and keys removed, the biases alone put a head on the token d positions back."""
    attention = model.model.language_model.layers[1].self_attn
    seed_look_back(model, {(1, 0): 4, (1, 1): 1}, sharpness=5.0)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        states = torch.zeros(1, 12, 128)
        ids = torch.arange(12)[None, None].expand(3, 1, -1)
        cos_sin = model.model.language_model.rotary_emb(states, ids)
        model.model.language_model.config._attn_implementation_internal = "eager"
        _, weights = attention(
            states, position_embeddings=cos_sin, attention_mask=torch.full((12, 12), -1e9).triu(1)[None, None]
        )
        model.model.language_model.config._attn_implementation_internal = "sdpa"
    assert weights[0, 0, 6:].argmax(-1).tolist() == [2, 3, 4, 5, 6, 7]
    assert weights[0, 1, 6:].argmax(-1).tolist() == [5, 6, 7, 8, 9, 10]


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Stopped in the language stage and started again, training ends in the very same weights; they load and read."""
    recipe = train.Recipe(
        vision_steps=3, vision_renders=1, vision_batch=8, bank_renders=1, language_steps=4, language_batch=8
    )
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.claim(whole, recipe)
    train.work(0, 1, whole, recipe)
    train.claim(broken, recipe)
    drawn = []

    def stops(*arguments):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return draw_batch(*arguments)

    monkeypatch.setattr(train, "draw_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        train.work(0, 1, broken, recipe)
    assert torch.load(broken / "language.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(train, "draw_batch", draw_batch)
    train.work(0, 1, broken, recipe)
    assert (broken / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    result = probe.attention_map(probe.load(whole / "model"), probe.synthetic_episodes("describe", shots=1, n=2))
    assert float(result["residual"].max()) < 1e-5
    with pytest.raises(SystemExit, match="another recipe"):
        train.claim(whole, train.Recipe(seed=1))


def test_what_ships_is_whole_and_small():
    names = {path.name for path in TOY.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "recipe.json",
        "README.md",
        "chat_template.jinja",
    } <= names
    assert sum(path.stat().st_size for path in TOY.iterdir()) < 8e6
    assert sum(p.numel() for p in probe.load("toy").module.parameters()) <= 1.9e6


def test_the_bundled_model_learns_in_context():
    """Without demonstrations `?` cannot be answered; with one it can. Loose bounds: the card has the figures."""
    model = probe.load("toy")
    accuracy = {
        shots: float(
            probe.attention_map(model, probe.synthetic_episodes("recognition", shots=shots, n=60))["correct"].mean()
        )
        for shots in (0, 4)
    }
    assert accuracy[0] < 0.4
    assert accuracy[4] > 0.85


def test_plain_transformers_gives_the_same_numbers():
    """The bundled model by ``from_pretrained`` alone: logits and greedy answers as through probe."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    module = Qwen2_5_VLForConditionalGeneration.from_pretrained(TOY, dtype=torch.float32)
    model = probe.load("toy")
    batch = model.batch([model.encode(e) for e in probe.synthetic_episodes("vqa", shots=2, n=4)], with_answer=False)
    with torch.no_grad():
        ids = module.generate(**batch.inputs, max_new_tokens=4)
        assert torch.equal(module(**batch.inputs).logits[:, -1:], probe.read(model, batch).logits)
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    from probe.trace.generate import generate

    texts = [text.strip() for text in tokenizer.batch_decode(ids[:, batch.length :], skip_special_tokens=True)]
    assert texts == generate(model, batch, max_new_tokens=4)
