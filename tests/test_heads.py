"""Scores of heads in episodes, what replacing one costs, and the table of all."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import probe
from probe.cli import run
from probe.data.perturb import perturb
from probe.errors import UsageError
from probe.experiments.head_effects import head_effects
from probe.experiments.head_scores import head_scores
from probe.experiments.heads import heads
from probe.experiments.interventions import halves, mean_outputs
from probe.measures import head_roles
from probe.measures.head_summary import KINDS, of_found, select_heads, summarise_heads
from probe.models.load import load
from probe.models.oracle import naive_attention, observed
from probe.models.token_map import ROLES
from probe.plots.heads import plot_head_likeness, plot_heads
from probe.trace.ablate import kinds
from probe.trace.read import read
from tests.tiny_families import build
from tests.tiny_qwen import make_episode


@pytest.fixture(scope="module")
def model():
    return probe.load("toy")


@cache
def episodes():
    return (
        *probe.synthetic_episodes("binding-uncued", shots=5, n=4, seed=3),
        *probe.synthetic_episodes("binding-uncued", shots=2, n=2, seed=4),
    )


# ------------------------------------------------------------------------------------------------------------- measures


def test_label_matching_of_attention_made_by_hand():
    answers = torch.tensor([[0, 1, 1, 0, 1, 1]], dtype=torch.bool)
    right = torch.tensor([[0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    attention = torch.tensor(
        [
            [
                [0, 1, 0, 0, 0, 0],
                [0, 0.25, 0.25, 0, 0.25, 0.25],
                [0.5, 0.5, 0, 0, 0, 0],
                [0, 0, 1, 0, 0, 0],
                [1, 0, 0, 0, 0, 0],
            ]
        ]
    )
    assert head_roles.label_matching(attention, answers, right)[0].tolist() == pytest.approx([1, 0, 0.5, -1 / 3, 0])
    for nothing in (torch.zeros_like(right), answers):
        assert head_roles.label_matching(attention, answers, nothing).isnan().all()


def test_recognition_is_the_length_of_a_projection():
    """Against the projection written down with an orthonormal basis; with labels that depend on each other too."""
    torch.manual_seed(0)
    outputs, projection, labels = torch.randn(5, 8), torch.randn(5, 12, 8), torch.randn(3, 12)
    for of in (labels, torch.cat([labels, labels[:1] + labels[1:2]])):
        logits = head_roles.label_logits(outputs, projection, of)
        basis = torch.linalg.qr(labels.T)[0]
        written = torch.einsum("hed,hd->he", projection, outputs)
        assert torch.allclose(head_roles.recognition(logits, of), (written @ basis).norm(dim=-1), rtol=1e-4)
    logits = head_roles.label_logits(outputs, projection, labels)
    wanted = ((written @ (labels[1] - labels[0])) + (written @ (labels[1] - labels[2]))) / 2
    assert torch.allclose(
        head_roles.learning(logits, labels, 1) * head_roles.recognition(logits, labels), wanted, atol=1e-4
    )


def test_a_head_that_writes_the_right_label_learns_and_one_that_writes_all_recognises():
    labels = torch.eye(4)[:3]
    projection = torch.eye(4).expand(3, 4, 4)
    outputs = torch.stack([labels[1], labels.sum(0), torch.eye(4)[3]])
    logits = head_roles.label_logits(outputs, projection, labels)
    assert head_roles.recognition(logits, labels).tolist() == pytest.approx([1, math.sqrt(3), 0])
    learned = head_roles.learning(logits, labels, 1)
    assert learned[:2].tolist() == pytest.approx([1, 0])
    assert learned[2].isnan()  # it writes nothing about labels


# ---------------------------------------------------------------------------------------------------------- experiments


@pytest.mark.parametrize("kind", ["toy", "qwen2_5_vl", "gemma3", "mllama"])
def test_scores_equal_a_naive_loop(model, kind):
    """Episode by episode, from the textbook's attention and from what plain hooks see each head write."""
    if kind == "toy":
        shown, some = model, list(episodes())
    else:
        made = build(kind)
        shown = load(made.module, processor=made.processor)
        sizes = ((84, 56), (56, 84), (40, 40), (120, 30))
        some = [make_episode(3, seed=seed, sizes=sizes) for seed in (2, 5)]
    result = head_scores(shown, some, batch_size=4)
    norm = shown.module.get_decoder().norm
    gain = 1 + norm.weight if kind == "gemma3" else norm.weight
    words = shown.module.get_output_embeddings().weight
    for number, episode in enumerate(some):
        encoding = shown.encode(episode)
        token_map = encoding.token_map
        batch = shown.batch([encoding])
        seen, written = {}, {}
        at = torch.tensor([[encoding.n_prompt - 1]])

        def look(site, q, k, v, mask, scale, at=at, seen=seen):
            if site.axis == "text":
                seen[site.layer] = naive_attention(q, k, mask, scale, at, causal=True)[0, :, 0]

        with observed(shown, look), torch.no_grad():
            shown.module(**shown.inputs(batch), use_cache=False)
        for layer, values in read(shown, batch, ("heads",), lambda v: {"z": v.heads}).layers.items():
            written[layer] = values["z"][0, encoding.n_prompt - 1]
        first = [int(encoding.ids[token_map.answer[0]])]
        first += [int(encoding.ids[token_map.where("answer", i)[0]]) for i in range(episode.shots)]
        labels = [w * gain for w in words[torch.tensor(sorted(set(first)))]]
        right = sorted(set(first)).index(first[0])
        answers = [p for i in range(episode.shots) for p in token_map.where("answer", i)]
        matching = [
            p
            for i, x in enumerate(episode.demonstrations)
            if x.answer.lower() in {a.lower() for a in episode.query.answers}
            for p in token_map.where("answer", i)
        ]
        own = result.isel(episode=number)
        for layer in result["layer"].values.tolist():
            weight, size = shown.output_weight(layer), None
            z = written[layer]
            size = shown.output_size(layer, z[None, :, None])
            for head in range(shown.n_heads):
                row = seen[layer][head]
                cell = own.sel(layer=layer, head=head)
                share = len(matching) / len(answers)
                if 0 < share < 1:
                    wanted = (float(row[matching].sum()) - share * float(row[answers].sum())) / (1 - share)
                    assert float(cell["label_matching"]) == pytest.approx(wanted, abs=1e-5)
                else:
                    assert np.isnan(cell["label_matching"])
                a = weight[:, head * shown.head_dim : (head + 1) * shown.head_dim] @ z[head]
                a = a if size is None else a / size[0, 0]
                basis = torch.linalg.qr(torch.stack(labels).T)[0]
                length = float((basis.T @ a).norm().detach())
                assert float(cell["task_recognition"]) == pytest.approx(length, rel=1e-3, abs=1e-5)
                if len(labels) > 1 and length > 1e-4:
                    others = [float((a @ (labels[right] - y)).detach()) for i, y in enumerate(labels) if i != right]
                    assert float(cell["task_learning"]) == pytest.approx(np.mean(others) / length, rel=1e-3, abs=1e-3)
                images = np.flatnonzero(token_map.role == ROLES.index("image"))
                if len(images) and float(row[images].sum()) > 0:
                    visual = float(row[images].sum() / row[1:].sum())
                    assert float(cell["visual"]) == pytest.approx(visual, abs=1e-4)
                else:  # the row can see no image, in layers with a window too
                    assert np.isnan(cell["visual"])


