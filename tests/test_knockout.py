"""Knocking out: what a condition is, what its control is, and what an effect is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import probe
from probe.cli import run
from probe.cli.knockout import Removal
from probe.cli.knockout_report import show
from probe.cli.report import Reporter
from probe.data.manifest import read_manifest
from probe.errors import UsageError
from probe.experiments.interventions import (
    Intervention,
    count_hidden_keys,
    edits_of,
    mean_outputs,
    n_hidden,
    random_heads,
    random_keys,
)
from probe.experiments.knockout import knockout, n_conditions
from probe.experiments.without import knockouts_for
from probe.measures.effects import WITHOUT, effects, unnest
from probe.models.load import load
from probe.models.token_map import ROLES, parse_selection
from probe.plots.knockout import plot_knockout
from probe.plots.text_or_image import plot_text_or_image
from probe.store import read_zarr
from probe.trace.ablate import N_KINDS, hide_keys, kinds, mean_heads
from probe.trace.generate import generate
from probe.trace.likelihood import likelihoods
from probe.trace.read import read
from tests.tiny_families import build
from tests.tiny_qwen import make_episode

SOME = (
    Intervention(keys="demos/text"),
    Intervention("mean", heads=((3, 2), (2, 2))),
    Intervention(keys="sink", heads=((1, 1),)),
)


@pytest.fixture(scope="module")
def model():
    return probe.load("toy")


@pytest.fixture(scope="module")
def episodes():
    few = probe.synthetic_episodes("binding-uncued", shots=2, n=3, seed=4)
    return [*probe.synthetic_episodes("binding-uncued", shots=5, n=4, seed=3), *few]


@pytest.fixture(scope="module")
def result(model, episodes):
    return knockout(model, episodes, SOME, controls=2, seed=1, batch_size=4)


def test_conditions_are_what_each_edit_alone_gives(model, episodes, result):
    """The baseline against the log-probabilities of another function, a knockout against its own forward."""
    assert result.sizes == {"condition": 12, "episode": 7, "intervention": 3}
    assert result.sizes["condition"] == n_conditions(SOME, 2)
    plain = [float(x.total[0]) for x in likelihoods(model, episodes, [[e.query.answer] for e in episodes])]
    assert np.allclose(result["log_probability"].values[0], plain, atol=1e-4)
    said = probe.answering(model, episodes)
    assert result["prediction"].values[0].tolist() == said["prediction"].values.tolist()
    assert result["correct"].values[0].tolist() == said["correct"].values.tolist()
    at = int(np.flatnonzero((result["of"] == 0) & (result["control"] == ""))[0])
    for place, episode in enumerate(episodes):
        batch = model.batch([model.encode(episode)])
        edits = hide_keys(range(6), "demos/text")
        logits = read(model, batch, edits=edits, logits_to_keep=2).logits[0, 0].double().log_softmax(-1)
        answer = batch.encodings[0].ids[batch.encodings[0].n_prompt]
        assert result["log_probability"].values[at, place] == pytest.approx(float(logits[answer]), abs=1e-4)
        prompt = model.batch([model.encode(episode)], with_answer=False)
        assert generate(model, prompt, max_new_tokens=9, edits=edits) == [str(result["prediction"].values[at, place])]
        shown = {x.answer for x in episode.demonstrations}
        assert result["copied"].values[at, place] == (str(result["prediction"].values[at, place]) in shown)


def test_hidden_keys_are_counted_in_the_prompt(model, episodes, result):
    for place, episode in enumerate(episodes):
        token_map = model.encode(episode).token_map
        words = len(token_map.where("question")) + len(token_map.where("answer"))
        own = len(token_map.where("question", -1)) + len(token_map.answer)
        assert result["n_hidden"].values[:, place].tolist() == [words - own, 0, 1]


@pytest.mark.parametrize("name", ["demos/text", "demo1/answer", "query/image", "demos", "sink", "query/image+demo0"])
def test_random_keys_are_as_many_of_the_same_turns(model, episodes, name):
    intervention = Intervention(keys=name)
    for episode in episodes:
        encoding = model.encode(episode)
        token_map = encoding.token_map
        drawn = [random_keys(intervention, draw, 0)("text")(encoding) for draw in range(8)]
        meant = parse_selection(name).of(token_map)
        for found in drawn:
            assert found.sum() == n_hidden(intervention, encoding) == meant[: encoding.n_prompt].sum()
            assert not found[token_map.role == ROLES.index("sink")].any()
            assert not found[encoding.n_prompt - 1 :].any()
            if name in ("demos/text", "demo1/answer"):
                assert (token_map.demonstration[found] >= 0).all()
            if name == "query/image":
                assert (token_map.demonstration[found] == -1).all()
        if name != "demos":
            assert len({found.tobytes() for found in drawn}) > 1
        assert (random_keys(intervention, 3, 0)("text")(encoding) == drawn[3]).all()


def test_random_heads_are_others_of_the_same_layers(model):
    meant = Intervention("zero", heads=((1, 0), (1, 2), (4, 3)))
    seen = set()
    for draw in range(20):
        drawn = random_heads(model, meant, draw, 0)
        assert drawn is not None and drawn.heads is not None
        assert sorted(layer for layer, _ in drawn.heads) == [1, 1, 4]
        assert not set(drawn.heads) & set(meant.heads or ())
        seen.add(drawn.heads)
    assert len(seen) > 1
    all_of_one = Intervention("zero", heads=tuple((2, head) for head in range(4)))
    assert random_heads(model, all_of_one, 0, 0) is None
    too_many = Intervention("zero", heads=((2, 0), (2, 1), (2, 2), (3, 0)))  # layer 2 has one other head
    assert random_heads(model, too_many, 0, 0) is None


def test_means_are_those_of_a_loop(model, episodes):
    encodings = [model.encode(episode) for episode in episodes]
    batches = [model.batch(encodings[:4]), model.batch(encodings[4:])]
    found = mean_outputs(model, batches)
    rows: dict[int, list[torch.Tensor]] = {kind: [] for kind in range(N_KINDS)}
    for encoding in encodings:
        z = read(model, model.batch([encoding]), ("heads",), lambda v: {"z": v.heads}).layers[2]["z"][0]
        for position, kind in enumerate(kinds(encoding)):
            rows[int(kind)].append(z[position])
    for kind, own in rows.items():
        if own:
            assert (found[2, :, kind] - torch.stack(own).mean(0)).abs().max() < 1e-4
        else:
            assert found[2, :, kind].isnan().all()


def test_means_come_from_the_other_half(model, episodes):
    """Every second episode belongs to one half; what is put in its place comes from the others."""
    encodings = [model.encode(episode) for episode in episodes]
    found = knockout(model, episodes, [Intervention("mean", heads=((2, 1),))], controls=0, answers=False)
    assert found["episode"].values.tolist() == [episode.id for episode in episodes]
    for place, encoding in enumerate(encodings):
        others = [other for at, other in enumerate(encodings) if at % 2 != place % 2]
        means = {(2, 1): mean_outputs(model, [model.batch(others)])[2, 1]}
        logits = read(model, model.batch([encoding]), edits=mean_heads(means), logits_to_keep=2).logits[0, 0]
        wanted = float(logits.double().log_softmax(-1)[encoding.ids[encoding.n_prompt]])
        assert float(found["log_probability"][1, place]) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(UsageError, match="two episodes or more"):
        knockout(model, episodes[:1], [Intervention("mean", heads=((2, 1),))])


def test_what_binds_is_read_from_the_words_and_not_from_the_pictures(model):
    """The bundled model reads labels from demonstrations' words; the row that answers does not look at their images."""
    episodes = probe.synthetic_episodes("binding-uncued", shots=8, n=48, seed=21)
    found = effects(knockout(model, episodes, [Intervention(keys="demos/image"), Intervention(keys="demos/text")]))
    correct = found["effect"].sel(measure="correct")
    assert abs(float(correct.sel(intervention="demos/image → answer", end="estimate"))) < 0.03
    text = correct.sel(intervention="demos/text → answer")
    assert float(text.sel(end="high")) < -0.1
    beyond = found["beyond"].sel(measure="log_probability", control="keys", intervention="demos/text → answer")
    assert float(beyond.sel(end="high")) < 0
    assert np.isnan(found["beyond"].sel(control="heads")).all()


