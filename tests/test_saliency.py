"""Saliency of attention against finite differences, against an eager model, and by hand."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import probe
import probe.experiments.saliency as module
from probe.data.tasks import synthetic_episodes
from probe.errors import ProbeError, UsageError
from probe.experiments.saliency import layer_saliency, saliency
from probe.measures.saliency import ANCHOR_FLOWS, FLOWS, SPLIT_FLOWS, Groups, flows, saliency_matrix
from probe.measures.saliency_summary import summarise_saliency
from probe.models.load import load
from probe.models.model import Model
from probe.plots.saliency import plot_saliency
from probe.trace.read import read
from tests.tiny_families import build
from tests.tiny_qwen import make_episode

SIZES = ((84, 56), (40, 40))
UNLIKE = [
    make_episode(2, seed=2, sizes=SIZES),
    make_episode(0, seed=1, sizes=SIZES),
    make_episode(3, seed=3, images=0),
    make_episode(1, seed=5, sizes=SIZES),
]
"""The first three answers have several tokens."""

STEP = 1e-2  # of finite differences; norms and softmax are in float32 in any model, so it cannot be much smaller


@cache
def models(kind: str) -> tuple[Model, Model]:
    """The same weights twice: with the kernel that users run, and eager."""
    made, eager = build(kind), build(kind, attn="eager")
    return load(made.module, processor=made.processor), load(eager.module, processor=eager.processor)


@contextmanager
def patched(model: Model, change: Callable[..., Any]) -> Iterator[None]:
    """Let ``change(layer, weights, values, output)`` replace the outputs of every eager attention to the text."""
    sites = {model.module.get_submodule(site.attention): site.layer for site in model.sites if site.axis == "text"}
    home = sys.modules[type(next(iter(sites))).__module__]
    original = home.eager_attention_forward

    def run(module, query, key, value, *args, **kwargs):
        output, weights = original(module, query, key, value, *args, **kwargs)
        if module in sites:
            values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            output = change(sites[module], weights, values, output)
        return output, weights

    home.eager_attention_forward = run
    try:
        yield
    finally:
        home.eager_attention_forward = original


def loss_of(model: Model, batch: Any, *, gradients: bool = False) -> torch.Tensor:
    """``-log p`` of the answers, token by token."""
    logits = read(model, batch, logits_to_keep=0, gradients=gradients).logits.double().log_softmax(-1)
    total = logits.new_zeros(())
    for row, encoding, pad in zip(logits, batch.encodings, batch.pads, strict=True):
        for place in range(encoding.n_prompt, len(encoding)):
            total = total - row[pad + place - 1, encoding.ids[place]]
    return total


# -------------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3", "mllama"])
def test_an_entry_is_what_scaling_the_attention_there_does_to_the_loss(kind):
    ours, eager = models(kind)
    episode = make_episode(2, seed=2, sizes=SIZES)
    layer = ours.choose_layers(None)[1]
    found = layer_saliency(ours, ours.batch([ours.encode(episode)]), layer)
    batch = eager.batch([eager.encode(episode)])
    matrix = found.matrix[0].fill_diagonal_(0)
    entries = matrix.flatten().topk(40).indices[::8].tolist()
    for row, key in (divmod(entry, len(matrix)) for entry in entries):
        scale = [0.0]

        def change(at, weights, values, output, row=row, key=key, scale=scale):
            if at == layer:  # as if the weight of every head were multiplied by 1 + scale
                added = scale[0] * weights[:, :, row, key, None] * values[:, :, key]
                output = output.clone()
                output[:, row] += added
            return output

        ends = []
        with patched(eager, change):
            for scale[0] in (STEP, -STEP):
                ends.append(float(loss_of(eager, batch)))
        assert float(matrix[row, key]) == pytest.approx(abs(ends[0] - ends[1]) / (2 * STEP), rel=5e-3)
        assert matrix[row, key] > 1e-3


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics", "paligemma"])
def test_it_equals_the_gradient_of_all_layers_at_once(kind):
    """Of an eager model, whose graph holds every layer's weights; several episodes, padded."""
    ours, eager = models(kind)
    episodes = [make_episode(1, seed=seed, sizes=SIZES) for seed in (2, 4, 6)]
    batch = ours.batch([ours.encode(episode) for episode in episodes])
    assert max(batch.pads) > 0
    kept: dict[int, torch.Tensor] = {}

    def note(layer, weights, values, output):
        kept[layer] = weights
        # The weights have to be those that the graph uses.
        return (weights @ values).transpose(1, 2)

    twin = eager.batch([eager.encode(episode) for episode in episodes])
    with patched(eager, note):
        gradients = torch.autograd.grad(loss_of(eager, twin, gradients=True), list(kept.values()))
    for (layer, weights), gradient in zip(kept.items(), gradients, strict=True):
        found = layer_saliency(ours, batch, layer)
        for row, pad, a, g in zip(found.matrix, batch.pads, weights.detach(), gradient, strict=True):
            wanted = (a * g).sum(0).abs()[pad:, pad:]
            assert (row[pad:, pad:] - wanted).abs().max() < 1e-4 * wanted.max()


