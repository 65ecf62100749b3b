"""Figures and tables of vectors show what the summaries say, in the right place."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr

from probe.cli.report import Reporter
from probe.cli.vector_report import as_json, figures_of, show_comparison
from probe.errors import UsageError
from probe.measures.vector_groups import over_seeds
from probe.measures.vector_summary import summarise_vectors
from probe.plots.page import write_page
from probe.plots.vector_curves import plot_vector_curves
from probe.plots.vector_distance import plot_vector_distance
from probe.plots.vector_parts import MANY, plot_vector_parts
from probe.plots.vectors import COLOURS, MARKS, PANELS, colour_of, plot_vectors
from probe.store.atomic import write_zarr
from tests.synthetic_comparison import comparison, first, random_like, references, way

ROOT = Path(__file__).parent.parent
N = 40
ZERO, FEW = first(N, 12), first(N, 38)
CAVEAT = "The bundled model proves the tool, never the science."


def sizes_and_seeds(**attributes: object) -> xr.Dataset:
    ways = references(ZERO, FEW)
    for method, bonus in (("live", 0), ("mimic", 5)):
        for size in (20, 80):
            for seed in (0, 1):
                label = f"{method} {size} {seed}"
                about = {"method": method, "training_seed": seed, "training_episodes": size}
                right = 20 + size // 10 + 3 * seed + bonus
                ways += [
                    way(label, first(N, right), **about),
                    way(f"{label} + demonstrations", first(N, right + 4), shown=True, vector=label, **about),
                    random_like(label, first(N, right - 15), **about),
                ]
    return comparison(ways, n_distances=10, **attributes)


def in_parts(wheres: tuple[str, ...] = ("layer 0", "layer 1")) -> xr.Dataset:
    ways = references(ZERO, FEW)
    for label, right in (("a <i>", 30), ("b", 20)):
        about = {"training_episodes": right}
        ways += [way(label, first(N, right), **about), random_like(label, ZERO, **about)]
        for i, where in enumerate(wheres):
            ways.append(way(f"{label}, {where}", first(N, right - 15 + i % 10), vector=label, where=where, **about))
    return comparison(ways)


def words(figure: go.Figure) -> str:
    """The title, the lines under it and all annotations."""
    texts = [figure.layout.title.text, figure.layout.title.subtitle.text, *(a.text for a in figure.layout.annotations)]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", " ".join(texts)))


def traces(figure: go.Figure, panel: str, name: str) -> list[go.Scatter]:
    """Those of a panel (``x``, ``x2``, …) with a name that show something."""
    return [
        t
        for t in figure.data
        if (t.xaxis or "x") == panel and t.name == name and t.x is not None and t.x[0] is not None
    ]


def at(figure: go.Figure, panel: str, name: str, y: float) -> go.Scatter:
    """The one trace of a kind in a row."""
    (found,) = [t for t in traces(figure, panel, name) if t.y[0] == pytest.approx(y)]
    return found


@pytest.mark.parametrize(("panel", "measure"), list(zip(("x", "x2", "x3"), PANELS, strict=True)))
def test_every_way_is_in_the_row_of_its_vector(panel: str, measure: str) -> None:
    result = sizes_and_seeds()
    figure = plot_vectors(result)
    each = summarise_vectors(result, distances=False)
    ways = over_seeds(each)[measure]
    axis = figure.layout.yaxis
    rows = dict(zip(axis.ticktext, axis.tickvals, strict=True))
    assert list(rows) == ["few-shot", "zero-shot", *(f"{m}, {n} episodes" for m in ("live", "mimic") for n in (20, 80))]
    for label, y in rows.items():
        beside = {"vector": label, "back": f"{label} + demonstrations", "random": f"random like {label}"}
        for kind, of in beside.items():
            if of not in ways["way"]:
                continue
            name, _, _, above = MARKS[kind]
            trace = at(figure, panel, name, y + above * label.endswith("episodes"))
            estimate, low, high = ways.sel(way=of).values
            assert trace.x[0] == estimate
            assert trace.x[0] + trace.error_x.array[0] == pytest.approx(high)
            assert trace.x[0] - trace.error_x.arrayminus[0] == pytest.approx(low)
        if label.endswith("episodes"):
            seeds = at(figure, panel, MARKS["seed"][0], y + MARKS["seed"][3])
            chosen = each["group_of"].values == label
            np.testing.assert_array_equal(seeds.x, each[measure].values[chosen, 0])
            assert not seeds.error_x.array.any()
    lines = {s.x0 for s in figure.layout.shapes if s.xref == panel and s.type == "line"}
    assert lines >= {float(ways.sel(way=name)[0]) for name in ("zero-shot", "few-shot")}


def test_rows_do_not_cover_one_another() -> None:
    above = [mark[3] for mark in MARKS.values()]
    assert len(set(above)) == len(above)
    assert max(map(abs, above)) < 0.5


def test_methods_keep_their_colours_in_all_figures() -> None:
    result = sizes_and_seeds()
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert colour_of("mimic size=shared") == COLOURS["mimic"]
    for figure in (plot_vectors(result), plot_vector_distance(result), plot_vector_curves(result)):
        used = {t.marker.color for t in figure.data if t.marker.color}
        assert used & set(COLOURS.values()) == {COLOURS["live"], COLOURS["mimic"]}


def test_every_figure_says_model_n_and_caveat_and_escapes() -> None:
    result = sizes_and_seeds(caveat=CAVEAT, model="<b>big</b>")
    parts = in_parts().assign_attrs(caveat=CAVEAT, model="<b>big</b>")
    of_parts = [f(parts) for f in (plot_vector_parts, plot_vectors, plot_vector_distance, plot_vector_curves)]
    for figure in (*(f(result) for f in (plot_vectors, plot_vector_distance, plot_vector_curves)), *of_parts):
        text = words(figure)
        assert "operator:3" in text
        assert CAVEAT in text
        assert "episodes" in text
        assert "&lt;b&gt;big&lt;/b&gt;" in figure.layout.title.subtitle.text
        # plotly writes "<" as an escape of JSON, so its text is read before it is searched.
        shown = json.dumps(json.loads(figure.to_json()), ensure_ascii=False)
        assert "<b>big" not in shown
        assert "a <i>" not in shown


def with_oracle() -> xr.Dataset:
    nothing = {"method": "", "training_seed": -1, "training_episodes": -1, "training_shots": -1, "n_bytes": 0}
    oracle = way("oracle", FEW, **{**nothing, "kind": "oracle", "vector": "", "n_parameters": 0})
    result = comparison([*references(ZERO, FEW), way("a", ZERO), oracle])
    return result.assign(copied=result["copied"].where(result["kind"] != "oracle"))


def test_an_oracle_has_a_row_and_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = plot_vectors(with_oracle())
    assert at(figure, "x", "vector", -3 + MARKS["vector"][3]).x.tolist() == [38 / N]
    assert np.isnan(at(figure, "x3", "vector", -3 + MARKS["vector"][3]).x).all()
    assert "cannot generate" in words(figure)
    assert "cannot generate" not in words(plot_vectors(sizes_and_seeds()))
    show_comparison(Reporter(quiet=False), with_oracle(), tmp_path, tmp_path / "p.html", reused=False)
    text = capsys.readouterr().out
    assert re.search(r"│ oracle +│ 0.950 .*│ +– │", text)
    assert "oracle" not in text.split("What it takes")[1].split("Brackets")[0]


# ------------------------------------------------------------------------------------------------------------ distance


def test_lines_are_distances_by_layer() -> None:
    result = sizes_and_seeds()
    figure = plot_vector_distance(result)
    ways = over_seeds(summarise_vectors(result))
    for panel, name in (("x", "distance"), ("x2", "distance_ratio")):
        for label in ("zero-shot", "live, 20 episodes", "mimic, 80 episodes"):
            (line,) = [t for t in traces(figure, panel, label) if t.mode == "lines+markers"]
            estimate, low, high = ways[name].sel(way=label).values.T
            np.testing.assert_array_equal(line.y, estimate)
            np.testing.assert_array_equal(line.customdata, np.column_stack([range(3), low, high]))
            (band,) = [t for t in figure.data if (t.xaxis or "x") == panel and t.legendgroup == label and t.fill]
            np.testing.assert_array_equal(band.y, [*high, *low[::-1]])
        random = traces(figure, panel, "random vectors")
        assert len(random) == 4
    named = {t.name for t in figure.data if t.showlegend}
    assert named == {
        "zero-shot",
        "random vectors",
        *(f"{m}, {n} episodes" for m in ("live", "mimic") for n in (20, 80)),
    }
    assert "layer output" in figure.layout.yaxis.title.text
    assert "those of the query" in words(figure)
    assert "the first 10 episodes" in words(figure)
    solid = {t.name for t in figure.data if t.showlegend and t.line.dash == "solid" and t.name != "random vectors"}
    assert solid == {"live, 80 episodes", "mimic, 80 episodes"}
    with pytest.raises(UsageError, match="measured no distance"):
        plot_vector_distance(result.assign(distance=result["distance"] * np.nan))


# -------------------------------------------------------------------------------------------------------------- curves


def test_curves_rise_over_the_size_of_the_training() -> None:
    result = sizes_and_seeds()
    figure = plot_vector_curves(result)
    ways = over_seeds(summarise_vectors(result, distances=False))["accuracy"]
    for method, side in (("live", -1), ("mimic", 1)):
        (line,) = [t for t in traces(figure, "x", method) if t.mode == "lines+markers"]
        assert np.sign(line.x - np.log([20, 80])).tolist() == [side, side]
        np.testing.assert_allclose(line.x, np.log([20, 80]), atol=0.05)
        ends = ways.sel(way=[f"{method}, {n} episodes" for n in (20, 80)]).values
        np.testing.assert_array_equal(line.y, ends[:, 0])
        np.testing.assert_allclose(line.y + line.error_y.array, ends[:, 2])
        dots = [t for t in figure.data if t.legendgroup == method and t.mode == "markers"]
        assert [len(t.x) for t in dots] == [4]
    assert list(figure.layout.xaxis.ticktext) == ["20", "80"]
    np.testing.assert_allclose(figure.layout.xaxis.tickvals, np.log([20, 80]))
    across = {s.y0 for s in figure.layout.shapes if s.type == "line"}
    assert across == {12 / N, 38 / N}
    random = traces(figure, "x", "random vectors")
    assert [t.y.tolist() for t in random] == [
        ways.sel(way=[f"random like {m}, {n} episodes" for n in (20, 80)]).values[:, 0].tolist()
        for m in ("live", "mimic")
    ]


def test_both_sizes_have_a_panel_and_none_has_no_figure() -> None:
    ways = [
        way(f"{n} {k}", first(N, n // 10 + k), training_episodes=n, training_shots=k) for n in (20, 80) for k in (1, 8)
    ]
    ends = references(ZERO, FEW)
    figure = plot_vector_curves(comparison([*ends, *ways]))
    names = {(t.xaxis or "x", t.name): t.y.tolist() for t in figure.data if t.showlegend}
    share = {(n, k): (n // 10 + k) / N for n in (20, 80) for k in (1, 8)}
    assert names == {
        **{("x", f"live, {k} shots"): [share[20, k], share[80, k]] for k in (1, 8)},
        **{("x2", f"live, {n} episodes"): [share[n, 1], share[n, 8]] for n in (20, 80)},
    }
    with pytest.raises(UsageError, match="as many episodes"):
        plot_vector_curves(comparison([*ends, ways[0]]))


def test_sizes_trained_otherwise_are_other_lines_only_if_they_must() -> None:
    def lines(*about: tuple[int, str]) -> set[str]:
        ways = [way(f"v{i}", FEW, training_episodes=n, training=how) for i, (n, how) in enumerate(about)]
        figure = plot_vector_curves(comparison([*references(ZERO, FEW), *ways]))
        return {t.name for t in figure.data if t.showlegend and t.mode == "lines+markers" and len(t.x) == 2}

    assert len(lines((20, "epochs=9"), (80, "epochs=3"))) == 1
    assert len(lines((20, "epochs=9"), (80, "epochs=9"), (20, "epochs=3"), (80, "epochs=3"))) == 2


# --------------------------------------------------------------------------------------------------------------- parts


def test_bars_are_what_parts_gain() -> None:
    result = in_parts()
    figure = plot_vector_parts(result)
    summary = summarise_vectors(result, distances=False)
    assert list(figure.layout.yaxis.ticktext) == ["all of it", "layer 0", "layer 1"]
    bars = [t for t in figure.data if t.type == "bar"]
    assert len(bars) == 2
    for label, trace in zip(("a <i>", "b"), bars, strict=True):
        gain, low, high = summary["to_zero_shot"].sel(way=[label, f"{label}, layer 0", f"{label}, layer 1"]).values.T
        assert trace.y.tolist() == [0, 1, 2]
        assert trace.base == 12 / N
        np.testing.assert_allclose(trace.x, gain)
        np.testing.assert_allclose(trace.x + trace.error_x.array, high)
        np.testing.assert_allclose(trace.x - trace.error_x.arrayminus, low)
        assert figure.layout.xaxis.range[1] > 12 / N + high.max()
    assert "a &lt;i&gt;" in " ".join(a.text for a in figure.layout.annotations)
    rows = plot_vectors(result).layout.yaxis.ticktext
    assert list(rows) == ["few-shot", "zero-shot", "a &lt;i&gt;", "b"]
    with pytest.raises(UsageError, match="no vector in parts"):
        plot_vector_parts(sizes_and_seeds())


def test_many_heads_are_a_map() -> None:
    heads = tuple(f"head {layer}.{head}" for layer in range(6) for head in range(8) if (layer, head) != (2, 5))
    assert len(heads) > MANY
    result = in_parts(heads)
    figure = plot_vector_parts(result)
    one, other = figure.data
    assert one.type == "heatmap"
    assert one.z.shape == (6, 8)
    gains = summarise_vectors(result, distances=False)["to_zero_shot"]
    np.testing.assert_array_equal(one.customdata[4, 3], gains.sel(way="a <i>, head 4.3"))
    assert other.z[4, 3] == gains.sel(way="b, head 4.3").values[0]
    assert np.isnan(one.z[2, 5])
    assert np.isnan(one.z).sum() == 1
    assert one.coloraxis == other.coloraxis == "coloraxis"
    assert figure.layout.coloraxis.cmid == 0
    assert "by chance" in words(figure)


def test_seeds_of_parts_are_dots() -> None:
    ways = references(ZERO, FEW)
    for seed in (0, 1):
        ways += [
            way(f"a{seed}", first(N, 30 + seed), training_seed=seed),
            way(f"a{seed}, layer 1", first(N, 20 + seed), training_seed=seed, vector=f"a{seed}", where="layer 1"),
        ]
    figure = plot_vector_parts(comparison(ways))
    dots = {round(t.y[0]): t.x.tolist() for t in figure.data if t.type == "scatter"}
    assert dots == {0: [30 / N, 31 / N], 1: [20 / N, 21 / N]}


# -------------------------------------------------------------------------------------------------- tables and scripts


def test_a_page_has_what_there_is_to_show(tmp_path: Path) -> None:
    result = sizes_and_seeds()
    assert [title for title, _, _ in figures_of(result)] == ["Answers", "Training", "Distance"]
    plain = in_parts()
    nowhere = plain.assign(distance=plain["distance"] * np.nan)
    assert [title for title, _, _ in figures_of(nowhere)] == ["Answers", "Parts", "Training"]
    write_page(tmp_path / "page.html", result, figures_of(result), title="In-context vectors")
    assert (tmp_path / "page.html").stat().st_size > 1e6


def test_the_tables_say_what_the_summary_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = sizes_and_seeds()
    show_comparison(Reporter(quiet=False), result, tmp_path, tmp_path / "p.html", reused=False)
    text = capsys.readouterr().out
    ways = over_seeds(summarise_vectors(result))
    estimate, low, high = ways["accuracy"].sel(way="mimic, 80 episodes").values
    assert re.search(rf"│ mimic, 80 episodes +│ +{estimate:.3f} \[{low:.2f}, {high:.2f}\]", text)
    rows = re.findall(r"^│ (.{18})", text.split("With the gold")[0], re.M)
    assert [row.rstrip() for row in rows[:6]] == [
        "zero-shot",
        "few-shot",
        "live, 20 episodes",
        "  + demonstrations",
        "  random",
        "live, 80 episodes",
    ]
    far = float(ways["distance_ratio"].sel(way="live, 20 episodes", layer=2, end="estimate"))
    assert re.search(rf"│ live, 20 episodes +│.*│ +{far:.3f} ", text.split("With the gold")[1])
    assert re.search(r"│ live, 20 episodes +│ +774 │ 3.1 kB │ +9 │", text)
    seeds = text.split("From seed to seed")[1]
    assert re.search(r"│ live, 20\s+│ +2 │ 0.550 to 0.625 │", seeds)
    assert "Picture:" in text


def test_parts_have_a_table_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(Reporter(quiet=False), in_parts(), tmp_path, tmp_path / "p.html", reused=False)
    answers, parts = capsys.readouterr().out.split("Parts of vectors")
    assert "layer" not in answers
    assert re.search(r"│ b, layer 1 +│ 0.150", parts)
    assert "From seed to seed" not in parts


def test_the_json_has_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = sizes_and_seeds()
    show_comparison(Reporter(quiet=True), result, tmp_path, tmp_path / "p.html", reused=True)
    given = json.loads(capsys.readouterr().out)
    assert given["reused"] is True
    assert [x["way"] for x in given["ways"]] == result["way"].values.tolist()
    assert given["n"] == N
    summary = summarise_vectors(result)
    one = next(x for x in given["ways"] if x["way"] == "mimic 80 1")
    assert list(one["recovered"].values()) == summary["recovered"].sel(way="mimic 80 1").values.tolist()
    assert one["training_episodes"] == 80
    assert one["group_of"] == "mimic, 80 episodes"
    assert one["to_random"]["estimate"] > 0
    group = next(x for x in given["groups"] if x["group"] == "mimic, 80 episodes")
    assert group["n_seeds"] == 2
    assert group["accuracy"]["most"] == one["accuracy"]["estimate"]
    assert as_json(summary)["ways"][0]["to_random"]["estimate"] is None


@pytest.mark.parametrize("name", ["vectors", "vector_distance", "vector_curves", "vector_parts"])
def test_the_scripts_read_a_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specification = importlib.util.spec_from_file_location(name, ROOT / "figures" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    write_zarr(tmp_path / "result.zarr", in_parts() if name == "vector_parts" else sizes_and_seeds())
    assert script.main([str(tmp_path)]) == 0
    assert "tiny-vlm" in (tmp_path / f"{name}.html").read_text(encoding="utf-8")
    capsys.readouterr()
