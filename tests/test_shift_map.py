"""The shift map against eager models that are taken apart by hand, and from the command line to the figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import probe.experiments.shift_map as module
from probe.cli import run
from probe.data.example import Episode
from probe.errors import ProbeError, UsageError
from probe.experiments.shift_map import shift_map
from probe.measures.shift_summary import summarise_shift
from probe.models.load import load
from probe.models.model import Model
from probe.models.sites import decoder_of
from probe.plots.shift_map import plot_shift_map
from probe.segments import group_lift, group_mass
from tests.test_shift import made_up
from tests.tiny_families import MODEL_TYPES, build
from tests.tiny_qwen import make_episode

SIZES = ((84, 56), (40, 40))


def answered(episode: Episode, answer: str) -> Episode:
    return replace(episode, query=replace(episode.query, answers=(answer,)))


UNLIKE = [
    make_episode(2, seed=2, sizes=SIZES),
    make_episode(1, seed=5, sizes=SIZES),
    make_episode(3, seed=3, images=0),
    answered(make_episode(1, seed=4, sizes=SIZES), "a"),
]
"""Unlike in length; the third has no images, the fourth an answer of a single token."""


@cache
def models(kind: str, **text: Any) -> tuple[Model, Model]:
    """The same weights twice: with the kernel that users run, and eager."""
    made, eager = build(kind, **text), build(kind, attn="eager", **text)
    return load(made.module, processor=made.processor), load(eager.module, processor=eager.processor)


@contextmanager
def taken(model: Model) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Weights and values of every eager attention to the text, by layer."""
    sites = {model.module.get_submodule(site.attention): site.layer for site in model.sites if site.axis == "text"}
    home = sys.modules[type(next(iter(sites))).__module__]
    original, found = home.eager_attention_forward, {}

    def run(attention, query, key, value, *args, **kwargs):
        output, weights = original(attention, query, key, value, *args, **kwargs)
        if attention in sites:
            found[sites[attention]] = weights, value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return output, weights

    home.eager_attention_forward = run
    try:
        yield found
    finally:
        home.eager_attention_forward = original


