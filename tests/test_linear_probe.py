"""Linear probes where the truth is planted, against plain scikit-learn and plain hooks, and on the bundled model."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler

import probe
from probe.cli.linear_probe import linear_probe as command
from probe.data.example import Episode, Example
from probe.data.scenes import VALUES
from probe.errors import UsageError
from probe.experiments import probe_targets
from probe.experiments.linear_probe import linear_probe, n_steps
from probe.experiments.probe_targets import default_targets, find_target, groups_of
from probe.experiments.probe_vectors import choose_positions, read_vectors
from probe.measures import decoding
from probe.measures.decoding import (
    PENALTY,
    control_labels,
    decode,
    grouped_folds,
    lookup,
    permutation_test,
    permute_groups,
)
from probe.measures.probe_summary import peaks, selectivity, summarise_probes
from probe.models.load import load
from probe.plots.linear_probe import plot_linear_probe
from probe.segments import QUERY
from tests.tiny_qwen import make_episode, make_module, make_processor, picture

COLOURS = ("red", "green", "blue", "pink")


def planted(n: int = 160, sites: int = 4, width: int = 12, coded: int = 2, seed: int = 0):
    """Vectors of noise in which a label is coded linearly at one site only."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(COLOURS, n)
    features = rng.normal(size=(sites, n, width)).astype(np.float32)
    directions = rng.normal(size=(len(COLOURS), width))
    features[coded] += 1.5 * directions[[COLOURS.index(label) for label in labels]]
    return features, labels.tolist(), list(range(n))


# ----------------------------------------------------------------------------------------------------------- the probes


def test_a_planted_label_is_found_where_it_is_and_only_there() -> None:
    features, labels, groups = planted()
    accuracy = decode(features, labels, groups).mean(1)
    assert accuracy[2] > 0.95
    assert (np.delete(accuracy, 2) < 0.4).all()
    found = permutation_test(features, labels, groups, permutations=99)
    assert found.p_family[2] == found.p[2] == 0.01
    assert (np.delete(found.p_family, 2) > 0.05).all()
    assert (found.p_family >= found.p).all()


def test_p_values_of_nothing_are_uniform() -> None:
    """Of an exact test at most the share alpha of p-values is at most alpha; the family's is as strict."""
    rng = np.random.default_rng(1)
    found = []
    for number in range(150):
        features = rng.normal(size=(2, 40, 4)).astype(np.float32)
        labels = rng.choice(["a", "b"], 40).tolist()
        found.append(permutation_test(features, labels, list(range(40)), folds=3, permutations=19, seed=number))
    each = np.array([test.p for test in found])
    family = np.array([test.p_family.min() for test in found])
    for level in (0.1, 0.25, 0.5):
        assert -0.12 < (each <= level).mean() - level < 0.08  # ties of few episodes make p larger
        assert (family <= level).mean() < level + 0.07  # 2.5 standard errors
    assert (each.min(1) <= 0.1).mean() > 0.12  # which the search over sites would have claimed


def test_folds_keep_groups_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label that is the group's own cannot be known from other groups, and is known at once if groups leak."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 4)
    identity = rng.normal(size=(30, 20))
    features = (identity[groups] + 0.1 * rng.normal(size=(120, 20)))[None].astype(np.float32)
    labels = rng.choice(["a", "b"], 30)[groups].tolist()
    for train, test in grouped_folds(groups.tolist(), 5):
        assert not set(groups[train]) & set(groups[test])
        assert len(train) + len(test) == 120
    assert decode(features, labels, groups.tolist()).mean() < 0.65
    assert decode(features, labels, list(range(120))).mean() > 0.9
    assert permutation_test(features, labels, groups.tolist(), permutations=99).p[0] > 0.05


def test_probes_equal_a_plain_loop_over_scikit_learn() -> None:
    features, labels, _ = planted(n=90, sites=2, coded=1)
    groups = np.sort(np.random.default_rng(3).integers(25, size=90)).tolist()
    right = decode(features, labels, groups, folds=4)
    ridge = permutation_test(features, labels, groups, folds=4, permutations=1)
    y = np.array(labels)
    for site in range(2):
        by_ridge = np.zeros(90)
        for train, test in grouped_folds(groups, 4):
            scaler = StandardScaler().fit(features[site][train].astype(float))
            fitted, judged = (scaler.transform(features[site][places].astype(float)) for places in (train, test))
            said = LogisticRegression(max_iter=2000).fit(fitted, y[train]).predict(judged)
            assert (right[site, test] == (said == y[test])).all()
            machine = RidgeClassifier(alpha=PENALTY * len(train)).fit(fitted, y[train])
            by_ridge[test] = machine.predict(judged) == y[test]
        assert ridge.accuracy[site] == pytest.approx(by_ridge.mean())


