"""How far recorded values are from the model's own, for every kind of number: where the bounds of probe come from.

    python analyses/calibrate_dtypes.py

Random Qwen2.5-VL text stacks of several widths and lengths in float32, float16 and bfloat16. Printed for each: the
*residual* (how far segment outputs, recomputed in float32 from the model's own q, k and v, are from the heads' own
outputs, relative to their size; the largest and the 99th percentile over layers, heads and rows) beside the bound at
which probe refuses a recording; and how far the mass of an episode in a padded batch is from that of the episode
*alone*, which depends on the model: sharp attention (large queries and keys) amplifies rounding until it is everything.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from probe.measures import mass as measure
from probe.measures.mass import RESIDUAL_BOUND
from probe.models.encoding import Batch
from probe.models.families.qwen import QWEN2_5_VL
from probe.models.model import Model
from probe.trace.read import LayerValues, read

N_SEGMENTS = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_model(width: int, layers: int, sharpness: float, dtype: torch.dtype, seed: int) -> Model:
    """A random text stack of heads of 64, two for each of keys and values."""
    torch.manual_seed(seed)
    heads = width // 64
    text = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": 1000,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]},
    }
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": width, "num_heads": 2, "intermediate_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    module = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in module.model.language_model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.normal_(0, (sharpness if "q_proj" in name or "k_proj" in name else 1) * width**-0.5)
            elif "embed" in name:
                weight.normal_(0, 1)
    return Model("random", module.to(dtype), None, None, "", QWEN2_5_VL, "")  # type: ignore[arg-type]


def batch_of(lengths: list[int], seed: int) -> Batch:
    """Random tokens, padded on the left to the longest."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(10, 1000, (len(lengths), longest), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in zip(mask, lengths, strict=True):
        row[: longest - length] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids).int()}
    return Batch(inputs, (), tuple(longest - length for length in lengths))


def record(model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals ``[layer, episode, head, row]`` and masses ``[…, segment]`` of the last eight rows."""
    n, length = batch.inputs["input_ids"].shape
    rows = torch.arange(length - 8, length).expand(n, -1)
    index = torch.full((n, length), -1)
    for row, pad in zip(index, batch.pads, strict=True):
        row[pad:] = torch.arange(length - pad) * N_SEGMENTS // (length - pad)
    segments = measure.one_hot_segments(index, N_SEGMENTS)

    def reduce(values: LayerValues) -> dict[str, torch.Tensor]:
        at, heads = values.attention, values.heads
        assert at is not None and heads is not None  # both are asked for
        attention = measure.row_attention(at.q, at.k, at.mask, at.scale, at.causal, rows)
        outputs = measure.segment_outputs(attention, at.v, segments).sum(3)
        own = heads[:, -8:].transpose(1, 2)
        return {"residual": measure.residual(outputs, own), "mass": measure.segment_mass(attention, segments)}

    reading = read(model, batch, ("attention", "heads"), reduce)
    found = [reading.layers[layer] for layer in sorted(reading.layers)]
    return torch.stack([f["residual"] for f in found]), torch.stack([f["mass"] for f in found])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    columns = ("dtype", "length", "width", "sharpness", "residual: largest", "99 %", "bound", "alone: largest")
    table = Table(*columns, box=None)
    cells = [
        (dtype, length, width, sharpness)
        for dtype in DTYPES
        for length in arguments.lengths
        for width in arguments.widths
        for sharpness in (1.0, 4.0)
    ]
    for dtype, length, width, sharpness in track(cells, description="measuring", transient=True):
        residuals, off = [], 0.0
        for seed in range(arguments.seeds):
            model = make_model(width, arguments.layers, sharpness, dtype, seed)
            lengths = [length, length * 3 // 4]
            batch = batch_of(lengths, seed)
            residual, mass = record(model, batch)
            residuals.append(residual.flatten())
            pad = batch.pads[1]
            inputs = {name: value[1:, pad:] for name, value in batch.inputs.items()}
            _, alone = record(model, Batch(inputs, (), (0,)))
            off = max(off, (mass[:, 1] - alone[:, 0]).abs().max().item())
        everything = torch.cat(residuals)
        table.add_row(
            str(dtype).removeprefix("torch."),
            str(length),
            str(width),
            f"{sharpness:g}",
            f"{everything.max():.1e}",
            f"{everything.quantile(0.99):.1e}",
            f"{RESIDUAL_BOUND[dtype]:g}",
            f"{off:.1e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