@contextmanager
def hooked(part: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What a module is given."""
    seen: list[torch.Tensor] = []
    handle = part.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def frozen_logits(eager: Model, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What the unembedding makes of one stream, with the final norm dividing as it does for another."""
    norm: Any = decoder_of(eager.module).norm
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    weight = norm.weight + 1 if type(norm).__name__.startswith("Gemma") else norm.weight
    head: Any = eager.module.get_output_embeddings()
    return head(weight * after / (before.square().mean() + epsilon).sqrt())


# ------------------------------------------------------------------------------------------------ against eager models


@torch.no_grad()
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_number_is_that_of_an_eager_model_taken_apart(kind):
    """Weights of the full softmax, plain loops over rows and heads, and the model's own unembedding."""
    ours, eager = models(kind)
    episode = UNLIKE[0]
    result = shift_map(ours, [episode, UNLIKE[1]]).isel(episode=0)
    encoding = eager.encode(episode)
    with taken(eager) as found, hooked(decoder_of(eager.module).norm) as stream:
        logits = eager.module(**{**eager.batch([encoding]).inputs, "use_cache": False}).logits[0]
    at = encoding.token_map
    in_d = torch.from_numpy(at.demonstration >= 0)
    rows = {"answer": [at.answer[0] - 1], "answer_rest": [place - 1 for place in at.answer[1:]]}
    assert rows["answer_rest"]
    assert sorted(found) == result["layer"].values.tolist()
    for layer, (weights, values) in found.items():
        block = eager.layers[layer]
        weight = block.self_attn.o_proj.weight
        for name, places in rows.items():
            own = result.sel(row=name, layer=layer)
            for head in range(eager.n_heads):
                a, v = weights[0, head], values[0, head]
                columns = slice(head * v.shape[1], (head + 1) * v.shape[1])
                mus, differences, vectors, sizes, effects = [], [], [], [], []
                for place in places:
                    mu = a[place][in_d].sum()
                    mus.append(float(mu))
                    difference = a[place][in_d] @ v[in_d] / mu - a[place][~in_d] @ v[~in_d] / a[place][~in_d].sum()
                    vector = mu * difference if mu > 0 else torch.zeros_like(v[0])
                    written = weight[:, columns] @ vector
                    if kind == "gemma3":  # a norm stands behind the output projection
                        whole = (weights[0, :, place, None] @ values[0]).flatten() @ weight.T
                        norm = block.post_attention_layernorm
                        written = (1 + norm.weight) * written / (whole.square().mean() + norm.eps).sqrt()
                    if mu > 0:
                        differences.append(float(difference.norm()))
                    vectors.append(vector)
                    sizes.append(float(written.norm()))
                    x = stream[0][0, place]
                    moved = frozen_logits(eager, x, x) - frozen_logits(eager, x, x - written)
                    effects.append(float(moved[encoding.ids[place + 1]] - moved.mean()))
                got = own.sel(head=head)
                close = {"rtol": 2e-3, "atol": 2e-4}
                np.testing.assert_allclose(float(got["mu"]), np.mean(mus), **close)
                np.testing.assert_allclose(float(got["shift"]), np.mean(sizes), **close)
                np.testing.assert_allclose(float(got["logit_effect"]), np.mean(effects), **close)
                if np.sum(mus) > 0:
                    np.testing.assert_allclose(float(got["difference"]), np.mean(differences), **close)
                    mean = torch.stack(vectors).mean(0)
                    np.testing.assert_allclose(got["mu"] * got["difference_vector"], mean, **close)
                else:
                    assert np.isnan(got["difference"])
                    assert got["difference_vector"].isnull().all()
    for name, places in rows.items():
        said = [float(logits[p, encoding.ids[p + 1]] - logits[p].mean()) for p in places]
        np.testing.assert_allclose(float(result["answer_logit"].sel(row=name)), np.mean(said), rtol=1e-4, atol=1e-4)
    assert float(result["residual"].max()) < 1e-6
    assert (result["logit_residual"] < 1e-6).all()


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_episodes_of_a_batch_are_measured_as_if_alone(kind):
    ours, _ = models(kind)
    together, alone = shift_map(ours, UNLIKE), shift_map(ours, UNLIKE, batch_size=1)
    for name in together.data_vars:
        if name not in ("residual", "logit_residual"):
            xr.testing.assert_allclose(together[name], alone[name], rtol=5e-3, atol=1e-4)
    assert together["half"].values.tolist() == ["select", "report", "select", "report"]
    part = shift_map(ours, UNLIKE[:1], layers=[0])
    xr.testing.assert_allclose(part["shift"], alone["shift"].isel(episode=[0]).sel(layer=[0]), rtol=1e-4)


@torch.no_grad()
def test_direct_effects_of_all_that_writes_add_up_to_the_logit():
    """Of every head whole, with biases, MLPs and the embedding: nothing is left out and nothing counted twice."""
    from probe.experiments.attention_dataset import Plan
    from probe.experiments.attention_reducer import BatchRows
    from probe.experiments.shift_reducer import Readout
    from probe.measures.shift import direct_effect, frozen_scale
    from probe.models.token_map import segments_for

    ours, _ = models("qwen2_5_vl")
    encoding = ours.encode(UNLIKE[0])
    batch = ours.batch([encoding])
    place = encoding.n_prompt - 1
    parts: list[torch.Tensor] = []
    decoder = decoder_of(ours.module)
    handles = [layer.mlp.register_forward_hook(lambda *x: parts.append(x[2][0, place])) for layer in ours.layers]
    before: list[torch.Tensor] = []
    for layer in ours.layers:
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: before.append(x[0][0, place])))
    with hooked(decoder.layers[0]) as embedded, hooked(decoder.norm) as stream:
        logits = ours.module(**ours.inputs(batch)).logits[0, place]
    for handle in handles:
        handle.remove()
    readout = Readout.of(ours)
    rows = BatchRows.of(batch, Plan("answer", [0], segments_for(2)))
    answers = readout.of_answers(batch, rows)
    assert answers.tokens[0, 0] == encoding.ids[encoding.n_prompt]
    last = stream[0][:, place : place + 1]
    scale = frozen_scale(readout.norm(last), last, readout.gain)[0, 0]
    direction = answers.directions[:, :1]
    heads = sum(
        direct_effect(x.detach().unflatten(0, (ours.n_heads, -1))[None, :, None], ours.output_weight(layer), direction)
        for layer, x in enumerate(before)
    )
    rest = [embedded[0][0, place], *parts]
    total = float(heads.sum()) + sum(float(each.detach() @ direction[0, 0]) for each in rest)
    wanted = float(logits[encoding.ids[place + 1]] - logits.mean())
    assert total * float(scale) == pytest.approx(wanted, abs=1e-3)
    assert abs(wanted) > 0.1


