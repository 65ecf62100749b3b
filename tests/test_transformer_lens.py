"""TransformerLens as a second witness: its attention patterns, reduced by the token map, are the mass that we record.

Its bridge wraps an eager copy of the same weights. In LLaVA, LLaVA-NeXT, LLaVA-OneVision, Idefics3 and Gemma 3 it works
out the attention itself, from the projections on; in the two Qwens it shows what the eager kernel of transformers
returns. Either way neither nnsight, nor the sdpa kernel, nor :mod:`probe.measures` has a part in it.

A boot that is left alone installs torchvision into the environment that it runs in. Here whatever would start a process
is refused, and fails the test even where TransformerLens swallows the refusal.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import xarray as xr
from torch import Tensor

from probe.experiments.attention_map import attention_map
from probe.models.load import load
from probe.models.token_map import segments_for
from tests.tiny_families import MODEL_TYPES, build
from tests.tiny_qwen import make_episode

# They ask for torchvision, only to refuse without it: pixel values that are ready are read all the same.
WANT_TORCHVISION = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
ACCEPTED = (*WANT_TORCHVISION, "llava", "llava_next", "llava_onevision", "idefics3", "gemma3")
REFUSED = ("qwen2_vl", "idefics", "idefics2", "smolvlm", "internvl", "paligemma", "mllama")
EPISODE = make_episode(2, seed=2, sizes=((84, 56), (56, 84), (40, 40), (120, 30)))

# Two kernels on two copies, so differences grow through the layers. Measured: mass within 8e-6, logits (of up to 10)
# within 3e-5.
MASS_BOUND = 5e-5
LOGITS_BOUND = 2e-4


@pytest.fixture(autouse=True)
def attempts(monkeypatch) -> Iterator[list[Any]]:
    """Attempts to start a process: each is refused, and a test that leaves one here fails."""
    made: list[Any] = []

    def refuse(*command: Any, **options: Any) -> None:
        made.append((command, options))
        raise PermissionError("No process may be started here.")

    monkeypatch.setattr(subprocess, "Popen", refuse)  # all of subprocess goes through it
    for name in ("system", "fork", "posix_spawn", "posix_spawnp"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setitem(sys.modules, "pip", None)
    yield made
    assert made == []


@pytest.fixture
def bypass(monkeypatch) -> None:
    """Nothing to install, and no family asks for more than there is."""
    import transformer_lens.model_bridge.sources.transformers.helpers as helpers
    import transformer_lens.model_bridge.supported_architectures as adapters

    monkeypatch.setattr(helpers, "_ensure_torchvision", lambda: False)
    for name in WANT_TORCHVISION.values():
        monkeypatch.setattr(getattr(adapters, f"{name}ArchitectureAdapter"), "required_libraries", [])


def boot(module: Any, tokenizer: Any) -> Any:
    """Bridge a module in memory, which is changed by it."""
    from transformer_lens.model_bridge import TransformerBridge

    module.config.architectures = [type(module).__name__]
    tokenizer.init_kwargs.update(name_or_path="nowhere", add_bos_token=True)  # or it looks for another tokenizer
    return TransformerBridge.boot_transformers("nowhere", hf_model=module, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("kind", ACCEPTED)
@pytest.mark.usefixtures("bypass")
def test_patterns_reduced_by_the_token_map_are_the_mass(kind):
    """In every layer and head, for the answer's rows, the demonstrations' and every other position."""
    ours, theirs = build(kind), build(kind, attn="eager")
    model = load(ours.module, processor=ours.processor)
    encoding = model.encode(EPISODE)
    inputs = model.batch([encoding]).inputs
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert "pixel_values" in rest
    with torch.no_grad():
        bare, eager = (tiny.module(**inputs, use_cache=False).logits for tiny in (ours, theirs))
        logits, cache = boot(theirs.module, theirs.processor.tokenizer).run_with_cache(inputs["input_ids"], **rest)
    assert torch.equal(logits, eager)  # what is witnessed is the model itself
    torch.testing.assert_close(logits, bare, atol=LOGITS_BOUND, rtol=0)

    segments = segments_for(EPISODE.shots)
    index = torch.from_numpy(encoding.token_map.segment_index(segments))
    one_hot = torch.nn.functional.one_hot(index, len(segments)).float()
    patterns = torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"][0] for layer in range(model.n_layers)])
    seen = torch.einsum("lhqk,ks->qlhs", patterns, one_hot)

    result = attention_map(model, [EPISODE], rows="all")
    assert result["segment"].values.tolist() == [segment.label for segment in segments]
    answer = encoding.token_map.answer
    rows = {"answer": answer[:1] - 1, "answer_rest": answer[1:] - 1}
    rows |= {f"demo_answer_{i}": encoding.token_map.where("answer", i) for i in range(EPISODE.shots)}
    for row, positions in rows.items():
        assert difference(result["mass"].isel(episode=0).sel(row=row), seen[positions].mean(0)) < MASS_BOUND, row
    tokens = result["token_mass"]
    assert difference(tokens, seen) < MASS_BOUND
    for axis in ("layer", "head", "segment"):  # any other would not do
        assert difference(tokens.roll({axis: 1}), seen) > 0.1, axis


def difference(recorded: xr.DataArray, seen: Tensor) -> float:
    """The largest; a segment without tokens is missing in what was recorded, and has no mass."""
    assert recorded.dims[-3:] == ("layer", "head", "segment")
    return float((torch.from_numpy(recorded.fillna(0).values) - seen).abs().max())


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.usefixtures("bypass")
def test_the_other_families_are_refused(kind):
    """Once TransformerLens knows one of these, it belongs to those above."""
    tiny = build(kind, attn="eager")
    with pytest.raises(ValueError, match="Could not determine supported architecture"):
        boot(tiny.module, tiny.processor.tokenizer)


def test_every_family_is_accepted_or_refused():
    assert sorted(ACCEPTED + REFUSED) == sorted(MODEL_TYPES)


@pytest.mark.parametrize("kind", WANT_TORCHVISION)
def test_qwen_is_refused_without_torchvision(kind, monkeypatch):
    """Unless that is bypassed; so this witness needs no torchvision."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    tiny = build(kind, attn="eager")
    with pytest.raises(ImportError, match="needs the optional torchvision library"):
        boot(tiny.module, tiny.processor.tokenizer)


def test_an_attempt_to_install_is_noticed(attempts, monkeypatch):
    """What a boot does that is left alone, and what the other tests would fail with."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    tiny = build("llava", attn="eager")
    boot(tiny.module, tiny.processor.tokenizer)
    assert "'install', 'torchvision'" in str(attempts)
    attempts.clear()