def test_labels_that_begin_alike_have_no_learning_and_unseen_answers_no_matching(model):
    """Of answers of several tokens the first must tell them apart; labels are counted once, whatever their tokens."""
    some = probe.synthetic_episodes("describe", shots=3, n=12, seed=2)
    found = head_scores(model, some)
    for place, episode in enumerate(some):
        answers = list(dict.fromkeys([episode.query.answer, *(x.answer for x in episode.demonstrations)]))
        first = [answer.split()[0] for answer in answers]
        alike = len(set(first)) < len(first)
        assert bool(np.isnan(found["task_learning"][place]).all()) == (alike or len(answers) == 1)
    assert np.isnan(found["task_learning"]).all(("layer", "head")).any()
    assert not np.isnan(found["task_learning"]).all()


def test_effects_equal_hooks_and_come_from_the_other_half(model):
    """Plain torch hooks, one episode after the other; the means are those of the half that an episode is not in."""
    some = list(episodes())
    found = head_effects(model, some, batch_size=4, seed=2)
    half = halves(len(some))
    assert found["half"].values.tolist() == half.tolist() == ["select", "report"] * 3
    permuted = perturb(some, "permuted-answers", seed=2)

    def log_p(episode, layer=None, head=None, means=None, *, everywhere=True):
        encoding = model.encode(episode)
        which = torch.from_numpy(kinds(encoding))

        def hook(_module, arguments):
            z = arguments[0].unflatten(2, (model.n_heads, -1)).clone()
            rows = torch.ones_like(which, dtype=torch.bool) if everywhere else which == 0
            z[0, rows, head] = means[layer, head][which[rows]]
            return (z.flatten(2),)

        handle = model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook) if layer is not None else None
        with torch.no_grad():
            logits = model.module(**model.batch([encoding]).inputs, use_cache=False).logits[0].double().log_softmax(-1)
        if handle:
            handle.remove()
        return float(logits[encoding.n_prompt - 1, encoding.ids[encoding.n_prompt]])

    for place in (0, 5):
        others = [model.encode(e) for e, h in zip(some, half, strict=True) if h != half[place]]
        means = mean_outputs(model, [model.batch([encoding]) for encoding in others])
        whole, corrupted = log_p(some[place]), log_p(permuted[place])
        assert float(found["log_probability"][place]) == pytest.approx(whole, abs=1e-4)
        assert float(found["log_probability_permuted"][place]) == pytest.approx(corrupted, abs=1e-4)
        for layer, head in ((0, 1), (2, 2), (4, 0)):
            cell = found.isel(episode=place).sel(layer=layer, head=head)
            assert float(cell["ablation"]) == pytest.approx(whole - log_p(some[place], layer, head, means), abs=1e-3)
            put = math.exp(log_p(permuted[place], layer, head, means, everywhere=False)) - math.exp(corrupted)
            assert float(cell["function_vector"]) == pytest.approx(put, abs=1e-3)