# -------------------------------------------------------------------------------------------------- what is undefined


def test_a_window_that_hides_the_demonstrations():
    """Layers of Gemma 3 with a window of 8: undefined is not 0, and no shift is."""
    ours, _ = models("gemma3")
    long = make_episode(2, seed=2, sizes=SIZES)
    result = shift_map(ours, [long]).sel(row="answer")
    visible = result["n_visible"].where(result["demonstration"] >= 0).sum("segment").isel(episode=0)
    hidden = visible["layer"].values[visible.values == 0].tolist()
    assert hidden == [0, 1, 3]
    for layer in hidden:
        own = result.isel(episode=0).sel(layer=layer)
        assert (own["mu"] == 0).all()
        assert (own["shift"] == 0).all()
        assert (own["logit_effect"] == 0).all()
        assert own["difference"].isnull().all()
        assert own["difference_vector"].isnull().all()
    seen = result.isel(episode=0).sel(layer=2)
    assert (seen["mu"] > 0).all()
    assert seen["difference"].notnull().all()


def test_what_an_episode_lacks_is_missing():
    result = shift_map(models("qwen2_5_vl")[0], UNLIKE)
    several = result["n_positions"].sel(row="answer_rest").values > 0
    assert several.tolist() == [True, True, True, False]
    for name in ("mu", "difference", "shift", "logit_effect", "answer_logit"):
        given = result[name].sel(row="answer_rest").notnull().values.reshape(len(UNLIKE), -1)
        assert given.all(1).tolist() == given.any(1).tolist() == several.tolist()
    for name in ("mass", "n_visible"):
        given = result[name].sel(row="answer_rest", segment="sink").notnull().values.reshape(len(UNLIKE), -1)
        assert given.all(1).tolist() == given.any(1).tolist() == several.tolist()
    mass = result["mass"].sel(row="answer")
    assert mass.isel(episode=0).sel(segment="demo2/image").isnull().all()
    assert mass.isel(episode=2).sel(segment="demo0/image").isnull().all()
    np.testing.assert_allclose(
        mass.where(mass["demonstration"] >= 0).sum("segment"), result["mu"].sel(row="answer"), atol=1e-6
    )
    np.testing.assert_allclose(group_mass(result).sum("group"), 1, atol=1e-5)
    assert (group_lift(result).isel(episode=0) > 0).all()


@pytest.mark.parametrize("kind", ["idefics", "mllama"])
@pytest.mark.parametrize("episodes", [[UNLIKE[0], UNLIKE[1]], [UNLIKE[2]]], ids=["images", "text alone"])
def test_through_cross_attention_the_text_shifts(kind, episodes):
    ours, _ = models(kind)
    result = shift_map(ours, episodes)
    assert "undefined" in result.attrs["image_mass"]
    assert result["layer"].values.tolist() == ours.choose_layers(None)
    assert result["mass"].sel(segment="demo0/image").isnull().all()
    assert (result["mu"].sel(row="answer") > 0).all()
    if len(episodes) > 1:
        summary = summarise_shift(result)
        assert summary["mu_by_modality"].sel(modality="visual").isnull().all()
        assert (summary["mu_by_modality"].sel(modality="textual", end="estimate") > 0).all()
        assert "is of text alone" in plot_shift_map(result).to_json()
    assert "image_mass" not in shift_map(models("qwen2_5_vl")[0], [UNLIKE[0]], layers=[0]).attrs


@pytest.mark.parametrize("episode", [UNLIKE[0], UNLIKE[2]], ids=["images", "text alone"])
def test_a_last_layer_of_cross_attention(episode):
    """What the final norm reads is then what cross-attention leaves, or without images what it was left."""
    ours, _ = models("mllama", num_hidden_layers=5)
    assert ours.sites[-1].axis == "vision"
    result = shift_map(ours, [episode], layers=[0])
    assert result["layer"].values.tolist() == [0]
    assert (result["logit_residual"] < 1e-6).all()


