"""What recording costs at the sizes that researchers use: time and memory against the plain forward.

    python tests/benchmarks/bench_real_sizes.py --out costs.json                    # on a GPU with 48 GB or more
    python tests/benchmarks/bench_real_sizes.py --size tiny --lengths 64 --repeats 2  # to see that it runs

Models of the size of Qwen2.5-VL-7B and Idefics2-8B with random weights (cost does not depend on them) read random text
of 4,096, 8,192 and 32,768 tokens in bfloat16, in 20 segments, in three ways: plain; with mass and contribution of the
answer row recorded; with the mass of all rows as well. Rounds are interleaved and a ratio is taken within each, so that
what disturbs the machine disturbs all ways; printed are medians with distribution-free 95 % intervals, and the peak of
allocated memory above that of the weights. A way that does not fit into memory is reported as such.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from probe.experiments.attention_reducer import BatchRows, Keys, make_reducer
from probe.measures.mass import one_hot_segments
from probe.models.encoding import Batch
from probe.models.load import load
from probe.models.model import Model
from probe.stats import median_interval
from probe.trace.read import read

N_SEGMENTS = 20
WAYS = ("plain", "answer rows", "all rows")
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "idefics2-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32003,
    },
}


def make_model(name: str, size: str, device: torch.device, dtype: torch.dtype) -> Model:
    """A random model with the published shape of the text stack and a vision tower too small to matter."""
    text = {**SIZES[name], **(TINY | {"vocab_size": 1000} if size == "tiny" else {})}
    text |= {"max_position_embeddings": 65536, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    small = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    config: Any
    if name.startswith("qwen"):
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        ids = {f"{kind}_token_id": 1 + i for i, kind in enumerate(("image", "video", "vision_start", "vision_end"))}
        vision = {**small, "depth": 1, "out_hidden_size": text["hidden_size"]}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        kind: Any = transformers.Qwen2_5_VLForConditionalGeneration
    else:
        tower = {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "image_size": 32,
            "patch_size": 16,
        }
        perceiver = {
            "hidden_size": text["hidden_size"],
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        }
        text |= {"model_type": "mistral", "sliding_window": None}
        config = transformers.Idefics2Config(
            text_config=text, vision_config=tower, perceiver_config=perceiver, image_token_id=1
        )
        kind = transformers.Idefics2ForConditionalGeneration
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights are made in their place and type: in float32 they would not fit
    try:
        with device:
            module = kind._from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(default)
    nothing = SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0, bos_token=None), image_processor=object(), chat_template="-"
    )
    with torch.device("cpu"):
        return load(module, processor=nothing)


def make_way(model: Model, way: str, n: int) -> Callable[[], object]:
    """A function that runs one forward of n tokens in one way."""
    ids = torch.randint(10, 900, (1, n), generator=torch.Generator().manual_seed(0)).to(model.device)
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (), (0,))
    batch.inputs.update(model.family.finish(model, batch))
    if way == "plain":
        module: Any = model.module

        def forward() -> object:
            with torch.no_grad():
                return module(**batch.inputs, logits_to_keep=1, use_cache=False)

        return forward
    rows = BatchRows(
        positions=torch.tensor([[n - 1]], device=ids.device), weights=torch.ones(1, 1, 1, device=ids.device)
    )
    index = torch.arange(n, device=ids.device)[None] * N_SEGMENTS // n
    reduce = make_reducer(model, rows, Keys(one_hot_segments(index, N_SEGMENTS)), all_rows=way == "all rows")
    return lambda: read(model, batch, ("attention", "heads"), reduce)


def run_once(forward: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds, and peak of allocated memory above what was there, in GB (0 without a GPU)."""
    if device.type != "cuda":
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    forward()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, (torch.cuda.max_memory_allocated(device) - before) / 2**30


def measure(model: Model, n: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds and memory of every way, in interleaved rounds; a way that does not fit is left out from then on."""
    found: dict[str, dict[str, Any]] = {way: {"seconds": [], "gigabytes": 0.0} for way in WAYS}
    for number in range(-1, repeats):  # the first round warms up and is dropped
        for way in WAYS if number % 2 else WAYS[::-1]:
            if "too large" in found[way]:
                continue
            try:
                seconds, gigabytes = run_once(make_way(model, way, n), model.device)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                found[way] = {"too large": True}
                continue
            if number >= 0:
                found[way]["seconds"].append(seconds)
                found[way]["gigabytes"] = max(found[way]["gigabytes"], gigabytes)
    return found


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    console, everything = Console(), []
    for model_name in arguments.models:
        model = make_model(model_name, arguments.size, device, torch.bfloat16)
        parameters = sum(parameter.numel() for parameter in model.module.parameters())
        title = f"{model_name}, {parameters / 1e9:.2f} billion random parameters, bfloat16, {name}"
        table = Table(
            "tokens", "way", "seconds: median [95 %]", "÷ plain: median [95 %]", "GB above the weights", title=title
        )
        for n in arguments.lengths:
            found = measure(model, n, arguments.repeats)
            everything.append(
                {"model": model_name, "parameters": parameters, "device": name, "tokens": n, "ways": found}
            )
            plain = np.array(found["plain"].get("seconds", []))
            for way in WAYS:
                if "too large" in found[way]:
                    table.add_row(str(n), way, "does not fit", "", "")
                    continue
                seconds = np.array(found[way]["seconds"])
                ratio = seconds / plain if len(plain) == len(seconds) else None
                table.add_row(
                    str(n),
                    way,
                    _median(seconds),
                    "" if ratio is None else _median(ratio),
                    f"{found[way]['gigabytes']:.2f}" if device.type == "cuda" else "–",
                )
        console.print(table)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if arguments.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        arguments.out.write_text(json.dumps({"versions": versions, "cells": everything}, indent=1) + "\n")


def _median(values: np.ndarray) -> str:
    low, high = median_interval(values)
    return f"{np.median(values):.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