def test_parameters_are_left_as_they_were():
    ours, _ = models("qwen2_5_vl")
    asked = [parameter.requires_grad for parameter in ours.module.parameters()]
    assert any(asked)
    saliency(ours, UNLIKE[:1], layers=[1])
    assert [parameter.requires_grad for parameter in ours.module.parameters()] == asked
    assert all(parameter.grad is None for parameter in ours.module.parameters())


def test_there_is_one_matrix_at_a_time(monkeypatch):
    """Counted in the graph and among the leaves, while layer after layer is read."""
    ours, _ = models("qwen2_5_vl")
    batch = ours.batch([ours.encode(UNLIKE[0])])
    size = ours.n_heads * batch.length**2
    leaves: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    saved: list[torch.Tensor] = []
    original = module.row_attention

    def noted(*arguments):
        assert not saved  # the graph begins here, and holds nothing of what is below
        alive.append(sum(leaf() is not None for leaf in leaves))
        made = original(*arguments)
        leaves.append(weakref.ref(made))
        return made

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    monkeypatch.setattr(module, "row_attention", noted)
    for layer in ours.choose_layers(None):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer_saliency(ours, batch, layer)
        large = {each.data_ptr() for each in saved if each.numel() >= size and each.shape[-1] == each.shape[-2]}
        assert len(saved) > 3
        assert len(large) <= 1
        saved.clear()
    saliency(ours, UNLIKE[:2], batch_size=1)
    assert alive == [0] * 3 * ours.n_layers


# ------------------------------------------------------------------------------------------------------------ by hand


def test_heads_are_summed_before_the_absolute_value():
    attention, gradient = torch.tensor([[[[0.5]], [[0.25]]]]), torch.tensor([[[[2.0]], [[-8.0]]]])
    assert saliency_matrix(attention, gradient).tolist() == [[[1.0]]]


def by_hand() -> tuple[torch.Tensor, torch.Tensor, Groups]:
    """Eight positions: sink, V0, Q0, A0, Vq, Vq, Qq, q; the entry (i, j) is 10 i + j, the diagonal and above huge."""
    n = 8
    places = torch.arange(n)
    matrix = (10.0 * places[:, None] + places).triu(0) * 1e6 + (10.0 * places[:, None] + places).tril(-1)
    mark = lambda *at: torch.isin(places, torch.tensor(at))  # noqa: E731
    groups = Groups(mark(7), mark(1)[None], mark(2)[None], mark(3)[None], mark(4, 5), mark(6))
    return matrix, torch.ones(n, n, dtype=torch.bool).tril(), groups


def test_flows_of_a_matrix_by_hand():
    found = flows(*by_hand())
    total, n = (dict(zip(FLOWS, values.tolist(), strict=True)) for values in (found.total, found.n_pairs))
    everything = sum(10 * i + j for i in range(8) for j in range(i))
    assert (total["wp"], n["wp"]) == (30 + 31 + 32, 3)
    assert (total["pq"], n["pq"]) == (73, 1)
    assert (total["ww"], n["ww"]) == (everything - 93 - 73, 28 - 4)
    assert (total["image->answer"], n["image->answer"]) == (31, 1)
    assert (total["question->answer"], n["question->answer"]) == (32, 1)
    assert (total["answer->q"], n["answer->q"]) == (73, 1)
    assert (total["image->q"], n["image->q"]) == (71, 1)
    assert (total["question->q"], n["question->q"]) == (72, 1)
    assert (total["query image->q"], n["query image->q"]) == (74 + 75, 2)
    assert (total["query question->q"], n["query question->q"]) == (76, 1)
    assert (total["rest"], n["rest"]) == (everything - 31 - 32 - 73 - 71 - 72 - 149 - 76, 28 - 8)
    assert float(found.mean[FLOWS.index("query image->q")]) == 149 / 2
    assert found.demonstration_total[:, 0].tolist() == [31, 32, 73, 71, 72]


