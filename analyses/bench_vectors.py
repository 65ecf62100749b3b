"""What vectors cost: answering with one in the model, and training one through nnsight.

    python analyses/bench_vectors.py [--rounds 30]

Answering: time to the first token and of each further one, in batches of 16 queries of the bundled model, as ratios to
zero-shot; beside it the same for a random model of 28 layers, and eight demonstrations. Asked for at toy size of LIVE,
MimIC and M²IV-style: 1.15 times to the first token, 1.4 times for each further one; HiFICL, LoRA and an M²IV-style
vector merged into biases stand beside them. Training: one step of MimIC (forward, losses, backward, AdamW)
through nnsight and with plain torch hooks, on the same lessons; asked for: 1.3 times. Rounds are interleaved and a
ratio is taken within each; printed are medians with 95 % intervals from the order statistics.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import transformers.modeling_utils as hf
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import probe
from probe.experiments.vector_cost import vector_cost
from probe.experiments.ways import FEW, ZERO, Way
from probe.stats import median_interval
from probe.trace.gradients import frozen
from probe.vectors.hificl import Hificl
from probe.vectors.live import Live
from probe.vectors.lora import Lora
from probe.vectors.m2iv import M2iv
from probe.vectors.merge import merge
from probe.vectors.mimic import Mimic
from probe.vectors.teacher import Teacher
from probe.vectors.training import losses_of
from probe.vectors.vector import InContextVector

FIRST, PER_TOKEN, STEP = 1.15, 1.4, 1.3
METHODS = {"LIVE": Live(), "MimIC": Mimic(), "M²IV-style": M2iv()}
OTHERS = {"HiFICL": Hificl(), "LoRA": Lora()}


class Merged(Way):
    """A vector that has become part of the weights."""

    def put_into(self, model: probe.Model) -> probe.Model:
        assert isinstance(self.vector, InContextVector)
        return merge(model, self.vector)


def deep_model() -> probe.Model:
    """The bundled model's shape with 28 random layers in place of its own."""
    from copy import deepcopy
    from dataclasses import replace

    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    toy = probe.load("toy")
    config: AutoConfig = deepcopy(toy.config)
    config.text_config.num_hidden_layers = 28
    config.text_config.layer_types = ["full_attention"] * 28
    torch.manual_seed(0)
    module = Qwen2_5_VLForConditionalGeneration(config).eval()
    return replace(toy, name="28 random layers", module=module, caveat="")


def answering(model: probe.Model, rounds: int) -> None:
    """Print the ratios of answering."""
    episodes = probe.synthetic_episodes("operator:3", shots=8, n=16, seed=1)
    generator = torch.Generator().manual_seed(0)
    ways = [Way(ZERO, kind=ZERO), Way(FEW, shown=True, kind=FEW)]
    for name, method in {**METHODS, **OTHERS}.items():
        ways.append(Way(name, InContextVector(method, method.start(model, generator))))
    ways.append(Merged("M²IV-style, merged", InContextVector(M2iv(), M2iv().start(model, generator))))
    result = vector_cost(model, episodes, ways, rounds=rounds)
    print(f"\n{model.name}: answering, batches of 16, zero-shot = 1")
    for way in result["way"].values.tolist()[1:]:
        texts = []
        for part, bar in (("first", FIRST), ("per_token", PER_TOKEN)):
            ratios = (result[part].sel(way=way) / result[part].sel(way=ZERO)).values
            texts.append(f"{part} {judge(ratios, bar if way in METHODS and model.name == 'toy' else None)}")
        print(f"{way:18} " + "   ".join(texts))


def judge(ratios: np.ndarray, bar: float | None) -> str:
    low, high = median_interval(ratios)
    met = "" if bar is None else f" bar {bar:g}: {'met' if high <= bar else 'missed'}"
    return f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]{met}"