def test_the_most_effective_heads_of_the_card_are_found_first(model):
    """The bar of ``analyses/head_bars.py`` on fewer episodes: the three heads by plain hooks, among the first five."""
    card = json.loads((Path(probe.__file__).parent / "toy" / "evaluations" / "toy.json").read_text())
    cells = {cell["task"]: cell["effects"] for cell in card["heads"]}
    ours, theirs = np.zeros(24), np.zeros(24)
    for task in ("binding-cued", "binding-uncued"):
        some = probe.synthetic_episodes(task, shots=8, n=24, seed=31)
        ours += head_effects(model, some, function_vectors=False)["ablation"].mean("episode").values.ravel()
        places = [cells[task][f"{layer}.{head}"] for layer in range(6) for head in range(4)]
        theirs += [effect["lost"] - effect["gained"] for effect in places]
    assert set(np.argsort(-theirs)[:3]) <= set(np.argsort(-ours)[:5])


@pytest.fixture(scope="module")
def table(model):
    some = probe.synthetic_episodes("binding-uncued", shots=4, n=8, seed=6)
    return heads(model, some, sequences=8, controls=1, top=2)


def test_the_table_holds_every_kind(table):
    summary = summarise_heads(table)
    assert summary["kind"].values.tolist() == list(KINDS)
    assert summary.sizes["layer"] == 6 and summary.sizes["head"] == 4
    chosen = select_heads(table, 2)
    assert chosen["previous token"] == [(0, 1), (2, 0)]  # told to look one back, by the card
    assert chosen["label matching"][0] == (4, 0)  # told to look at answers of the same class
    for kind, own in chosen.items():
        ranks = summary["rank"].sel(kind=kind)
        assert [float(ranks.sel(layer=layer, head=head)) for layer, head in own] == [1, 2]
    assert float(summary["likeness"].sel(kind="induction", other="induction")) == pytest.approx(1)
    found = of_found(table)
    assert found is not None
    assert found.sizes["episode"] == 4
    assert any(label.endswith(": 0.1, 2.0") for label in found["intervention"].values.tolist())