def test_a_demonstrations_answer_takes_from_its_own_image_alone():
    """Two demonstrations, V0 A0 V1 A1 q; what A1 takes from V0 is of the rest."""
    places = torch.arange(5)
    mark = lambda *at: torch.isin(places, torch.tensor(at))  # noqa: E731
    none = mark(9)
    own = (torch.stack(pair) for pair in ((mark(0), mark(2)), (none, none), (mark(1), mark(3))))
    groups = Groups(mark(4), *own, none, none)
    matrix = torch.zeros(5, 5)
    matrix[3, 0], matrix[3, 2], matrix[1, 0] = 5, 7, 11
    found = flows(matrix, torch.ones(5, 5, dtype=torch.bool).tril(), groups)
    total = dict(zip(FLOWS, found.total.tolist(), strict=True))
    assert total["wp"] == 23
    assert total["image->answer"] == 18
    assert total["rest"] == 5
    assert found.demonstration_total[0].tolist() == [11, 7]
    assert torch.isnan(found.mean[FLOWS.index("question->answer")])


def test_a_window_takes_pairs_away():
    matrix, visible, groups = by_hand()
    hidden = visible.triu(-2)  # a row sees two positions before it
    found = flows(matrix, hidden, groups)
    n = dict(zip(FLOWS, found.n_pairs.tolist(), strict=True))
    assert (n["pq"], n["wp"], n["query image->q"]) == (0, 2, 1)
    assert torch.isnan(found.mean[FLOWS.index("pq")])