def test_parts_are_kept_by_content(model, episodes, result):
    kept: dict[str, xr.Dataset] = {}
    computed = []

    def keep(name, compute):
        if name not in kept:
            computed.append(name)
            kept[name] = compute()
        return kept[name]

    first = knockout(model, episodes, SOME, controls=2, seed=1, batch_size=4, keep=keep)
    assert len(computed) == 2
    again = knockout(model, episodes, SOME, controls=2, seed=1, batch_size=4, keep=keep)
    assert len(computed) == 2
    xr.testing.assert_identical(first, again)
    xr.testing.assert_allclose(first.drop_vars("prediction"), result.drop_vars("prediction"))
    knockout(model, episodes, SOME[:1], controls=2, seed=1, batch_size=4, keep=keep)
    assert len(computed) == 4


def test_readings_are_counted_up_to_the_end(model, episodes):
    seen: list[int] = []
    knockout(model, episodes, SOME[:1], controls=1, answers=False, batch_size=4, progress=seen.append)
    assert seen[-1] == n_conditions(SOME[:1], 1) * len(episodes)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "knockout"}, "which keys it hides"),
        ({"method": "mean", "keys": "demos", "heads": ((0, 0),)}, "which keys it hides"),
        ({"method": "zero"}, "Which heads should be replaced"),
        ({"method": "zer", "heads": ((0, 0),)}, "no method 'zer'"),
        ({"keys": "demos/pictures"}, "There are no tokens"),
        ({"keys": "demos", "rows": "answers"}, "There are no tokens"),
        ({"keys": "demos", "layers": (1,), "heads": ((0, 0),)}, "one of the two"),
        ({"method": "zero", "heads": ()}, "at least one"),
    ],
)
def test_interventions_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        Intervention(**wrong)