@contextmanager
def hooked(model: probe.Model, parameters: dict[str, torch.Tensor], states: dict[int, torch.Tensor]) -> Iterator[None]:
    """MimIC by plain torch hooks: the kernel's arguments are noted by an attention function of our own."""
    calls: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]] = {}
    layers = {id(layer.self_attn): number for number, layer in enumerate(model.layers)}

    def attend(module, q, k, *rest, **options):  # type: ignore[no-untyped-def]
        if id(module) in layers:
            calls[layers[id(module)]] = q, k, rest[1], options["scaling"]
        return sdpa_attention_forward(module, q, k, *rest, **options)

    def shift(number: int) -> Callable[..., tuple[torch.Tensor]]:
        def hook(_module: object, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            q, k, mask, scale = calls[number]
            scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
            n = q.shape[2]
            seen = torch.ones(n, n, dtype=torch.bool).tril() if mask is None else mask
            least = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~seen, least) if seen.dtype == torch.bool else scores + seen
            logit = torch.einsum("bhnd,hd->bhn", q, parameters["w"][number]) + parameters["b"][number][:, None]
            mu = torch.sigmoid(logit - scores.logsumexp(-1)).transpose(1, 2)[..., None]
            return ((inputs[0].unflatten(2, (model.n_heads, -1)) + mu * parameters["v"][number]).flatten(2),)

        return hook

    def note(number: int) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
            states[number] = output

        return hook

    handles = []
    for number, layer in enumerate(model.layers):
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(shift(number)))
        handles.append(layer.mlp.register_forward_hook(note(number)))
    own = hf.ALL_ATTENTION_FUNCTIONS["sdpa"]
    hf.ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
    try:
        yield
    finally:
        hf.ALL_ATTENTION_FUNCTIONS.register("sdpa", own)
        for handle in handles:
            handle.remove()


def training(model: probe.Model, plain: probe.Model, rounds: int) -> None:
    """Print the ratio of a step of MimIC; ``plain`` is the same model, which nnsight never touched."""
    method = Mimic()
    episodes = probe.synthetic_episodes("operator:3", shots=8, n=32, seed=1)
    teacher = Teacher(model)
    lessons = teacher.lessons(episodes, "mlp_output")
    start = method.start(model, torch.Generator().manual_seed(0))
    targets = torch.cat(teacher.states(lessons, "mlp_output"), 1)
    students = [lesson.student for lesson in lessons]
    batch = model.batch(students)
    rows = [torch.from_numpy(np.flatnonzero(student.token_map.demonstration == -1)) for student in students]
    episode = torch.cat([torch.full_like(row, b) for b, row in enumerate(rows)])
    position = torch.cat([row + pad for row, pad in zip(rows, batch.pads, strict=True)])
    answers = torch.tensor(
        [[int(student.ids[-1]), lesson.end] for student, lesson in zip(students, lessons, strict=True)]
    )

    def parameters() -> tuple[dict[str, torch.Tensor], torch.optim.AdamW]:
        own = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        return own, torch.optim.AdamW(own.values(), lr=1e-3)

    def descend(loss: torch.Tensor, optimiser: torch.optim.AdamW) -> None:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def through_nnsight(own: dict[str, torch.Tensor], optimiser: torch.optim.AdamW) -> float:
        terms = losses_of(method.student(model, own)(), lessons, teacher, method.objective)
        descend(terms["loss"], optimiser)
        return float(terms["loss"].detach())

    def with_hooks(own: dict[str, torch.Tensor], optimiser: torch.optim.AdamW) -> float:
        states: dict[int, torch.Tensor] = {}
        inputs = model.batch(students).inputs
        with hooked(plain, own, states):
            logits = plain.module(**inputs, logits_to_keep=2, use_cache=False).logits
        stacked = torch.stack([states[number][episode, position] for number in range(model.n_layers)])
        align = (stacked - torch.cat(teacher.states(lessons, "mlp_output"), 1)).square().mean()
        loss = align + 0.5 * torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        descend(loss, optimiser)
        return float(loss.detach())

    ways = {"nnsight": (through_nnsight, *parameters()), "hooks": (with_hooks, *parameters())}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    with frozen(model.module), frozen(plain.module):
        for turn in range(rounds + 3):
            for name in sorted(ways, reverse=bool(turn % 2)):
                step, own, optimiser = ways[name]
                began = time.perf_counter()
                loss = step(own, optimiser)
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - began)
                losses[name].append(loss)
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    ratios = np.array(seconds["nnsight"]) / np.array(seconds["hooks"])
    print(f"\n{model.name}: a step of MimIC on 32 queries, plain hooks = 1 (losses apart by at most {apart:.1e})")
    print(f"nnsight      {judge(ratios, STEP if model.name == 'toy' else None)}")
    print(
        f"             {1e3 * np.median(seconds['nnsight']):.1f} ms against {1e3 * np.median(seconds['hooks']):.1f} ms"
    )
    assert targets.shape[1] == len(episode)


def main() -> None:
    parser = argparse.ArgumentParser(description="What vectors cost.")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for make in (lambda: probe.load("toy"), deep_model):
        model = make()
        answering(model, given.rounds)
        training(model, make(), given.rounds)


if __name__ == "__main__":
    main()