# ------------------------------------------------------------------------------------------------------ the experiment


def test_parts_are_kept_by_content():
    ours, _ = models("qwen2_5_vl")
    kept: dict[str, xr.Dataset] = {}

    def keep(name, compute):
        return kept[name] if name in kept else kept.setdefault(name, compute())

    done: list[int] = []
    first = shift_map(ours, UNLIKE, layers=[0], batch_size=3, keep=keep, progress=done.append)
    assert done == [3, 4]
    assert len(kept) == 2
    xr.testing.assert_identical(shift_map(ours, UNLIKE, layers=[0], batch_size=3, keep=keep), first)
    shift_map(ours, UNLIKE[:3], layers=[1], keep=keep)
    shift_map(ours, [UNLIKE[1], UNLIKE[0], UNLIKE[2]], layers=[0], keep=keep)
    assert len(kept) == 4
    shift_map(ours, [UNLIKE[1], UNLIKE[3]], layers=[0], batch_size=1, keep=keep)
    shift_map(ours, [UNLIKE[1], UNLIKE[2]], layers=[0], batch_size=1, keep=keep)  # with segments of more shots
    assert len(kept) == 8


def test_what_cannot_be_rebuilt_is_refused(monkeypatch):
    ours, _ = models("qwen2_5_vl")
    from probe.experiments import shift_reducer

    with monkeypatch.context() as patch:
        original = shift_reducer.measure.row_attention
        patch.setattr(shift_reducer.measure, "row_attention", lambda *rest: original(*rest) * 1.01)
        with pytest.raises(ProbeError, match=r"heads' outputs cannot be rebuilt.* layer \d they are off by 0\.01"):
            shift_map(ours, UNLIKE[:1])
    with monkeypatch.context() as patch:
        patch.setattr(shift_reducer, "norm_gain", lambda norm: norm.weight.detach() * torch.linspace(1, 1.1, 64))
        with pytest.raises(ProbeError, match="answer's logits cannot be rebuilt"):
            shift_map(ours, UNLIKE[:1])
    broken = build("qwen2_5_vl")
    broken.module.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(ProbeError, match="not finite"):
        shift_map(load(broken.module, processor=broken.processor), UNLIKE[:1])


def test_in_bfloat16_it_is_nearly_the_same():
    made = build("qwen2_5_vl")
    coarse = load(made.module.bfloat16(), processor=made.processor)
    found, wanted = shift_map(coarse, UNLIKE), shift_map(models("qwen2_5_vl")[0], UNLIKE)
    assert 1e-4 < float(found["residual"].max()) < 1e-2
    assert found["mu"].dtype == np.float32
    assert float(abs(found["mu"] - wanted["mu"]).mean()) < 0.05


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest storage that an operation makes."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.made = max(self.made, x.untyped_storage().nbytes())
        return out


def test_nothing_of_the_size_of_all_pairs_is_made(monkeypatch):
    """Of a long episode and one head's pairs of positions; the mask that the model itself makes is left aside."""
    ours, _ = models("qwen2_5_vl")
    original, mode = module.make_reducer, Largest()

    def watched(*arguments):
        reduce = original(*arguments)

        def watch(values):
            with mode:
                return reduce(values)

        return watch

    monkeypatch.setattr(module, "make_reducer", watched)
    long = answered(make_episode(8, seed=2, sizes=SIZES), "a")
    length = len(ours.encode(long))
    shift_map(ours, [long])
    assert 0 < mode.made < 4 * length**2


@pytest.mark.parametrize(
    ("episodes", "options", "words"),
    [
        ([], {}, "no episodes"),
        ([UNLIKE[0], make_episode(0, seed=1)], {}, "Episode episode1 has no demonstrations, .* one shot or more"),
        (UNLIKE[:1] * 2, {}, "the same id"),
        (UNLIKE, {"batch_size": 0}, "at least one"),
        (UNLIKE, {"layers": [9]}, "asked for 9"),
    ],
)
def test_misuse_is_refused(episodes, options, words):
    with pytest.raises(UsageError, match=words):
        shift_map(models("qwen2_5_vl")[0], episodes, **options)