def test_what_is_not_there_is_refused_before_anything_is_read(model, episodes, monkeypatch):
    monkeypatch.setattr("probe.experiments.knockout._measure", lambda *_: pytest.fail("it was read"))
    for wrong, said in (
        ([Intervention(keys="demo7")], "No episode has tokens 'demo7'"),
        ([Intervention(keys="demos", layers=(6,))], "layers 0 to 5; asked for 6"),
        ([Intervention("zero", heads=((0, 4),))], "heads 0 to 3 in layer 0; asked for 4"),
        ([SOME[0], SOME[0]], "Given twice"),
        ([], "at least one"),
    ):
        with pytest.raises(UsageError, match=said):
            knockout(model, episodes, wrong)


def test_effects_of_a_result_made_by_hand():
    """Three episodes; the intervention costs 1, 2 and 3, one control draw costs 1 each, the other nothing."""
    result = xr.Dataset(
        {
            "log_probability": (("condition", "episode"), [[-1.0, -1, -1], [-2, -3, -4], [-2, -2, -2], [-1, -1, -1]]),
            "correct": (("condition", "episode"), [[1.0, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1]]),
            "n_hidden": (("intervention", "episode"), [[4, 4, 7]]),
        },
        coords={
            "of": ("condition", [-1, 0, 0, 0]),
            "control": ("condition", ["", "", "keys", "keys"]),
            "draw": ("condition", [0, 0, 0, 1]),
            "intervention": ["it"],
            "method": ("intervention", ["knockout"]),
        },
    )
    found = effects(result)
    of = found.sel(intervention="it", measure="log_probability")
    assert float(of["as_is"]) == -1
    assert float(of["effect"].sel(end="estimate")) == -2
    assert float(of["of_control"].sel(control="keys", end="estimate")) == -0.5
    assert float(of["beyond"].sel(control="keys", end="estimate")) == -1.5
    assert np.isnan(of["beyond"].sel(control="heads")).all()
    share = found["effect"].sel(intervention="it", measure="correct")
    assert float(share.sel(end="estimate")) == pytest.approx(-2 / 3)
    assert float(share.sel(end="high")) > -0.1  # three episodes say little
    assert found["n_hidden"].values.tolist() == [5]


def test_the_picture_shows_every_intervention_and_its_controls(result):
    figure = plot_knockout(result)
    named = [trace.name for trace in figure.data]
    assert named.count("taken away") == named.count("as many random tokens") == named.count("random heads") == 3
    for trace in figure.data:
        assert len(trace.x) == 3
    assert set(figure.layout.yaxis.ticktext) == {intervention.label for intervention in SOME}