def test_both_families_of_flows_are_partitions():
    result = saliency(models("qwen2_5_vl")[0], UNLIKE)
    n = result["n_pairs"]
    assert (n.sel(flow=list(ANCHOR_FLOWS)).sum("flow") == n.sel(flow=list(SPLIT_FLOWS)).sum("flow")).all()
    ours = models("qwen2_5_vl")[0]
    for episode, length in zip(result["episode"], (ours.encode(e).n_prompt for e in UNLIKE), strict=True):
        assert (n.sel(episode=episode, flow=list(ANCHOR_FLOWS)).sum("flow") == length * (length - 1) // 2).all()
    total = (result["saliency"].fillna(0) * n).sel(flow=list(ANCHOR_FLOWS)).sum("flow")
    split = (result["saliency"].fillna(0) * n).sel(flow=list(SPLIT_FLOWS)).sum("flow")
    xr.testing.assert_allclose(total, split)
    own = (result["demonstration_saliency"] * result["demonstration_n_pairs"]).sum("demonstration")
    pooled = (result["saliency"] * n).sel(flow=result["demonstration_flow"].values).fillna(0)
    np.testing.assert_allclose(own.values, pooled.values)


# ------------------------------------------------------------------------------------------------------- the experiment


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3", "internvl"])
def test_episodes_of_a_batch_are_measured_as_if_alone(kind):
    ours, _ = models(kind)
    episodes = UNLIKE if kind == "qwen2_5_vl" else [UNLIKE[0], UNLIKE[3]]
    together, alone = saliency(ours, episodes, batch_size=4), saliency(ours, episodes, batch_size=1)
    for name in together.data_vars:
        if name != "residual":
            xr.testing.assert_allclose(together[name], alone[name], rtol=2e-3, atol=1e-8)
    assert dict(together.sizes)["demonstration"] == max(e.shots for e in episodes)
    part = saliency(ours, episodes[:1], layers=[1])
    xr.testing.assert_allclose(part["saliency"], alone["saliency"].isel(episode=[0]).sel(layer=[1]), rtol=1e-4)


def test_the_loss_is_that_of_the_whole_answer():
    from probe.trace.likelihood import likelihoods

    ours, _ = models("qwen2_5_vl")
    result = saliency(ours, UNLIKE, layers=[0])
    said = likelihoods(ours, UNLIKE, [[episode.query.answer] for episode in UNLIKE])
    np.testing.assert_allclose(result["loss"], [-float(each.total[0]) for each in said], rtol=1e-4)
    assert result["n_answer_tokens"].values.tolist() == [int(each.n_tokens[0]) for each in said]
    assert result["n_answer_tokens"].max() > 1


def test_in_the_last_layer_nothing_flows_to_answers():
    result = saliency(models("qwen2_5_vl")[0], UNLIKE)
    last, first = (result["saliency"].isel(layer=at).sel(flow=["wp", "image->answer"]) for at in (-1, 0))
    assert (last.fillna(0) == 0).all()
    assert (first.isel(episode=0) > 0).all()


def test_what_is_absent_is_missing():
    result = saliency(models("qwen2_5_vl")[0], UNLIKE)
    zero_shot = result.isel(episode=1)
    of_demonstrations = ["wp", "pq", "image->answer", "answer->q", "question->q"]
    assert zero_shot["saliency"].sel(flow=of_demonstrations).isnull().all()
    assert (zero_shot["n_pairs"].sel(flow=of_demonstrations) == 0).all()
    assert (zero_shot["saliency"].sel(flow=["ww", "query image->q"]) > 0).all()
    assert zero_shot["demonstration_saliency"].isnull().all()
    own = result.isel(episode=2)["demonstration_saliency"]
    assert own.sel(demonstration_flow=["image->answer", "image->q"]).isnull().all()
    assert (own.sel(demonstration_flow="answer->q") > 0).all()
    assert result.isel(episode=0)["demonstration_saliency"].notnull().all("demonstration_flow").all("layer").sum() == 2
    text = result.isel(episode=2)["saliency"]
    assert text.sel(flow=["image->answer", "image->q", "query image->q"]).isnull().all()
    assert (text.sel(flow=["pq", "query question->q"]) > 0).all()


@pytest.mark.parametrize("kind", ["idefics", "mllama"])
def test_through_cross_attention_no_image_flow_is_defined(kind):
    ours, _ = models(kind)
    result = saliency(ours, [UNLIKE[0]])
    assert "undefined" in result.attrs["image_flows"]
    images = [flow for flow in FLOWS if "image" in flow]
    assert result["saliency"].sel(flow=images).isnull().all()
    assert (result["n_pairs"].sel(flow=images) == 0).all()
    assert (result["saliency"].sel(flow=["pq", "question->q"]) > 0).all()
    assert result["layer"].values.tolist() == ours.choose_layers(None)
    assert "image_flows" not in saliency(models("qwen2_5_vl")[0], [UNLIKE[0]], layers=[0]).attrs
    assert "undefined" in plot_saliency(result).to_json()


def test_where_a_model_binds_labels_its_answers_take_from_their_images():
    """The bundled model and its control, which says one of the labels and does not know whose it is."""
    episodes = synthetic_episodes("binding-uncued", shots=4, n=4, seed=7)
    shares = []
    for name in ("toy", "toy-no-binding"):
        found = saliency(probe.load(name), episodes, layers=[0, 1, 4])["saliency"].mean("episode").max("layer")
        shares.append(float(found.sel(flow="image->answer") / found.sel(flow="answer->q")))
    assert shares[0] > 0.1
    assert shares[1] < 0.01


def test_parts_are_kept_by_content():
    ours, _ = models("qwen2_5_vl")
    kept: dict[str, xr.Dataset] = {}

    def keep(name, compute):
        return kept[name] if name in kept else kept.setdefault(name, compute())

    done: list[int] = []
    first = saliency(ours, UNLIKE, layers=[0], batch_size=3, keep=keep, progress=done.append)
    assert done == [3, 4]
    assert len(kept) == 2
    xr.testing.assert_identical(saliency(ours, UNLIKE, layers=[0], batch_size=3, keep=keep), first)
    saliency(ours, UNLIKE[:3], layers=[1], keep=keep)
    saliency(ours, [UNLIKE[1], UNLIKE[0], UNLIKE[2]], layers=[0], keep=keep)
    assert len(kept) == 4


def test_what_cannot_be_differentiated_is_refused(monkeypatch):
    made = build("qwen2_5_vl")
    ours = load(made.module, processor=made.processor)
    made.module.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="gradient checkpointing on"):
        saliency(ours, UNLIKE[:1])
    made.module.gradient_checkpointing_disable()
    saliency(ours, UNLIKE[:1], layers=[0])
    with pytest.raises(UsageError, match="float16, in which small gradients"):
        saliency(load(made.module.half(), processor=made.processor), UNLIKE[:1])
    ours, _ = models("qwen2_5_vl")
    original = module.row_attention
    monkeypatch.setattr(module, "row_attention", lambda *rest: original(*rest) * 1.01)
    with pytest.raises(ProbeError, match=r"layer 2: the heads' outputs .* are off by 0\.01"):
        saliency(ours, UNLIKE[:1], layers=[2])


