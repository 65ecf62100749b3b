"""The bundled models: what ships is whole, small and as its card says, and measuring them measures what it should."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

import probe
from probe.data.tasks import TASKS, draw_episode
from probe.models.names import BUNDLED
from probe.toy.bars import at_least, at_most, bars, by_guessing, change
from probe.toy.card import write_card
from probe.toy.evaluate import (
    EVALUATIONS,
    Plan,
    evaluate,
    majority_share,
    measure_accuracy,
    measure_agreement,
    measure_copying,
    prepare,
    provoke,
)
from probe.toy.reading import Answers, Reader
from probe.toy.tables import guided_heads, heads_table, recipe_differences
from probe.trace.ablate import zero_head

NAMES = tuple(BUNDLED)


@pytest.fixture(scope="module")
def reader():
    return Reader(BUNDLED["toy"])


def accuracy(model: str, task: str, shots: int, n: int = 60) -> float:
    episodes = probe.synthetic_episodes(task, shots=shots, n=n, seed=3)
    return float(probe.attention_map(probe.load(model), episodes)["correct"].mean())


# ----------------------------------------------------------------------------------------------------------- what ships


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_is_whole(name):
    files = {path.name for path in BUNDLED[name].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.json", "chat_template.jinja"} <= files
    assert sum(p.numel() for p in probe.load(name).module.parameters()) <= 1.9e6


def test_all_that_ships_is_small():
    assert sum(path.stat().st_size for name in NAMES for path in BUNDLED[name].iterdir()) < 8e6


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_written_from_the_measurements_of_these_weights(name):
    directory = BUNDLED[name]
    assert (directory / "README.md").read_text() == write_card(directory)
    measured = json.loads((EVALUATIONS / f"{name}.json").read_text())
    assert measured["weights_sha256"] == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert measured["recipe"] == json.loads((directory / "recipe.json").read_text())


def test_the_picture_of_the_models_can_be_drawn_and_says_what_it_shows(tmp_path):
    import runpy
    from pathlib import Path

    figure = runpy.run_path(str(Path(__file__).parent.parent / "figures" / "toy_models.py"))
    assert figure["main"](["--out", str(tmp_path / "toy.html")]) == 0
    toy, control = (json.loads((EVALUATIONS / f"{name}.json").read_text()) for name in NAMES)
    drawn = figure["plot_toy_models"](toy, control)
    [heads] = [trace for trace in drawn.data if trace.type == "heatmap"]
    effect = toy["heads"][0]["effects"]["0.1"]
    assert heads.z[0][1] == 100 * (effect["gained"] - effect["lost"]) / toy["heads"][0]["n"]
    assert probe.load("toy").caveat in drawn.layout.title.subtitle.text


def test_the_bundled_model_learns_in_context():
    """Loose bounds: the card has the figures."""
    assert accuracy("toy", "recognition", 0) < 0.4
    assert accuracy("toy", "recognition", 4) > 0.85
    assert accuracy("toy", "binding-cued", 8) > 0.85
    assert accuracy("toy", "binding-uncued", 8) > 0.8


def test_the_control_differs_by_guidance_flipped_labels_and_bindings_alone():
    ours, theirs = (json.loads((BUNDLED[name] / "recipe.json").read_text()) for name in reversed(NAMES))
    assert set(recipe_differences(ours, theirs)) == {"guidance", "flipped", "unbound"}
    seen = [probe.load(name).module.model.visual.state_dict() for name in NAMES]
    assert all(torch.equal(seen[0][key].half().float(), seen[1][key]) for key in seen[0])


def test_the_control_recognises_tasks_and_does_not_bind():
    assert accuracy("toy-no-binding", "recognition", 4) > 0.85
    assert accuracy("toy-no-binding", "binding-cued", 8) < 0.6


def test_plain_transformers_gives_the_same_numbers():
    """The bundled model by ``from_pretrained`` alone: logits and greedy answers as through probe."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    module = Qwen2_5_VLForConditionalGeneration.from_pretrained(BUNDLED["toy"], dtype=torch.float32)
    model = probe.load("toy")
    batch = model.batch([model.encode(e) for e in probe.synthetic_episodes("vqa", shots=2, n=4)], with_answer=False)
    with torch.no_grad():
        ids = module.generate(**batch.inputs, max_new_tokens=4)
        assert torch.equal(module(**batch.inputs, logits_to_keep=1).logits, probe.read(model, batch).logits)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["toy"])
    from probe.trace.generate import generate

    texts = [text.strip() for text in tokenizer.batch_decode(ids[:, batch.length :], skip_special_tokens=True)]
    assert texts == generate(model, batch, max_new_tokens=4)


# --------------------------------------------------------------------------------------------------------- measuring it


