"""What recording costs: time and peak memory against the plain forward (``make bench``).

A random Qwen2.5-VL text stack (8 layers, hidden 512, 8 heads, 4 KV heads of width 64, fp32, one thread) reads n tokens
in 20 segments in four ways:

* the plain forward, without nnsight;
* the same with mass and contribution of the answer row recorded;
* the same with the mass of all rows as well;
* transformers' ``output_attentions=True`` (eager attention), the usual way to the same numbers.

Rounds are interleaved; a ratio is taken within each round, so that what disturbs the machine disturbs both. Printed is
the median ratio with a 95 % interval for the median (from the order statistics: no assumption about the noise); with
fewer than six rounds, the range. Memory is the peak of the resident set above that of the loaded model, each way in
processes of its own, the median of three.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
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
WAYS = ("plain", "answer rows", "all rows", "output_attentions")
BAR_LENGTH = 4096
BARS = {"answer rows": (1.08, 1.15), "all rows": (1.6, 1.8)}


def make_module(implementation: str) -> torch.nn.Module:
    """The random text stack, with a vision tower too small to matter."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1000,
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        vision_config={"depth": 1, "hidden_size": 32, "out_hidden_size": 512, "num_heads": 2, "intermediate_size": 32},
        **{name: 1 + i for i, name in enumerate(("image_token_id", "video_token_id"))},
        **{name: 3 + i for i, name in enumerate(("vision_start_token_id", "vision_end_token_id"))},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=implementation).float().eval()


def make_way(way: str) -> Callable[[int], object]:
    """A function that runs one forward of n tokens in one way; the model is made once."""
    module = make_module("eager" if way == "output_attentions" else "sdpa")
    if way in ("plain", "output_attentions"):
        options = {"output_attentions": True} if way == "output_attentions" else {}

        def forward(n: int) -> object:
            with torch.no_grad():
                return module(**make_inputs(n), **options, logits_to_keep=1, use_cache=False)

        return forward
    model = _as_model(module)

    def record(n: int) -> object:
        rows = BatchRows(positions=torch.tensor([[n - 1]]), weights=torch.ones(1, 1, 1))
        segments = one_hot_segments(torch.arange(n)[None] * N_SEGMENTS // n, N_SEGMENTS)
        reduce = make_reducer(model, rows, Keys(segments), all_rows=way == "all rows")
        return read(model, Batch(make_inputs(n), (), (0,)), ("attention", "heads"), reduce)

    return record


def make_inputs(n: int) -> dict[str, torch.Tensor]:
    """n random tokens, no images."""
    ids = torch.randint(10, 1000, (1, n), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids).int()}


def _as_model(module: torch.nn.Module) -> Model:
    nothing = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), image_processor=object(), chat_template="-")
    return load(module, processor=nothing)


def time_ways(n: int, rounds: int, slow_rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each way in interleaved rounds."""
    forwards = {way: make_way(way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(-1, rounds):  # the first round warms up and is dropped
        order = WAYS if number % 2 else WAYS[::-1]
        for way in order:
            if way == "output_attentions" and number >= slow_rounds:
                continue
            gc.collect()
            start = time.perf_counter()
            forwards[way](n)
            if number >= 0:
                seconds[way].append(time.perf_counter() - start)
    return {way: np.array(values) for way, values in seconds.items()}


def peak_of(way: str, n: int) -> float:
    """Peak memory in MB of one forward above that of the loaded model: the median of three processes.

    The allocator of the C library otherwise keeps what is freed, in an order of chance; blocks of 1 MiB and more are
    asked of the system one by one here, so that the resident set is what is alive.
    """
    command = [sys.executable, __file__, "--peak", way, "--lengths", str(n)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(3)]
    return float(np.median([json.loads(run.stdout.strip().splitlines()[-1]) for run in runs]))


def print_peak(way: str, n: int) -> None:
    """Measure this process (Linux: the high-water mark of the resident set is reset before the forward)."""
    forward = make_way(way)
    forward(64)  # what happens once in a process (instrumenting, buffers of the libraries) is not what a forward needs
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what building the model left, or the forward would hide in it
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    forward(n)
    print(json.dumps((_status("VmHWM") - before) / 1024))


def _status(field: str) -> float:
    """A field of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


def time_commands(rounds: int) -> Table:
    """Wall-clock seconds of whole commands, as a user waits for them."""
    table = Table(title="Whole commands, on all cores", title_justify="left")
    for name in ("command", "median s [95 %]", "runs", "bar"):
        table.add_column(name, justify="left" if name == "command" else "right")
    program = str(Path(sys.executable).with_name("probe"))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for arguments, runs, bar in (
        (["--help"], rounds, 0.3),
        (["attention-map", "--out", "run"], max(6, rounds // 2), 20.0),
    ):
        seconds = []
        for number in range(-1, runs):  # the first run fills the caches of the disk and is dropped
            with tempfile.TemporaryDirectory() as place:
                start = time.perf_counter()
                subprocess.run([program, *arguments], cwd=place, env=environment, capture_output=True, check=True)
                if number >= 0:
                    seconds.append(time.perf_counter() - start)
        low, high = median_interval(np.array(seconds))
        verdict = "met" if high <= bar else "missed"
        figure = f"{np.median(seconds):.2f} [{low:.2f}, {high:.2f}]"
        table.add_row(" ".join(["probe", *arguments]), figure, str(runs), f"{bar:g}: {verdict}")
    return table


def compare(n: int, rounds: int, slow_rounds: int) -> Table:
    """The four ways side by side at one length."""
    seconds = time_ways(n, rounds, slow_rounds)
    peaks = {way: peak_of(way, n) for way in WAYS}
    table = Table(title=f"{n} tokens, {N_SEGMENTS} segments", title_justify="left")
    for name in ("way", "median s", "time / plain [95 %]", "rounds", "peak MB", "peak / plain", "bars (time, memory)"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way in WAYS:
        paired = seconds[way] / seconds["plain"][: len(seconds[way])]
        low, high = median_interval(paired)
        ratio = "1" if way == "plain" else f"{np.median(paired):.3f} [{low:.3f}, {high:.3f}]"
        memory = peaks[way] / peaks["plain"]
        verdict = ""
        if way in BARS and n == BAR_LENGTH:
            most_time, most_memory = BARS[way]
            verdict = " ".join(
                f"{bar}: {'met' if value <= bar else 'missed'}"
                for bar, value in ((most_time, high), (most_memory, memory))
            )
        figures = (f"{np.median(seconds[way]):.2f}", ratio, str(len(paired)), f"{peaks[way]:.0f}", f"{memory:.2f}")
        table.add_row(way, *figures, verdict)
    return table


def main() -> None:
    """Print one table for each length, and one for whole commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, BAR_LENGTH])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slow-rounds", type=int, default=3, help="rounds of output_attentions")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print_peak(arguments.peak, arguments.lengths[0])
        return
    console = Console(width=120)
    console.print(time_commands(arguments.rounds))
    for n in arguments.lengths:
        console.print(compare(n, arguments.rounds, arguments.slow_rounds))


if __name__ == "__main__":
    main()