def test_in_bfloat16_it_is_nearly_the_same():
    made = build("qwen2_5_vl")
    coarse = load(made.module.bfloat16(), processor=made.processor)
    episodes = [UNLIKE[0], UNLIKE[3]]
    found, wanted = saliency(coarse, episodes), saliency(models("qwen2_5_vl")[0], episodes)
    assert found["residual"].max() > 1e-4
    ratio = found["saliency"].sel(flow="ww") / wanted["saliency"].sel(flow="ww")
    assert ((ratio > 0.7) & (ratio < 1.4)).all()


@pytest.mark.parametrize(
    ("episodes", "options", "words"),
    [
        ([], {}, "no episodes"),
        (UNLIKE[:1] * 2, {}, "the same id"),
        (UNLIKE, {"batch_size": 0}, "at least one"),
        (UNLIKE, {"layers": [9]}, "asked for 9"),
    ],
)
def test_misuse_is_refused(episodes, options, words):
    with pytest.raises(UsageError, match=words):
        saliency(models("qwen2_5_vl")[0], episodes, **options)


def test_layers_of_cross_attention_alone_are_refused():
    ours, _ = models("mllama")
    cross = ours.choose_layers(None, "vision")
    with pytest.raises(UsageError, match="cross-attention alone"):
        saliency(ours, UNLIKE[:1], layers=cross)


# --------------------------------------------------------------------------------------- summary, figure, command line


def made_up(n: int = 12) -> xr.Dataset:
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(n, 3, len(FLOWS))) * 1e-3
    values[:, 2, FLOWS.index("wp")] = 0
    values[:, :, FLOWS.index("image->q")] = np.nan
    values[0, :, FLOWS.index("pq")] = np.nan
    return xr.Dataset(
        {"saliency": (("episode", "layer", "flow"), values)},
        coords={"episode": [f"e{i}" for i in range(n)], "layer": [0, 4, 9], "flow": list(FLOWS)},
        attrs={"model": "a <b>", "task": "made-up", "caveat": "only a toy"},
    )


def test_the_figure_shows_the_means():
    result = made_up()
    summary = summarise_saliency(result)
    assert summary["n"].sel(flow="pq").values.tolist() == [11, 11, 11]
    np.testing.assert_allclose(
        summary["saliency"].sel(end="estimate", flow="pq"), result["saliency"].sel(flow="pq").mean("episode")
    )
    figure = plot_saliency(result)
    lines = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    assert len(lines) == 10
    np.testing.assert_allclose(lines["answers → q (pq)"].y, summary["saliency"].sel(flow="pq", end="estimate"))
    assert lines["all → answers (wp)"].customdata[2][0] == 0  # on hover it is what it is
    assert 0 < lines["all → answers (wp)"].y[2] < 1e-5  # at the lower edge
    assert np.isnan(lines["their images (none here)"].y).all()
    text = figure.to_json()
    assert "only a toy" in text
    assert "a &lt;b" in text
    assert "first-order" in text


@pytest.fixture
def command(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """The command's function, in an empty directory; what it printed is returned."""
    from probe.cli.options import Source
    from probe.cli.saliency import saliency as run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")

    def call(*, json: bool = False, layers: str | None = None, **options: Any) -> str:
        run(Source(**{"task": "binding-uncued", "episodes": 5, "shots": 2, **options}), layers=layers, json=json)
        return capsys.readouterr().out

    return call


def test_the_command(command):
    out = command()
    for words in ("wp", "query image->q", "1e-", "seeded", "knockout", "-log p(gold answer)"):
        assert words in out
    [directory] = Path("probe-runs").iterdir()
    assert directory.name.startswith("saliency-toy-binding-uncued-")
    assert "<html" in (directory / "saliency.html").read_text()[:200]
    again = json.loads(command(json=True))
    assert again["reused"]
    assert again["experiment"] == "saliency"
    assert set(again["flows"]) == set(FLOWS)
    cell = again["flows"]["pq"]["4"]
    assert cell["n"] == 5
    assert cell["low"] <= cell["estimate"] <= cell["high"]
    from figures.saliency import main

    assert main([str(directory), "--out", "figure.html"]) == 0
    assert Path("figure.html").exists()


def test_the_command_without_demonstrations_or_with_words_alone(command):
    found = json.loads(command(json=True, shots=0, layers="0"))
    assert found["flows"]["pq"]["0"] == {"estimate": None, "low": None, "high": None, "n": 0}
    assert "–" in command(task="recognition-text", layers="1,2")


def test_the_command_refuses(command):
    with pytest.raises(UsageError, match="layers 0 to 5; asked for 9"):
        command(layers="9")
    with pytest.raises(UsageError, match="not a choice of layers"):
        command(layers="all")
    assert not list(Path().rglob("result.zarr"))