def test_the_command_prints_effects_and_finds_its_run_again(tmp_path, capsys):
    line = [
        "knockout",
        "--episodes",
        "6",
        "--shots",
        "2",
        "--hide",
        "demos/text,sink",
        "--window",
        "3",
        "--controls",
        "1",
    ]
    line += ["--out", str(tmp_path / "run"), "--json"]
    assert run(line) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["interventions"]) == 8
    assert first["interventions"][0]["taken_away"] == "demos/text → answer, layers 0-2"
    assert first["interventions"][0]["correct"]["controls"]["keys"]["beyond"]["low"] is not None
    assert (tmp_path / "run" / "knockout.html").exists()
    assert run(line) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["reused"] and again["interventions"] == first["interventions"]
    assert run(line[:-1]) == 0
    assert "Log p of the gold answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hide", "demo/image"], "There are no tokens 'demo/image'"),
        (["--hide", "demo5"], "No episode has tokens 'demo5'"),
        (["--layers", "9"], "layers 0 to 5; asked for 9"),
        (["--heads", "3"], "not a choice of heads"),
        (["--heads", "3.7"], "heads 0 to 3 in layer 3; asked for 7"),
        (["--method", "mean"], "name them"),
        (["--method", "mean", "--hide", "demos"], "belongs to --method knockout"),
        (["--method", "means", "--heads", "3.1"], "no method 'means'"),
        (["--window", "2", "--heads", "3.1"], "about whole layers"),
        (["--window", "0"], "--window must be 1 or more"),
        (["--heads", "3.1", "--layers", "2"], "leave out --layers"),
        (["--controls", "-1"], "--controls must be 0"),
        (["--hide", ""], "--hide names nothing"),
        (["--rows", " "], "--rows names nothing"),
    ],
)
def test_wrong_options_are_said_and_leave_nothing(tmp_path, capsys, options, said):
    out = tmp_path / "run"
    assert run(["knockout", "--episodes", "4", "--shots", "2", "--out", str(out), *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (out / "episodes.jsonl").exists()


def test_each_head_and_windows_are_listed_in_order():
    each = Removal(method="zero", each_head=True, layers="1:3").interventions(6, 2)
    assert [i.heads for i in each] == [((1, 0),), ((1, 1),), ((2, 0),), ((2, 1),)]
    windows = Removal(hide="demos", window=2, layers="0:4").interventions(6, 2)
    assert [i.layers for i in windows] == [(0, 1), (1, 2), (2, 3)]
    assert [i.keys for i in Removal().interventions(6, 4)] == [
        "demos/image",
        "demos/text",
        "demos/delimiter",
        "demos",
        "query/image",
    ]


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """An attention map with knockouts, as the command makes it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    line = ["attention-map", "--task", "binding-uncued", "--shots", "3", "--episodes", "6", "--top", "2", "--knockout"]
    line += ["--controls", "1", "--out", str(out), "--json"]
    return line, out


def test_beside_each_mass_stands_what_happens_without_it(mapped, capsys):
    line, out = mapped
    assert run(line) == 0
    said = json.loads(capsys.readouterr().out)
    assert [each["taken_away"] for each in said["without"]["interventions"][:4]] == [
        "demos/image → answer",
        "demos/text → answer",
        "demos/delimiter → answer",
        "sink → answer",
    ]
    assert len(said["heads"]) == 4
    result = read_zarr(out / "result.zarr")
    found = unnest(result, WITHOUT)
    assert found is not None
    report = found.sel(episode=result["episode"].values[result["half"].values == "report"])
    for head in said["heads"]:
        keys = {"visual": "demos/image", "textual": "demos/text"}[head["modality"]]
        label = f"{keys} → answer, {head['layer']}.{head['head']}"
        place = found["intervention"].values.tolist().index(label)
        own = report["log_probability"][(report["of"] == place) & (report["control"] == "")].values[0]
        plain = report["log_probability"][report["of"] == -1].values[0]
        assert head["without"]["estimate"] == pytest.approx((own - plain).mean())
    direct = knockout(
        probe.load("toy"), read_manifest(out / "episodes.jsonl"), [Intervention(keys="demos/text")], controls=0
    )
    assert np.allclose(direct["log_probability"].values[1], found["log_probability"].values[found["of"] == 1][0])
    assert run(line[:-1]) == 0
    text = capsys.readouterr().out
    assert "Without, from the row that answers" in text and "without" in text
    figure = plot_text_or_image(result)
    assert len([trace for trace in figure.data if trace.xaxis == "x4"]) == 4
    assert run([*line[:-1], "--without-sinks"]) == 2  # hidden are sinks too
    assert "leave out --without-sinks" in " ".join(capsys.readouterr().err.split())


def test_without_knockouts_the_picture_says_that_they_are_missing():
    result = probe.attention_map(probe.load("toy"), probe.synthetic_episodes("recognition", shots=1, n=2))
    assert any("--knockout" in str(note.text) for note in plot_text_or_image(result).layout.annotations)
    with pytest.raises(UsageError, match="no demonstrations"):
        plot_text_or_image(probe.attention_map(probe.load("toy"), probe.synthetic_episodes("vqa", shots=0, n=2)))


def test_only_what_is_there_is_hidden():
    """No demonstrations, or no images: nothing is asked of what no episode has."""
    none = probe.attention_map(probe.load("toy"), probe.synthetic_episodes("vqa", shots=0, n=2))
    assert [each.label for each in knockouts_for(none, top=2)] == ["sink → answer"]
    words = probe.attention_map(probe.load("toy"), probe.synthetic_episodes("vqa-text", shots=1, n=4))
    labels = [each.label for each in knockouts_for(words, top=1, layers=[1, 2])]
    assert labels[:3] == [f"{keys} → answer, layers 1-2" for keys in ("demos/text", "demos/delimiter", "sink")]
    assert len(labels) == 4 and labels[3].startswith("demos/text → answer, ")


def test_images_are_hidden_in_cross_attention_where_the_text_reads_them_there():
    made = build("mllama")
    shown = load(made.module, processor=made.processor)
    some = [make_episode(2, seed=seed) for seed in (2, 5)]
    intervention = Intervention(keys="query/image")
    edits = edits_of(shown, intervention)
    assert {edit.axis for edit in edits} == {"text", "vision"}
    found = knockout(shown, some, [intervention], answers=False, controls=1)
    assert (found["n_hidden"].values > 0).all()
    assert (abs(found["log_probability"][1] - found["log_probability"][0]) > 1e-3).all()
    beyond = effects(found)["beyond"].sel(
        control="keys", measure="log_probability", intervention="query/image → answer"
    )
    assert np.isfinite(beyond.sel(end="estimate"))


@pytest.mark.parametrize("kind", ["idefics", "mllama"])
def test_what_cannot_be_seen_anyway_has_no_effect_to_measure(kind, capsys):
    """Later text sees no earlier image in these families: a zero would be a statement."""
    made = build(kind)
    shown = load(made.module, processor=made.processor)
    some = [make_episode(2, seed=seed) for seed in (2, 5, 6)]
    seen, unseen = Intervention(keys="query/image"), Intervention(keys="demos/image")
    elsewhere = Intervention(keys="demos/image", heads=((0, 0),))
    found = knockout(shown, some, [seen, unseen, elsewhere], controls=1)
    assert (found["n_hidden"].values[0] > 0).all() and (found["n_hidden"].values[1:] == 0).all()
    summary = effects(found)
    assert summary["n_defined"].values.tolist() == [3, 0, 0]
    assert np.isnan(summary["effect"].values[:, 1:]).all() and np.isnan(summary["p"].values[:, 1:]).all()
    assert np.isfinite(summary["effect"].values[:, 0]).all() and np.isfinite(summary["p"].values[:, 0]).all()
    plot_knockout(found)
    show(Reporter(quiet=False), found.assign_attrs(task="none", seed=0), Path("run"), Path("picture"), reused=False)
    assert "the rows cannot see these tokens" in " ".join(capsys.readouterr().out.split())


def test_counts_are_of_keys_that_a_row_can_see(model, episodes):
    """Rows before the keys lose nothing; of several rows, the one that loses most counts."""
    batch = model.batch([model.encode(episode) for episode in episodes])
    asked = [
        Intervention(keys="demos/image"),
        Intervention(keys="query/image", rows="demos"),
        Intervention(keys="demo1/answer", rows="demo1/answer+query"),
    ]
    found = count_hidden_keys(model, batch, asked)
    assert found[0].tolist() == [6 * episode.shots for episode in episodes]
    assert found[1].tolist() == [0] * len(episodes)
    assert found[2].tolist() == [1] * len(episodes)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--shots", "0"], ["query/image → answer"]),
        (["--task", "recognition-text"], ["demos/text → answer", "demos/delimiter → answer", "demos → answer"]),
    ],
)
def test_by_default_only_what_is_there_is_hidden(tmp_path, capsys, options, shown):
    line = ["knockout", "--episodes", "3", "--controls", "0", "--no-answers", "--json", "--out", str(tmp_path / "run")]
    usual = [] if "--shots" in options else ["--shots", "2"]
    assert run([*line, *usual, *options]) == 0
    assert [each["taken_away"] for each in json.loads(capsys.readouterr().out)["interventions"]] == shown


@pytest.mark.parametrize("number", ["1", "2"])
def test_very_few_episodes_are_shown_without_intervals(tmp_path, capsys, number):
    line = ["attention-map", "--knockout", "--shots", "2", "--episodes", number, "--controls", "1", "--top", "1"]
    assert run([*line, "--out", str(tmp_path / "run")]) == 0
    assert "nan" not in capsys.readouterr().out


def test_controls_follow_the_seed(model, episodes):
    one, other = (
        knockout(model, episodes, SOME[:1], controls=1, answers=False, seed=seed)["log_probability"] for seed in (1, 2)
    )
    assert np.array_equal(one[:2], other[:2])
    assert not np.array_equal(one[2], other[2])