def test_wide_vectors_give_the_same_by_their_gram_matrix() -> None:
    features, labels, groups = planted(n=40, sites=1, width=200, coded=0)
    wide = decoding._smoother(features[0].astype(float), grouped_folds(groups, 4))
    for train, test in grouped_folds(groups, 4):
        scaler = StandardScaler().fit(features[0][train])
        x, z = scaler.transform(features[0][train]), scaler.transform(features[0][test])
        weights = z @ np.linalg.solve(x.T @ x + PENALTY * len(train) * np.eye(200), x.T)
        y = np.eye(4)[[COLOURS.index(label) for label in labels]]
        by_hand = weights @ (y[train] - y[train].mean(0)) + y[train].mean(0)
        np.testing.assert_allclose(wide[test] @ y, by_hand, atol=1e-5)


def test_permutations_exchange_whole_groups_of_one_size() -> None:
    groups = ["a", "a", "b", "b", "c", "d", "d", "d"]
    codes = np.array([0, 1, 2, 3, 4, 5, 6, 7])
    seen = {tuple(permute_groups(codes, groups, np.random.default_rng(seed)).tolist()) for seed in range(40)}
    assert seen == {(0, 1, 2, 3, 4, 5, 6, 7), (2, 3, 0, 1, 4, 5, 6, 7)}


def test_one_label_in_training_and_vectors_that_never_change() -> None:
    features = np.zeros((1, 12, 3), dtype=np.float32)
    labels = ["a"] * 11 + ["b"]
    assert decode(features, labels, list(range(12)), folds=3).mean() == pytest.approx(11 / 12)
    assert permutation_test(features, labels, list(range(12)), folds=3, permutations=19).p[0] == 1
    with pytest.raises(UsageError, match="12 groups of episodes cannot make 13 folds"):
        decode(features, labels, list(range(12)), folds=13)


# ---------------------------------------------------------------------------------------------------- the control tasks


def test_control_labels_are_a_function_of_the_type_dealt_as_the_true_ones() -> None:
    rng = np.random.default_rng(0)
    types = rng.integers(40, size=800).tolist()
    labels = rng.choice(COLOURS, 800, p=(0.4, 0.3, 0.2, 0.1)).tolist()
    control = control_labels(types, labels, seed=1)
    given = dict(zip(types, control, strict=True))
    assert all(given[kind] == label for kind, label in zip(types, control, strict=True))
    shares = [list(given.values()).count(colour) / 40 for colour in COLOURS]
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.03)
    assert control != control_labels(types, labels, seed=2)
    assert control == control_labels(types, labels, seed=1)
    assert set(control_labels(["x", "y"], ["a"] * 99 + ["b"])) == {"a", "b"}
    assert control_labels(["x", "x"], ["a", "b"]) in (["a", "a"], ["b", "b"])


def test_selectivity_tells_a_label_from_learning_by_heart() -> None:
    """Where vectors hold the label alone its control task is not learned; where they spell the type, it is."""
    rng = np.random.default_rng(0)
    types = rng.integers(16, size=480)
    labels = [COLOURS[kind % 4] for kind in types]
    control = control_labels(types.tolist(), labels, seed=0)
    label_alone = np.eye(4)[types % 4] + 0.1 * rng.normal(size=(480, 4))
    spelled = np.eye(16)[types] + 0.1 * rng.normal(size=(480, 16))
    for vectors, learned in ((label_alone, False), (spelled, True)):
        features = vectors[None].astype(np.float32)
        assert decode(features, labels, list(range(480))).mean() == 1
        accuracy = decode(features, control, list(range(480))).mean()
        assert accuracy == 1 if learned else accuracy < 0.7


def test_what_a_table_could_guess() -> None:
    questions = ["colour?", "size?"] * 50
    labels = ["red", "big"] * 50
    assert lookup(questions, labels, list(range(100))).mean() == 1
    assert lookup(["same"] * 100, labels, list(range(100))).mean() <= 0.5
    # Every key its own: the table is empty where it is asked.
    assert lookup(list(range(100)), labels, list(range(100))).mean() <= 0.5