def test_selecting_and_reporting_halves_share_no_episode(table):
    """What the selecting half says must not change what is reported, and the other way round."""
    flipped = table.copy(deep=True)
    select = table["half"].values == "select"
    flipped["ablation"].values[~select] *= -1
    assert select_heads(flipped, 2)["ablation"] == select_heads(table, 2)["ablation"]
    before, after = (summarise_heads(t)["score"].sel(kind="ablation").values for t in (table, flipped))
    assert np.allclose(before, -after)
    assert (np.isin(of_found(table)["episode"].values, table["episode"].values[~select])).all()


def test_heads_without_any_effect_are_rarely_called_significant():
    """Noise alone: the smallest of all family-wise p is below 0.05 in 5 % of the tables."""
    rng = np.random.default_rng(0)
    smallest = []
    for _ in range(60):
        noise = xr.Dataset(
            {"ablation": (("episode", "layer", "head"), rng.standard_t(5, size=(24, 3, 4)))},
            coords={"layer": range(3), "head": range(4), "half": ("episode", halves(24))},
        )
        smallest.append(float(summarise_heads(noise)["p"].min()))
    assert np.mean(np.array(smallest) < 0.05) < 0.14


def test_the_pictures_show_every_kind_and_mark_the_first(table):
    figure = plot_heads(table)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(maps) == len(KINDS)
    marks = [trace for trace in figure.data if trace.type == "scatter" and trace.mode == "markers"]
    assert [len(mark.x) for mark in marks] == [2] * len(KINDS)
    assert (marks[0].x[0], marks[0].y[0]) == (1, 0)
    assert len(plot_head_likeness(table).data[0].x) == len(KINDS)


def test_the_command_writes_the_whole_table(tmp_path, capsys):
    line = ["heads", "--task", "recognition-text", "--shots", "2", "--episodes", "4", "--sequences", "4", "--no-causal"]
    line += ["--out", str(tmp_path / "run"), "--json"]
    assert run(line) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ablated_together"] is None
    assert "ablation" not in said["kinds"]
    assert len(said["kinds"]["copying"]["heads"]) == 24
    lines = (tmp_path / "run" / "heads.csv").read_text().splitlines()
    assert lines[0] == "kind,layer,head,score,beyond,low,high,p,rank"
    assert len(lines) == 1 + 24 * len(said["kinds"])
    assert run(line) == 0 and json.loads(capsys.readouterr().out)["reused"]
    assert run(line[:-1]) == 0 and "Heads by kind" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--episodes", "2"], "four episodes or more"),
        (["--shots", "1"], "two shots or more"),
        (["--top", "0"], "--top"),
        (["--length", "1000"], "choose a smaller length"),
    ],
)
def test_wrong_options_are_said(tmp_path, capsys, options, said):
    usual = {"--episodes": "4", "--shots": "2"} | dict(zip(options[::2], options[1::2], strict=True))
    line = [word for pair in usual.items() for word in pair]
    assert run(["heads", "--out", str(tmp_path / "run"), *line]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_unusual_episodes_are_refused(model):
    with pytest.raises(UsageError, match="two episodes or more"):
        head_effects(model, episodes()[:1])
    with pytest.raises(UsageError, match="no episodes"):
        head_scores(model, [])