def test_layers_of_cross_attention_alone_are_refused():
    ours, _ = models("mllama")
    with pytest.raises(UsageError, match="cross-attention alone"):
        shift_map(ours, UNLIKE[:1], layers=ours.choose_layers(None, "vision"))


def test_a_rule_that_stays_the_same_is_a_more_constant_shift():
    """The bundled model's head 4.3, whose shift tells which number is added."""
    from probe.data.tasks import synthetic_episodes

    ours = load("toy")
    shares = []
    for task in ("operator", "operator:3"):
        result = shift_map(ours, synthetic_episodes(task, shots=8, n=24, seed=1), layers=[4])
        shares.append(float(summarise_shift(result)["explained"].sel(layer=4, head=3, end="estimate")))
    assert shares[0] < 0.5 < 0.8 < shares[1]


# --------------------------------------------------------------------------------------- summary, figure, command line


def test_the_figure_shows_the_summary():
    result = made_up()
    summary = summarise_shift(result)
    figure = plot_shift_map(result)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(maps) == 7
    names = ("mu", "shift", "logit_effect", "agreement", "explained", "effective_rank", "mu_by_demonstration")
    for trace, name in zip(maps, names, strict=True):
        np.testing.assert_allclose(trace.z, summary[name].sel(end="estimate"))
    bars = {trace.name: trace.x for trace in figure.data if trace.type == "bar"}
    np.testing.assert_allclose(bars["textual"], summary["mu_by_modality"].sel(modality="textual", end="estimate"))
    marks = [trace for trace in figure.data if trace.type == "scatter"]
    crosses = [set(zip(trace.x, trace.y, strict=True)) for trace in marks if trace.marker.symbol == "x-thin-open"]
    assert (0, 0) not in crosses[2] | crosses[3] | crosses[4]  # of effect, agreement and what is explained
    assert (1, 0) in crosses[2] & crosses[3] & crosses[4]
    text = figure.to_json()
    for words in ("only a toy", "a &lt;b", "knockout", "12 reporting episodes"):
        assert words in text
    assert plot_shift_map(made_up().isel(episode=[0])).data  # nothing to report: hatched, not broken


@pytest.fixture
def command(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """The command line, in an empty directory: exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(["shift-map", *arguments])
        return code, *capsys.readouterr()

    return call


def test_the_command(command):
    arguments = ("--task", "operator", "--episodes", "8", "--shots", "2")
    code, out, _ = command(*arguments, "--top", "2")
    assert code == 0
    for words in ("logit is", "Heads that are shifted most", "structural", "explained", "seeded", "knockout"):
        assert words in out
    [directory] = Path("probe-runs").iterdir()
    assert directory.name.startswith("shift-map-toy-operator-")
    assert "<html" in (directory / "shift_map.html").read_text()[:200]
    again = json.loads(command(*arguments, "--json")[1])
    assert again["reused"]
    assert (again["experiment"], again["n_reported"], len(again["heads"])) == ("shift_map", 4, 24)
    head = next(head for head in again["heads"] if head["rank"] == 1)
    assert head["shift"]["low"] <= head["shift"]["estimate"] <= head["shift"]["high"]
    assert set(again["mu_by_demonstration"]["4"]) == {"0", "1"}
    from figures.shift_map import main

    assert main([str(directory), "--out", "figure.html"]) == 0
    assert Path("figure.html").exists()
    assert main([str(directory), "--row", "answer_rest"]) == 2


def test_the_command_refuses(command):
    for arguments, words in (
        (("--shots", "0"), "Without demonstrations nothing shifts a head"),
        (("--episodes", "1"), "give 2 or more"),
        (("--layers", "9"), "layers 0 to 5; asked for 9"),
        (("--layers", "all"), "not a choice of layers"),
        (("--top", "0"), "must be 1 or more"),
        (("--row", "last"), "answer-rest"),
    ):
        code, _, errors = command(*arguments)
        assert code == 2
        assert words in errors
    assert not list(Path().rglob("result.zarr"))
    code, _, errors = command("--row", "answer-rest", "--episodes", "2", "--shots", "1")
    assert code == 2
    assert "every answer is a single token" in errors
