"""Loading: a directory in every layout of the Hub, a module in memory, and sentences for what cannot be loaded."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from probe.errors import ProbeError, UsageError
from probe.models.fingerprint import of_directory
from probe.models.load import load
from tests.tiny_qwen import CHAT_TEMPLATE, make_episode, make_module, make_processor, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def logits(model):
    batch = model.batch([model.encode(make_episode(2, seed=1))])
    with torch.no_grad():
        return model.module(**batch.inputs, use_cache=False).logits


@pytest.mark.parametrize("template", ["jinja", "json", "tokenizer"])
@pytest.mark.parametrize("video", [False, True])
def test_every_layout_gives_the_same_model(tmp_path, template, video):
    """Sharded weights, the chat template in any of its places, with and without video processor files."""
    directory = save_checkpoint(tmp_path / "m", template=template, video=video)
    assert len(list(directory.glob("*.safetensors"))) > 1
    model = load(directory)
    processor = make_processor()
    reference = load(make_module(processor), processor=processor)
    assert model.chat_template == CHAT_TEMPLATE
    assert torch.equal(logits(model), logits(reference))
    assert model.dtype == torch.float32
    assert model.attention_implementation == "sdpa"


def test_old_image_processor_files_mean_the_same(checkpoint, copy):
    """Older checkpoints say min_pixels and max_pixels instead of size."""
    path = copy / "preprocessor_config.json"
    config = json.loads(path.read_text())
    size = config.pop("size")
    config |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    path.write_text(json.dumps(config))
    assert torch.equal(logits(load(copy)), logits(load(checkpoint)))


def test_dtype_is_explicit(checkpoint):
    assert load(checkpoint, dtype="bfloat16").dtype == torch.bfloat16
    assert load(checkpoint, dtype=torch.float16).dtype == torch.float16
    with pytest.raises(UsageError, match=r"did you mean float32 or|did you mean"):
        load(checkpoint, dtype="float23")


def test_facts(checkpoint):
    model = load(checkpoint)
    assert (model.n_layers, model.n_heads, model.head_dim) == (3, 4, 16)
    assert model.output_weight(1).shape == (64, 64)
    assert model.choose_layers(None) == [0, 1, 2]
    assert model.caveat == ""


def test_unknown_names_are_met_with_suggestions():
    with pytest.raises(UsageError, match="did you mean toy"):
        load("toi")
    with pytest.raises(UsageError, match="is neither a known model nor a directory"):
        load("/no/such/place")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        load(tmp_path / "model.bin")


def test_a_directory_without_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "error"), [("{", ProbeError), ('{"model_type": "llama"}', UsageError), ("[]", UsageError)]
)
def test_a_config_of_something_else(copy, content, error):
    (copy / "config.json").write_text(content)
    with pytest.raises(error, match=r"cannot be read|is a 'llama' model|is a None model"):
        load(copy)


def test_a_config_of_a_much_larger_model_is_refused_before_it_is_built(copy):
    """Built, it would fill the memory with random numbers first."""
    (copy / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ProbeError, match=r"describes a model of 7,\d{3},\d{3},\d{3} parameters.*hold [\d,]+ in all"):
        load(copy)


def test_missing_weights_are_never_made_up(copy):
    index = next(copy.glob("*.index.json"))
    content = json.loads(index.read_text())
    name = next(name for name in content["weight_map"] if "layers.1.self_attn.q_proj.weight" in name)
    from safetensors.torch import load_file, save_file

    shard = copy / content["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    index.write_text(json.dumps(content))
    with pytest.raises(ProbeError, match=r"missing keys \(1, such as .*q_proj"):
        load(copy)


def test_a_missing_shard(copy):
    sorted(copy.glob("*.safetensors"))[0].unlink()
    with pytest.raises(ProbeError, match="cannot be loaded"):
        load(copy)


def test_a_truncated_shard(copy):
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ProbeError, match="cannot be loaded"):
        load(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "chat_template.jinja"])
def test_missing_processor_files(copy, name):
    (copy / name).unlink()
    with pytest.raises(ProbeError, match=r"cannot be loaded|holds no chat template|no character offsets"):
        load(copy)


def test_a_module_needs_its_processor():
    processor = make_processor()
    module = make_module(processor)
    with pytest.raises(UsageError, match="needs processor="):
        load(module)
    with pytest.raises(UsageError, match="keeps its dtype"):
        load(module, processor=processor, dtype="float16")
    bare = SimpleNamespace(tokenizer=processor.tokenizer, image_processor=processor.image_processor)
    assert load(module, processor=bare).chat_template == CHAT_TEMPLATE
    with pytest.raises(UsageError, match="known families"):
        load(torch.nn.Linear(1, 1), processor=processor)
    with pytest.raises(UsageError, match="a directory brings its own"):
        load("toy", processor=processor)


def test_a_module_with_another_kernel_is_refused():
    processor = make_processor()
    module = make_module(processor)
    module.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UsageError, match="runs flash_attention_2 attention"):
        load(module, processor=processor)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff\xfe broken"),
        ("config.json", b'{"model_type": "qwen2_5_vl", "text_config": {"hidden_size": "big"}}'),
        ("tokenizer.json", b"{"),
    ],
)
def test_files_that_mean_nothing(copy, name, content):
    (copy / name).write_bytes(content)
    with pytest.raises(ProbeError, match="cannot be loaded"):
        load(copy)


def test_a_broken_old_chat_template(tmp_path):
    directory = save_checkpoint(tmp_path / "m", template="json")
    (directory / "chat_template.json").write_text("{")
    with pytest.raises(ProbeError, match="cannot be loaded"):
        load(directory)


def test_only_safetensors_are_read(copy):
    """Pickled weights are never opened: they can run code, and the fingerprint does not cover them."""
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ProbeError, match="cannot be loaded"):
        load(copy)


@pytest.mark.parametrize("device", ["mps", "meta", "gpu", "cuda:77"])
def test_devices_that_are_not_here(checkpoint, device):
    with pytest.raises(UsageError, match=device):
        load(checkpoint, device=device)


def test_a_tokenizer_without_padding(copy):
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(ProbeError, match="no padding token"):
        load(copy)


def test_the_bundled_model_keeps_its_caveat_wherever_it_lies(tmp_path, monkeypatch):
    from probe.models.names import BUNDLED

    moved = shutil.copytree(BUNDLED["toy"], tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert load("copy").caveat == load(moved).caveat == load("toy").caveat != ""


def test_the_fingerprint_follows_the_files(checkpoint, copy):
    assert of_directory(copy) == of_directory(checkpoint)
    weights = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert of_directory(copy) != of_directory(checkpoint)


def test_the_fingerprint_of_a_module_follows_its_values():
    processor = make_processor()
    first = load(make_module(processor), processor=processor).fingerprint
    module = make_module(processor)
    assert load(module, processor=processor).fingerprint == first
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-3
    assert load(module, processor=processor).fingerprint != first