# ---------------------------------------------------------------------------------------------------------- the targets


def test_labels_and_types_of_the_targets() -> None:
    episodes = probe.synthetic_episodes("binding-uncued", shots=3, n=8, seed=1)
    for name in default_targets(episodes):
        assert len(find_target(name, episodes).labels) == 8
    task, binding, shown = (find_target(name, episodes) for name in ("task", "binding", "demonstrated"))
    for place, episode in enumerate(episodes):
        attribute = episode.info["attribute"]
        value = VALUES[attribute].index(episode.query.info[attribute])
        assert task.labels[place] == attribute
        assert binding.labels[place] == episode.info["labels"][value] == episode.query.answer
        assert binding.types is not None and binding.types[place] == f"{attribute} {VALUES[attribute][value]}"
        # What the last demonstration's word stands for, by the episode's own binding.
        word = episode.demonstrations[-1].answer
        [meant] = [VALUES[attribute][at] for at, other in episode.info["labels"].items() if other == word]
        assert shown.labels[place] == f"{attribute} {meant}"
        assert shown.types is not None and shown.types[place] == word
    rules = {label for label in find_target("task", probe.synthetic_episodes("recognition", shots=1, n=40)).labels}
    assert "colour italian" in rules and len(rules) == 8
    assert default_targets([make_episode(1, seed=0)]) == ["answer"]


def test_the_same_example_or_image_makes_one_group() -> None:
    a, b, c, d = probe.synthetic_episodes("recognition", shots=1, n=4)
    twin = replace(c.query, images=a.query.images)  # another question about the same picture
    given = [a, b, replace(c, query=twin), replace(d, query=b.query)]
    first, second, third, fourth = groups_of(given)
    assert first == third and second == fourth and first != second
    shared = [replace(a, demonstrations=d.demonstrations), b, c, d]
    assert len(set(groups_of(shared))) == 4
    assert len(set(groups_of(shared, of_demonstration=True))) == 3


def test_entries_of_info_and_their_control_task(monkeypatch: pytest.MonkeyPatch) -> None:
    model = probe.load("toy")
    words = ("red", "blue")
    episodes = []
    for number, episode in enumerate(probe.synthetic_episodes("vqa", shots=0, n=24)):
        query = replace(episode.query, info={"mine": words[number % 2], "rare": str(number)})
        episodes.append(Episode(episode.id, (), query))
    result = linear_probe(model, episodes, targets=["mine"], layers=[0, 2], permutations=9, folds=3)
    assert result["position"].values.tolist() == ["image", "question", "answer"]  # there are no demonstrations
    assert int(result["n_types"].sel(target="mine")) == len(
        {(e.query.question, e.query.info["mine"]) for e in episodes}
    )
    with pytest.raises(UsageError, match="did you mean mine"):
        linear_probe(model, episodes, targets=["mime"])
    with pytest.raises(UsageError, match="The target rare has 0 labels"):
        linear_probe(model, episodes, targets=["rare"])
    asked = [replace(e, query=replace(e.query, question="?")) for e in episodes]
    alone = linear_probe(model, asked, targets=["mine"], layers=[0], permutations=9, folds=3)
    assert alone["control_right"].isnull().all()
    assert "all questions are the same" in str(alone["control"].sel(target="mine").item())
    assert "No control task for mine" in plot_linear_probe(alone).to_json()


# ---------------------------------------------------------------------------------------------------------- the vectors