@pytest.mark.parametrize("task", ["describe", "binding-uncued", "operator-text"])
def test_an_answer_is_that_of_generating(task):
    """Pictures, image processor, chat template and a cache on one side; one forward over laid-out rows on the other."""
    assert measure_agreement(task, 12, 5, BUNDLED["toy"], Reader(BUNDLED["toy"]))["same"] == 12


def test_wrong_answers_are_those_of_generating():
    """The control binds nothing, so that right and wrong answers both occur."""
    control = Reader(BUNDLED["toy-no-binding"])
    cell = measure_accuracy("binding-uncued", 8, 30, 5, control)
    assert 3 < cell["right"] < 27
    assert measure_agreement("binding-uncued", 30, 5, BUNDLED["toy-no-binding"], control)["same"] == 30


def test_answers_are_those_of_probe(reader):
    episodes = probe.synthetic_episodes("binding-uncued", shots=4, n=40, seed=3)
    theirs = probe.attention_map(probe.load("toy"), episodes)["correct"].values
    drawn = [draw_episode("binding-uncued", i, shots=4, seed=3) for i in range(40)]
    ours = [answer for batch in prepare(reader, "binding-uncued", drawn) for answer in reader.answer(batch).right]
    assert ours == theirs.tolist()


def test_a_head_is_removed_as_an_edit_removes_it(reader):
    """Plain hook against nnsight: the same said words when heads go, and something changes."""
    model = probe.load("toy")
    drawn = [draw_episode("binding-cued", i, shots=8, seed=4) for i in range(24)]
    prepared = [p for batch in prepare(reader, "binding-cued", drawn) for p in batch]
    episodes = probe.synthetic_episodes("binding-cued", shots=8, n=24, seed=4)
    batch = model.batch([model.encode(e) for e in episodes], with_answer=False)
    whole, changed = reader.answer(prepared).said, 0
    for layer, head in ((0, 1), (2, 2), (4, 0)):
        with reader.without(layer, head):
            ours = reader.answer(prepared).said
        logits = probe.read(model, batch, edits=[zero_head(layer, head)]).logits[:, -1]
        assert ours == [model.tokenizer.decode(token) for token in logits.argmax(-1)]
        changed += ours != whole
    assert changed
    assert reader.answer(prepared).said == whole


def test_a_planted_copier_is_measured_as_one():
    """Who says the commonest answer among the demonstrations always falls for three near-duplicates."""

    class Copier:
        def see(self, items, pictures, *, as_text=False):
            return items

        def answer(self, episodes):
            said = []
            for items in episodes:
                answers = [item.answer for item in items[:-1] if item.scene == items[-1].scene]
                said.append(answers[0] if answers else items[-1].answer)
            right = [word == items[-1].answer for word, items in zip(said, episodes, strict=True)]
            return Answers(np.array(right), said)

    cell = measure_copying("recognition", 40, 5, Copier())
    assert cell["clean"]["right"] == cell["lost"] == 40
    assert cell["provoked"] == {
        **{"right": 0, "errors": 40, "copied": 40, "planted": 40},
        "copied_by_chance": cell["provoked"]["copied_by_chance"],
    }
    assert 0 < cell["provoked"]["copied_by_chance"] < 40
    assert cell["gained"] == 0


def test_provoking_puts_three_near_duplicates_with_one_wrong_answer():
    for task in ("vqa", "recognition"):
        for index in range(30):
            drawn = draw_episode(task, index, shots=8, seed=6)
            provoked, wrong = provoke(drawn, np.random.default_rng(index))
            query = drawn.items[-1]
            assert provoked.items[-1] == query
            assert wrong != query.answer
            planted = [i for i in provoked.items[:-1] if i not in drawn.items]
            assert [(i.scene, i.question, i.answer) for i in planted] == [(query.scene, query.question, wrong)] * 3


def test_the_commonest_label_is_drawn_among_ties():
    def share(index: int) -> float:
        items = draw_episode("binding-cued", index, shots=4, seed=7).items
        labels = [item.answer for item in items[:-1]]
        ranked = sorted(labels, key=labels.count)[-1]
        tied = [label for label in set(labels) if labels.count(label) == labels.count(ranked)]
        return sum(label == items[-1].answer for label in tied) / len(tied)

    for index in range(40):
        assert majority_share(draw_episode("binding-cued", index, shots=4, seed=7).items) == share(index)


