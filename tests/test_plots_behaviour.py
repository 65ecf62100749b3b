"""Figures of what a model answered show what the summaries say, in the right place, and nothing that is not known."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr

from probe.errors import UsageError
from probe.measures.copy_summary import PUBLISHED, summarise_copying
from probe.measures.split_summary import summarise_split
from probe.plots import style
from probe.plots.copy_rate import ASIDE, MARKS, plot_copy_rate
from probe.plots.task_split import MARKS as SETTINGS
from probe.plots.task_split import plot_task_split
from probe.store.atomic import read_zarr, write_zarr

ROOT = Path(__file__).parent.parent
CAVEAT = "The bundled model proves the tool, never the science."
TYPES = ("yes/no", "number", "other")


def words(figure: go.Figure) -> str:
    """The title, the lines under it and all annotations."""
    texts = [figure.layout.title.text, figure.layout.title.subtitle.text, *(a.text for a in figure.layout.annotations)]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", " ".join(texts)))


def found(figure: go.Figure, panel: str, name: str) -> go.Scatter:
    """The one trace of a panel (``x``, ``x2``, …) whose name begins so."""
    (trace,) = [t for t in figure.data if (t.xaxis or "x") == panel and (t.name or "").startswith(name)]
    return trace


def written(figure: go.Figure, panel: str) -> dict[float, str]:
    """Words among the points of a panel, by where they stand."""
    return {a.x: a.text for a in figure.layout.annotations if a.xref == panel}


def assert_points(trace: go.Scatter, ends: xr.DataArray, n: xr.DataArray) -> None:
    """Estimates, both ends of the intervals as they are drawn, and n."""
    estimate, low, high = ends.values.T
    there = np.isfinite(estimate)
    np.testing.assert_array_equal(trace.y, estimate)
    np.testing.assert_allclose((trace.y + trace.error_y.array)[there], high[there])
    np.testing.assert_allclose((trace.y - trace.error_y.arrayminus)[there], low[there])
    np.testing.assert_array_equal(trace.customdata[:, 3], n.values)


# ------------------------------------------------------------------------------------------------------------- copying


def copying_result(
    groups: Sequence[tuple[str, int]] = (("RS", 4), ("SI", 4), ("sole", 4)),
    *,
    n: int = 24,
    types: Sequence[str] = TYPES,
    counterfactual: bool = True,
    **attributes: object,
) -> xr.Dataset:
    """What ``probe.copy_rate`` returns, as far as the figure needs it, with random entries."""
    rng = np.random.default_rng(0)
    size = n * len(groups)
    strategies, shots = ([pair[i] for pair in groups for _ in range(n)] for i in (0, 1))
    copied, right = rng.random(size) < np.repeat(rng.uniform(0.2, 0.9, len(groups)), n), rng.random(size) < 0.5
    place = np.where(copied, [rng.integers(-1, max(k, 1)) for k in shots], -1)
    values = {
        "copied": copied,
        "right": right,
        "harmful": copied & ~right,
        "gold_shown": rng.random(size) < 0.4,
        "place": place,
        "null": np.where(np.array(strategies) == "RS", rng.random(size) * 0.3, np.nan),
        "score": right.astype(float),
        "majority_score": np.zeros(size),
        "answer_type": np.array([types[i % len(types)] for i in range(size)]),
    }
    if counterfactual:
        values |= {"planted_before": np.zeros(size), "planted_after": (rng.random(size) < 0.3).astype(float)}
    return xr.Dataset(
        {name: ("episode", column) for name, column in values.items()},
        coords={
            "episode": [f"e{i}" for i in range(size)],
            "strategy": ("episode", strategies),
            "shots": ("episode", shots),
        },
        attrs={"model": "tiny-vlm", "task": "vqa", **attributes},
    )


def test_rates_stand_in_the_column_of_their_strategy():
    result = copying_result()
    summary, figure = summarise_copying(result), plot_copy_rate(result)
    for measure in ("copy_rate", "gold_shown", "harmful", "counterfactual"):
        trace = found(figure, "x", MARKS[measure][0])
        assert_points(trace, summary["rate"].sel(measure=measure), summary["n"].sel(measure=measure))
        np.testing.assert_allclose(trace.x, np.arange(3) + ASIDE[measure])
        assert trace.mode == "markers"  # strategies have no order that a line could follow
    assert len(set(ASIDE.values())) == len(ASIDE)
    assert max(map(abs, ASIDE.values())) < 0.5
    labels = figure.layout.xaxis.ticktext
    assert [re.sub(r"<[^>]*>", " ", label).split() for label in labels] == [
        [name, "4", "shots", "n", "=", "24"] for name in ("RS", "SI", "sole")
    ]
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2]


def test_published_rates_are_hollow_and_said_not_to_be_this_models():
    figure = plot_copy_rate(copying_result([("RS", 4), ("SI-Q", 4), ("sole-wrong", 4)]))
    assert PUBLISHED["SQA"] == (87.74, 89.47)
    for version in (1, 2):
        trace = found(figure, "x", f"OpenFlamingo v{version}")
        assert trace.marker.symbol.endswith("-open")
        np.testing.assert_allclose(trace.x, np.array([0, 2]) + ASIDE[f"v{version}"])
        np.testing.assert_allclose(trace.y, [PUBLISHED[name][version - 1] / 100 for name in ("RS", "sole-wrong")])
        assert "not this model" in figure.layout[trace.legend].title.text
    assert "2312.01571, whose shots and data are not stated; published, not this model" in words(figure)


def test_what_was_not_planted_is_no_rate_of_zero():
    plain = plot_copy_rate(copying_result(counterfactual=False))
    trace = found(plain, "x", "counterfactual")
    assert np.isnan(trace.y).all()
    assert trace.name.endswith("(not measured)")
    assert not written(plain, "x")

    result = copying_result()
    si = result["strategy"].values == "SI"
    figure = plot_copy_rate(result.assign(planted_after=result["planted_after"].where(~si)))
    trace = found(figure, "x", "counterfactual")
    assert np.isnan(trace.y).tolist() == [False, True, False]
    assert trace.name == "counterfactual copying"
    assert written(figure, "x") == {1 + ASIDE["counterfactual"]: "n/a"}
    never = plot_copy_rate(result.assign(planted_after=result["planted_after"] * np.nan))
    assert found(never, "x", "counterfactual").name.endswith("(no answer to plant)")


def test_a_negative_effect_of_planting_is_inside_the_panel():
    result = copying_result()
    odd = np.arange(result.sizes["episode"]) % 2 == 1
    before, after = result["planted_before"] + odd, result["planted_after"] * 0
    figure = plot_copy_rate(result.assign(planted_before=before, planted_after=after))
    trace = found(figure, "x", "counterfactual")
    assert (trace.y < -0.4).all()
    assert figure.layout.yaxis.range[0] < (trace.y - trace.error_y.arrayminus).min()


def test_random_demonstrations_are_held_against_their_null_at_all_shots():
    result = copying_result([("RS", 8), ("SI", 8), ("RS", 2)])
    summary = summarise_copying(result).isel(group=[2, 0])
    for figure in (plot_copy_rate(result), plot_copy_rate(result, shots=8)):
        assert list(figure.layout.xaxis3.ticktext) == ["2", "8"]
        for measure in ("copy_rate", "null", "excess"):
            trace = found(figure, "x3", MARKS[measure][0])
            assert_points(trace, summary["rate"].sel(measure=measure), summary["n"].sel(measure=measure))
        assert figure.layout.yaxis3.zeroline
    without = plot_copy_rate(copying_result([("SI", 4)]))
    assert "so no null" in words(without)
    assert not [t for t in without.data if t.xaxis == "x3" and t.name]


def test_the_profile_beside_uniform():
    result = copying_result([("RS", 4), ("SI", 2), ("sole", 1)])
    summary, figure = summarise_copying(result), plot_copy_rate(result)
    lines = [t for t in figure.data if t.xaxis == "x2" and t.mode == "lines"]
    points = [t for t in figure.data if t.xaxis == "x2" and t.mode == "lines+markers"]
    assert [(t.line.dash, *t.y) for t in lines] == [("dot", 0.25, 0.25), ("dot", 0.5, 0.5)]
    for column, (trace, shots) in enumerate(zip(points, (4, 2), strict=True)):
        n = summary["n_profile"].isel(group=[column] * shots)
        assert_points(trace, summary["profile"].isel(group=column, place=slice(shots)), n)
        assert trace.y.sum() == pytest.approx(1)
        assert column - 0.5 < trace.x[0] < trace.x[-1] < column + 0.5
        assert written(figure, "x2")[column] == f"n = {int(n[0])}"
    assert written(figure, "x2")[2] == "one only"
    assert list(figure.layout.xaxis2.ticktext) == ["0", "1", "2", "3", "0", "1"]
    nowhere = plot_copy_rate(result.assign(place=result["place"] * 0 - 1))
    assert written(nowhere, "x2")[0] == "none copied<br>by itself"
    assert not [t for t in nowhere.data if t.xaxis == "x2" and t.mode != "markers" and t.y[0] is not None]


def test_sixteen_places_have_few_labels():
    figure = plot_copy_rate(copying_result([("RS", 16)]))
    assert list(figure.layout.xaxis2.ticktext) == ["0", "4", "8", "12"]
    (points,) = [t for t in figure.data if t.xaxis == "x2" and t.mode == "lines+markers"]
    np.testing.assert_allclose(figure.layout.xaxis2.tickvals, points.x[::4])


def test_harmful_copying_by_answer_type():
    result = copying_result()
    no_number = (result["strategy"].values == "SI") & (result["answer_type"].values == "number")
    result = result.assign(answer_type=result["answer_type"].where(~no_number, "other"))
    summary, figure = summarise_copying(result), plot_copy_rate(result)
    symbols = set()
    for kind in TYPES:
        trace = found(figure, "x4", kind)
        rate = summary["rate_by_type"].sel(measure="harmful", answer_type=kind)
        assert_points(trace, rate, summary["n_by_type"].sel(measure="harmful", answer_type=kind))
        assert trace.marker.color == MARKS["harmful"][1]
        symbols.add(trace.marker.symbol)
    assert len(symbols) == 3
    number = found(figure, "x4", "number")
    assert np.isnan(number.y).tolist() == [False, True, False]
    assert written(figure, "x4") == {number.x[1]: "n/a"}


def test_columns_are_pairs_of_strategy_and_shots_and_can_be_chosen():
    groups = [("RS", 4), ("sole", 4), ("sole", 1), ("RS", 0)]
    result = copying_result(groups)
    figure = plot_copy_rate(result)
    assert len(found(figure, "x", "copy rate").x) == 3  # without demonstrations there is no copying
    assert "1 shot<" in figure.layout.xaxis.ticktext[2]
    assert "other numbers" not in words(figure)
    chosen = plot_copy_rate(result, shots=1)
    expected = summarise_copying(result)["rate"].sel(group="sole, 1 shot", measure="copy_rate", end="estimate")
    assert found(chosen, "x", "copy rate").y.tolist() == [expected.item()]
    assert "what was read with 1 shot;" in words(chosen)
    for missing in (0, 3):
        with pytest.raises(UsageError, match=f"with {missing} shots; this result has 1, 4"):
            plot_copy_rate(result, shots=missing)
    many = plot_copy_rate(copying_result([(name, k) for k in (1, 2) for name in "ABCDEF"], n=3))
    assert len(found(many, "x", "copy rate").x) == 6
    assert "what was read with 2 shots; the result holds other numbers too" in words(many)


def test_one_strategy_and_eight_fit_a_page():
    one = plot_copy_rate(copying_result([("SQA", 4)], types=("other",)))
    eight = plot_copy_rate(copying_result([(name, 4) for name in (*PUBLISHED, "SI-Q", "SQ-I")], n=6))
    for figure in (one, eight):
        assert 600 < figure.layout.width <= 1200
        assert figure.layout.height <= 1100
    assert len(found(one, "x", "copy rate").x) == 1


# ------------------------------------------------------------------------------------------- recognition and learning


def split_result(
    settings: Sequence[str] = tuple(SETTINGS),
    shots: Sequence[int] = (0, 1, 16),
    *,
    seeds: Sequence[int] = (0,),
    n: int = 24,
    rng: int = 0,
    **attributes: object,
) -> xr.Dataset:
    """What ``probe.task_split`` returns, as far as the figure needs it, with random entries."""
    draw = np.random.default_rng(rng)
    shape = (len(settings), len(shots), n)
    read = np.ones(shape)
    if "words" in settings:
        read[list(settings).index("words"), 1:] = np.nan
    values = {
        "chosen": draw.random(shape) < draw.random(shape[:2])[..., None],
        "generated": draw.random(shape) < 0.5,
        "in_labels": draw.random(shape) < 0.8,
        "in_context": draw.random(shape) < 0.6,
        "chance": np.full(shape, 0.25),
        "prior": draw.random(shape) < np.linspace(0.3, 0.6, len(settings))[:, None, None],
        "majority": np.full(shape, 0.2),
    }
    return xr.Dataset(
        {name: (("setting", "shot", "episode"), column * read) for name, column in values.items()},
        coords={
            "setting": list(settings),
            "shot": list(shots),
            "episode": [f"e{i}" for i in range(n)],
            "seed": ("episode", [seeds[i % len(seeds)] for i in range(n)]),
        },
        attrs={"model": "tiny-vlm", "task": "recognition", **attributes},
    )


def test_accuracy_and_the_best_guess_by_shots():
    result = split_result()
    summary, figure = summarise_split(result), plot_task_split(result)
    for number, (setting, (name, colour, _)) in enumerate(SETTINGS.items()):
        trace = found(figure, "x", name)
        assert_points(trace, summary["accuracy"].sel(setting=setting), summary["n"].sel(setting=setting))
        assert trace.line.color == trace.marker.color == colour
        np.testing.assert_array_equal(np.round(trace.x), [0, 1, 2])
        guess = [t for t in figure.data if (t.xaxis or "x") == "x" and t.name == "best guess without input"][number]
        np.testing.assert_array_equal(guess.y, summary["guess"].sel(setting=setting))
        assert (guess.line.dash, guess.line.color) == ("dot", colour)
        np.testing.assert_array_equal(guess.x, trace.x)
    assert np.isfinite(found(figure, "x", "words").y).tolist() == [True, False, False]
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "16"]
    assert sum(bool(t.showlegend) for t in figure.data if t.name == "best guess without input") == 1
    assert "seeds" not in words(figure)


def test_beyond_guessing_only_what_is_recognised_and_what_is_learned():
    result = split_result(n=60)
    result["chosen"].loc[{"setting": "abstract", "shot": 0}] = 0
    summary, figure = summarise_split(result), plot_task_split(result)
    traces = [t for t in figure.data if t.xaxis == "x2"]
    assert [t.name for t in traces] == [SETTINGS[name][0] for name in ("random", "abstract")]
    for trace, setting in zip(traces, ("random", "abstract"), strict=True):
        assert_points(trace, summary["corrected"].sel(setting=setting), summary["n"].sel(setting=setting))
    assert traces[1].y[0] < -0.3
    assert figure.layout.yaxis2.range[0] < traces[1].y[0]
    assert figure.layout.yaxis2.zeroline
    neither = plot_task_split(split_result(("gold", "flipped")))
    assert "neither random labels nor symbols were read" in words(neither)
    alone = plot_task_split(split_result(("random",)))
    assert np.isfinite(found(alone, "x2", "random").y).all()
    assert not [t for t in alone.data if t.legend == "legend2"]


def test_free_answers_and_copies_of_the_wrong_ones():
    result = split_result()
    result["generated"].loc[{"setting": "abstract", "shot": 16}] = 1
    summary, figure = summarise_split(result), plot_task_split(result)
    assert {t.name for t in figure.data if t.xaxis == "x3" and t.name and t.legend != "legend2"} == {
        SETTINGS[name][0] for name in ("gold", "random", "abstract")
    }
    for setting in ("gold", "random", "abstract"):
        trace = found(figure, "x3", SETTINGS[setting][0])
        assert_points(trace, summary["in_labels"].sel(setting=setting), summary["n"].sel(setting=setting))
    copies = found(figure, "x3", "wrong ones")
    # Nothing to copy without demonstrations, and nothing wrong with sixteen: neither is a zero.
    cells = {"setting": "abstract", "shot": [1, 16]}
    assert_points(copies, summary["wrong_copied"].sel(cells), summary["n_wrong"].sel(cells))
    assert np.round(copies.x).tolist() == [1, 2]
    assert np.isnan(copies.y).tolist() == [False, True]
    assert written(figure, "x3") == {copies.x[1]: "n/a"}
    assert (copies.line.dash, copies.marker.symbol) == ("dash", "diamond-open")
    from_one = plot_task_split(split_result(shots=(1, 16)))
    assert np.round(found(from_one, "x3", "wrong ones").x).tolist() == [0, 1]


def test_each_seed_by_itself():
    result = split_result(seeds=(3, 7, 8))
    summary, figure = summarise_split(result), plot_task_split(result)
    dots = [t for t in figure.data if t.name == "one seed"]
    assert len(dots) == len(SETTINGS)
    gold = dots[0]
    assert gold.customdata.tolist() == [3, 7, 8] * 3
    np.testing.assert_array_equal(gold.y.reshape(3, 3), summary["by_seed"].sel(setting="gold"))
    assert np.round(gold.x).tolist() == np.repeat([0, 1, 2], 3).tolist()
    assert "the 3 seeds, each by itself" in words(figure)


def test_symbols_told_in_words_that_were_not_read():
    result = split_result(no_words="276 of 574 <words> are unknown.")
    figure = plot_task_split(result.where(result["setting"] != "words"))
    assert found(figure, "x", "words").name == "words (not read)"
    assert np.isnan(found(figure, "x", "words").y).all()
    assert "not read: 276 of 574 &lt;words&gt; are unknown." in figure.layout.title.subtitle.text


def test_images_and_words_have_a_row_each():
    parts = [split_result(rng=i) for i in range(2)]
    result = xr.concat(parts, xr.IndexVariable("shown", ["images", "a <b>"]), coords="minimal", compat="override")
    figure = plot_task_split(result)
    for part, (a, b, c) in zip(parts, (("x", "x2", "x3"), ("x4", "x5", "x6")), strict=True):
        alone = plot_task_split(part)
        for before, after in (("x", a), ("x2", b), ("x3", c)):
            for setting in ("random", "abstract"):
                name = SETTINGS[setting][0]
                np.testing.assert_array_equal(found(figure, after, name).y, found(alone, before, name).y)
    assert figure.layout.yaxis.title.text == "<b>shown: images</b><br>accuracy"
    assert figure.layout.yaxis4.title.text == "<b>shown: a &lt;b&gt;</b><br>accuracy"
    assert figure.layout.yaxis2.range == figure.layout.yaxis5.range
    shown = [t.name for t in figure.data if t.showlegend]
    assert len(shown) == len(set(shown)) == len(SETTINGS) + 2
    assert plot_task_split(parts[0]).layout.yaxis.title.text == "accuracy"


# ------------------------------------------------------------------------------------------------------- all figures


def all_figures(**attributes: object) -> list[go.Figure]:
    return [
        plot_copy_rate(copying_result([("RS", 2), ("SI", 2)], n=12, **attributes)),
        plot_task_split(split_result(**attributes)),
    ]


def test_every_figure_says_model_n_and_caveat_and_nothing_of_attention():
    for figure, n in zip(all_figures(caveat=CAVEAT), (24, 24), strict=True):
        text = words(figure)
        assert "tiny-vlm on" in text
        assert f"n = {n} episodes" in text
        assert CAVEAT in text
        assert "95 % interval" in text
        assert "ttention" not in text
        assert style.NOT_USE not in text
    for figure in all_figures():
        assert "bundled" not in words(figure)


def test_every_figure_escapes_what_a_user_gave():
    for figure in all_figures(model="<b>big</b>", caveat="a <i>note</i>"):
        assert "&lt;b&gt;big&lt;/b&gt;" in figure.layout.title.subtitle.text
        assert "<i>" not in figure.layout.title.subtitle.text
    figure = plot_copy_rate(copying_result([("<i>mine", 2), ("RS", 2)], types=("<u>odd",)))
    drawn = figure.to_json()
    assert "&lt;i&gt;mine" in figure.layout.xaxis.ticktext[0]
    assert not re.search(r"(<|\\u003c)[iu](>|\\u003e)", drawn)
    assert "&lt;u&gt;odd" in found(figure, "x4", "&lt;u&gt;odd").hovertemplate


def test_results_read_back_from_disk_and_the_scripts(tmp_path, capsys):
    for name, plot, result in (
        ("copy_rate", plot_copy_rate, copying_result()),
        ("task_split", plot_task_split, split_result(seeds=(0, 1))),
    ):
        run = tmp_path / name
        run.mkdir()
        write_zarr(run / "result.zarr", result)
        assert plot(read_zarr(run / "result.zarr")).to_json() == plot(result).to_json()
        specification = importlib.util.spec_from_file_location(f"draw_{name}", ROOT / "figures" / f"{name}.py")
        script = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(script)
        assert script.main([str(run)]) == 0
        assert capsys.readouterr().out == f"{run / f'{name}.html'}\n"
        assert "tiny-vlm" in (run / f"{name}.html").read_text(encoding="utf-8")
        assert script.main([str(tmp_path)]) == 1
        assert "no saved dataset" in capsys.readouterr().err
        if name == "copy_rate":
            assert script.main([str(run), "--shots", "9"]) == 2
            assert "this result has 4" in capsys.readouterr().err