@pytest.mark.parametrize("batch_size", [1, 3])
def test_vectors_are_the_residual_stream_as_hooks_see_it(batch_size: int) -> None:
    processor = make_processor()
    model = load(make_module(processor), processor=processor)
    episodes = [make_episode(3, seed=2, images=2), make_episode(1, seed=1), make_episode(2, seed=4)]
    positions = choose_positions(model, episodes, None)
    assert positions == ["demo_answer", "image", "question", "answer"]
    parts = [
        read_vectors(model, episodes[at : at + batch_size], positions) for at in range(0, len(episodes), batch_size)
    ]
    found = np.concatenate(parts)
    for number, episode in enumerate(episodes):
        encoding = model.encode(episode)
        seen: list[torch.Tensor] = []

        def look(_module, args, kwargs, seen=seen) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in model.layers]
        with torch.no_grad():
            model.module(**model.batch([encoding], with_answer=False).inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        roles = encoding.token_map
        last = episode.shots - 1
        for layer, stream in enumerate(seen):
            rows = [
                stream[0, roles.where("answer", last)[-1]],
                stream[0, roles.where("image", QUERY)].mean(0),
                stream[0, roles.where("question", QUERY)[-1]],
                stream[0, -1],
            ]
            np.testing.assert_allclose(found[number, layer], torch.stack(rows).numpy(), atol=2e-5)


def test_positions_that_are_not_there() -> None:
    model = probe.load("toy")
    words = probe.synthetic_episodes("recognition-text", shots=0, n=2)
    assert choose_positions(model, words, None) == ["question", "answer"]
    with pytest.raises(UsageError, match="no position 'image' to probe: the query of episode"):
        choose_positions(model, words, ["image"])
    with pytest.raises(UsageError, match=r"no position 'answr'; did you mean answer"):
        choose_positions(model, words, ["answr"])
    with pytest.raises(UsageError, match="vqa has no such rule"):
        linear_probe(model, probe.synthetic_episodes("vqa", shots=1, n=8), targets=["task"])
    with pytest.raises(UsageError, match="no episodes"):
        linear_probe(model, [])


# ---------------------------------------------------------------------------------------------------- the bundled model


@pytest.fixture(scope="module")
def bound() -> xr.Dataset:
    """Few episodes, shared; `probe linear-probe` prints the figures that are reported."""
    episodes = probe.synthetic_episodes("binding-uncued", shots=4, n=150, seed=11)
    kept: dict[str, xr.Dataset] = {}
    done: list[int] = []
    options: dict = {"targets": ["task", "colour", "binding"], "layers": [0, 4, 5], "permutations": 49}
    options["positions"] = ["image", "answer"]

    def keep(name: str, compute):
        return kept[name] if name in kept else kept.setdefault(name, compute())

    model = probe.load("toy")
    start = time.process_time()
    result = linear_probe(model, episodes, keep=keep, progress=done.append, batch_size=30, **options)
    assert time.process_time() - start < 30
    assert done == sorted(done) and done[-1] == n_steps(150, 3)
    assert len(kept) == 5 + 3
    again = linear_probe(model, episodes, keep=keep, batch_size=30, **options)
    assert again.identical(result)
    assert len(kept) == 5 + 3
    return result


def test_the_image_is_read_at_its_tokens_and_the_binding_at_the_row_that_answers(bound: xr.Dataset) -> None:
    summary = summarise_probes(bound)
    accuracy = summary["accuracy"].sel(end="estimate")
    assert (accuracy.sel(target="colour", position="image") > 0.9).all()
    assert float(accuracy.sel(target="task", position="answer", layer=4)) > 0.75
    assert float(accuracy.sel(target="task", position="image", layer=0)) < 0.45
    # The commonest word in context would be right in more than half of the episodes; nothing else comes near it.
    guess = float(bound["guess_accuracy"].sel(target="binding", guess="context"))
    low = summary["accuracy"].sel(target="binding", position="answer", layer=5, end="low")
    assert float(low) > guess > 0.5
    assert float(summary["guess"].sel(target="binding")) == guess
    assert (summary["accuracy"].sel(target="binding", position="image", end="high") < guess).all()
    assert (summary["accuracy"].sel(target="binding", position="answer", layer=[0, 4], end="high") < guess).all()
    assert bool(summary["told"].sel(target="binding", position="answer", layer=5))
    # At layer 0 the row that answers holds the same embedding in every episode.
    assert not summary["told"].sel(position="answer", layer=0).any()
    [peak] = [peak for peak in peaks(bound) if (peak.target, peak.position) == ("binding", "answer")]
    left_out = int(bound["n_left_out"].sel(target="binding"))
    assert left_out > 0
    assert peak.layer == 5 and peak.accuracy.n == (150 - left_out) // 2
    differences = selectivity(bound).sel(target="colour", position="image", end="low")
    assert (differences > 0).all()


def test_the_picture_shows_the_result(bound: xr.Dataset) -> None:
    figure = plot_linear_probe(bound.assign_attrs(model="a <b>"))
    text = json.dumps(json.loads(figure.to_json()), ensure_ascii=False)  # plotly writes "<" as "\\u003c"
    assert "only" not in bound.attrs["caveat"] and "seeded" in text
    assert "does not say that the model uses it" in text
    assert "<b>a <b>" not in text and "a &lt;b&gt;" in text
    points = [trace for trace in figure.data if trace.error_y.array is not None]
    assert len(points) == 6
    summary = summarise_probes(bound)
    for number, trace in enumerate(points):
        cell = summary.isel(target=number // 2, position=number % 2)
        np.testing.assert_allclose(trace.y, cell["accuracy"].sel(end="estimate"))
        assert [not mark.endswith("-open") for mark in trace.marker.symbol] == cell["told"].values.tolist()


def test_the_command(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    from probe.cli.linear_probe import ProbeSource

    options: dict = {"targets": "size", "positions": "image,answer", "layers": "0,3", "permutations": 9, "folds": 3}
    source = ProbeSource(task="recognition", shots=1, episodes=30)
    command(source, out=tmp_path / "run", json=True, **options)
    said = json.loads(capsys.readouterr().out)
    best = said["targets"]["size"]["best"]["image"]
    assert best["accuracy"]["estimate"] > 0.8 and best["layer"] in (0, 3)
    assert set(said["targets"]["size"]["positions"]["answer"]) == {"0", "3"}
    assert "size: 2 labels" not in str(said)
    command(source, out=tmp_path / "run", **options)
    shown = capsys.readouterr().out
    assert "size: 2 labels" in shown and "finished before" in shown and "knockout" in shown
    assert "random function" in (tmp_path / "run" / "linear_probe.html").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="--folds must be 2 or more"):
        command(source, folds=1)
    with pytest.raises(UsageError, match="names none"):
        command(source, targets=" , ")


def test_the_command_reads_entries_of_your_own_data(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    from probe.cli.linear_probe import ProbeSource

    lines = []
    for number, episode in enumerate(probe.synthetic_episodes("vqa", shots=0, n=45, seed=9)):
        episode.query.images[0].save(tmp_path / f"{number}.png")
        entries = {"question": "?", "answer": episode.query.answer, "animal": episode.query.info["size"]}
        named = {"id": f"own {number}"} if number % 2 else {}
        lines.append(json.dumps({"image": f"{number}.png", **named, **entries}))
    (tmp_path / "my.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = ProbeSource(data=tmp_path / "my.jsonl", shots=1, episodes=45)
    command(
        source,
        targets="animal",
        positions="image",
        layers="0",
        folds=3,
        permutations=9,
        out=tmp_path / "run",
        json=True,
    )
    found = json.loads(capsys.readouterr().out)["targets"]["animal"]
    assert found["n"] == 45 and found["n_labels"] == 2
    assert found["positions"]["image"]["0"]["accuracy"]["estimate"] > 0.8
    with pytest.raises(UsageError, match="no labels 'plant'"):
        command(source, targets="plant")


def test_unknown_names_are_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(UsageError, match="no labels 'colours' to read; did you mean colour"):
        find_target("colours", probe.synthetic_episodes("vqa", shots=0, n=2))
    assert probe_targets.SECOND.keys() == VALUES.keys()


def test_copies_of_a_picture_belong_together(tmp_path) -> None:
    """Under other names too: else a probe would know what it is asked."""
    for number in range(4):
        picture(number % 2, (40, 30)).save(tmp_path / f"{number}.png")
    examples = [Example(f"x{n}", (tmp_path / f"{n}.png",), "?", (str(n),)) for n in range(4)]
    assert groups_of([Episode(f"e{n}", (), example) for n, example in enumerate(examples)]) == [0, 1, 0, 1]


@pytest.mark.parametrize(("labels", "folds"), [(2, 2), (5, 5), (10, 5)])
def test_the_order_of_episodes_plays_no_part(labels: int, folds: int) -> None:
    """Labels that recur in turn would each fall into one fold, if groups were dealt in order."""
    names = [f"l{place % labels}" for place in range(100)]
    features = np.eye(labels, dtype=np.float32)[[place % labels for place in range(100)]][None]
    assert decode(features, names, list(range(100)), folds=folds).mean() == 1.0


def test_an_empty_entry_is_no_label() -> None:
    episodes = probe.synthetic_episodes("vqa", shots=0, n=4)
    moods = zip(episodes, ["", "a", "b", "a"], strict=True)
    named = [replace(e, query=replace(e.query, info={"mood": mood})) for e, mood in moods]
    assert find_target("mood", named).labels == [None, "a", "b", "a"]