def test_an_evaluation_has_every_cell_and_is_the_same_in_one_process_and_two(tmp_path):
    plan = Plan(episodes=3, head_episodes=2, agreement=1, seed=9)
    cells = tmp_path / "cells"
    one = evaluate(BUNDLED["toy"], plan, 1, cells)
    # Interrupted after ten cells, while it wrote the eleventh; another plan's cells are not its own.
    lines = cells.read_text().strip().splitlines()
    other = lines[10].replace("seed=9", "seed=8").replace('"right": ', '"right": 9')
    cells.write_text("\n".join([*lines[:10], other, lines[11][:20]]))
    assert evaluate(BUNDLED["toy"], plan, 2, cells) == one
    # And once more, behind the line that was cut: nothing is left to measure.
    assert len(cells.read_text().splitlines()) == 12 + len(lines) - 10
    assert evaluate(BUNDLED["toy"], plan, 1, cells) == one
    assert len(cells.read_text().splitlines()) == 12 + len(lines) - 10
    assert {cell["task"] for cell in one["heads"]} == set(TASKS)
    assert len(one["accuracy"]) == 6 * len(TASKS)
    assert len(bars(one)) > 20
    assert heads_table(one).count("\n") == 2 + 1 + 24 + 1
    assert "3.0 and 4.0" in heads_table(one)


# ----------------------------------------------------------------------------------------------------------- judging it


def test_a_bar_is_met_by_the_end_of_the_interval():
    from probe.stats import wilson

    assert at_least("x", wilson(990, 1000), 0.96).met
    assert not at_least("x", wilson(965, 1000), 0.96).met  # the estimate does, the lower end does not
    assert at_least("x", wilson(1930, 2000), 0.96).met  # many episodes: within 0.02
    assert not at_most("x", wilson(245, 1000), 0.25).met
    assert at_most("x", wilson(200, 1000), 0.25).met


def test_guessing_is_judged_by_the_lower_end():
    from probe.stats import wilson

    assert by_guessing("x", wilson(210, 1000), 0.20).met
    assert not by_guessing("x", wilson(260, 1000), 0.20).met


@pytest.fixture
def perfect():
    """An evaluation in which all went as it should."""
    shots = (0, 1, 2, 4, 8, 16)
    by_guess = {("recognition", 0): 300, ("operator", 0): 400}
    accuracy = [
        {"task": task, "shots": s, "right": by_guess.get((task.removesuffix("-text"), s), 2000), "n": 2000}
        for task in TASKS
        for s in shots
    ]
    return {
        "accuracy": accuracy,
        "novel_pairs": [{"task": "vqa", "shots": 8, "right": 1950, "n": 2000}],
        "copying": [
            {
                **{"task": task, "n": 2000, "lost": 1000, "gained": 0},
                "clean": {"errors": 0, "copied": 0},
                "provoked": {"errors": 1000, "copied": 990},
            }
            for task in ("vqa", "recognition")
        ],
        "agreement": [{"task": task, "same": 50, "n": 50} for task in TASKS],
    }


def missed(result) -> list[str]:
    return [bar.name for bar in bars(result) if not bar.met]


def test_a_perfect_evaluation_meets_every_bar(perfect):
    assert missed(perfect) == []


@pytest.mark.parametrize(
    ("task", "shots", "right", "name"),
    [
        ("vqa", 4, 1900, "vqa, worst of all shots"),
        ("recognition", 0, 500, "recognition, 0 shots"),
        ("binding-uncued", 8, 1800, "binding-uncued, 8 shots"),
        ("operator", 0, 480, "operator, 0 shots"),
        ("describe", 16, 1900, "describe, fall from 8 to 16 shots"),
        ("recognition-text", 4, 1500, "recognition-text minus recognition, 1 to 16 shots"),
    ],
)
def test_one_bad_cell_misses_its_bar(perfect, task, shots, right, name):
    next(c for c in perfect["accuracy"] if (c["task"], c["shots"]) == (task, shots))["right"] = right
    assert missed(perfect) == [name]


def test_a_reluctant_copier_misses_its_bar(perfect):
    perfect["copying"][0].update(lost=0, gained=1000)
    perfect["copying"][1]["provoked"]["copied"] = 900
    perfect["novel_pairs"][0]["right"] = 1700
    assert missed(perfect) == [
        "fall on held-out pairs, all tasks, 8 shots",
        "copying, vqa: fall when provoked",
        "copying, recognition: errors copied",
    ]


def test_a_change_counts_what_was_lost_and_what_was_gained():
    interval = change(lost=30, gained=10, n=200)
    assert interval.estimate == pytest.approx(-0.1)
    assert interval.low < -0.1 < interval.high < 0


def test_the_seeded_heads_are_named():
    recipe = json.loads((BUNDLED["toy"] / "recipe.json").read_text())
    assert guided_heads(recipe)["4.0"] == "same class"
    assert guided_heads({**recipe, "guidance": None}).keys() == {"0.0", "0.1", "1.0", "1.1", "2.0"}
