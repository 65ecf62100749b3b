"""Figures show what the result holds, in the right place, and a page stands on its own."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from PIL import Image
from plotly.offline import get_plotlyjs

from probe.errors import ProbeError, UsageError
from probe.plots.attention_map import plot_attention_map
from probe.plots.demonstration_position import plot_mass_by_demonstration
from probe.plots.overlay import plot_overlay, stored_episodes
from probe.plots.page import Table, write_page
from probe.plots.save import save_figure
from probe.segments import GROUPS, group_lift
from probe.store.atomic import write_zarr
from tests.synthetic_result import Plant, synthetic_result

ROOT = Path(__file__).parent.parent
CAVEAT = "The bundled model proves the tool, never the science."


def words(figure: go.Figure) -> str:
    """The title, the lines under it and all annotations."""
    texts = [figure.layout.title.text, figure.layout.title.subtitle.text, *(a.text for a in figure.layout.annotations)]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", " ".join(texts)))


def heat_maps(figure: go.Figure) -> list[go.Heatmap]:
    return [trace for trace in figure.data if trace.type == "heatmap"]


def all_figures(result: xr.Dataset) -> list[go.Figure]:
    heads = [(0, 0), (1, 2)]
    return [
        plot_attention_map(result),
        plot_mass_by_demonstration(result, heads=heads),
        plot_overlay(result, heads=heads),
    ]


def test_the_room_loads_without_plotly():
    code = "import sys, probe.plots, probe.segments; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_figure_says_model_n_caveat_and_that_mass_is_not_use():
    for figure in all_figures(synthetic_result(caveat=CAVEAT)):
        text = words(figure)
        assert "tiny-vlm on binding-uncued" in text
        assert "n = " in text
        assert "knockout" in text
        assert CAVEAT in text
    for figure in all_figures(synthetic_result()):
        assert "bundled" not in words(figure)


def test_every_figure_escapes_what_a_user_gave():
    for figure in all_figures(synthetic_result(model="<b>big</b>", caveat="a <i>note</i>")):
        assert "&lt;b&gt;big&lt;/b&gt;" in figure.layout.title.subtitle.text
        assert "<i>" not in figure.layout.title.subtitle.text


def test_attention_map_puts_a_head_into_its_cell():
    result = synthetic_result(layers=4, heads=3)
    here = {"row": "answer", "layer": 2, "head": 1}
    mass = result["mass"].copy()
    mass.loc[here] = 0.0
    mass.loc[{**here, "segment": "sink"}] = 1.0
    figure = plot_attention_map(result.assign(mass=mass).assign_coords(layer=[3, 7, 11, 20]))
    maps = heat_maps(figure)
    assert len(maps) == 10
    sink = maps[2 * GROUPS.index("sink")]
    assert np.unravel_index(np.argmax(sink.z), sink.z.shape) == (2, 1)
    assert sink.z[2, 1] == 1
    assert sink.customdata[2, 1, :2].tolist() == [11, 1]
    assert figure.layout.yaxis.ticktext[figure.layout.yaxis.tickvals.index(2)] == "11"
    assert figure.layout.coloraxis.cmin == 0
    assert figure.layout.coloraxis.cmax == 1
    assert {trace.coloraxis for trace in maps[::2]} == {"coloraxis"}
    assert {trace.coloraxis for trace in maps[1::2]} == {"coloraxis2"}


def test_attention_map_averages_only_episodes_that_have_such_tokens():
    result = synthetic_result()
    figure = plot_attention_map(result)
    visual, lift = heat_maps(figure)[:2]
    images = result["mass"].sel(row="answer").isel(segment=result["modality"].values == "visual", episode=[0, 1, 3])
    inside = images.isel(segment=images["demonstration"].values >= 0).sum("segment")
    np.testing.assert_allclose(visual.z, inside.mean("episode"), rtol=1e-6)
    np.testing.assert_allclose(10**lift.z, group_lift(result).sel(group="visual").mean("episode"), rtol=1e-6)
    assert (visual.customdata[..., 4] == 3).all()
    assert "visual in demonstrations, n = 3" in words(figure)
    assert "textual in demonstrations, n = 4" in words(figure)


def test_attention_map_hatches_what_is_missing_and_clips_what_is_extreme():
    figure = plot_attention_map(synthetic_result(text_only=(0, 1, 2, 3), plant=Plant(0, 0, 0)))
    visual = heat_maps(figure)[0]
    assert np.isnan(visual.z).all()
    hatched = [trace for trace in figure.data if trace.type == "scatter"]
    assert len(hatched) == 2
    for trace in hatched:
        assert trace.fillpattern.shape
        assert (min(v for v in trace.x if v is not None), max(v for v in trace.x if v is not None)) == (-0.5, 2.5)
        assert (min(v for v in trace.y if v is not None), max(v for v in trace.y if v is not None)) == (-0.5, 3.5)
    assert words(figure).count("no token to see") == 3
    textual = heat_maps(figure)[3]
    assert (textual.z == -2).all()  # no mass at all: the end of the scale, which says so
    assert (textual.customdata[..., 2] == 0).all()
    assert figure.layout.coloraxis2.colorbar.ticktext[0].startswith("≤")


@pytest.mark.parametrize(("layers", "heads"), [(28, 28), (36, 16), (1, 1)])
def test_attention_map_of_any_size_has_few_labels_and_a_page_sized_frame(layers, heads):
    figure = plot_attention_map(synthetic_result(layers=layers, heads=heads, shots=(1, 1), text_only=()))
    assert len(figure.layout.xaxis.tickvals) <= 8
    assert len(figure.layout.yaxis.tickvals) <= 8
    assert figure.layout.width <= 1200
    assert figure.layout.height <= 1200


def test_mass_by_demonstration_counts_only_episodes_with_such_demonstrations():
    result = synthetic_result(shots=(2, 3, 2, 1, 3), text_only=(2,))
    figure = plot_mass_by_demonstration(result, heads=[(1, 2)])
    points = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(points) == 4  # two modalities, all heads and one head
    visual, textual = points[:2]
    assert visual.customdata[:, 3].tolist() == [4, 3, 2]
    assert textual.customdata[:, 3].tolist() == [5, 4, 2]
    mass = result["mass"].sel(row="answer", segment="demo1/image")
    assert visual.y[1] == pytest.approx(mass.mean(["layer", "head"]).mean("episode").item())
    chosen = points[2]
    assert chosen.y[1] == pytest.approx(mass.sel(layer=1, head=2).mean("episode").item())
    assert (visual.customdata[:, 1] <= visual.y).all()
    assert (visual.customdata[:, 2] >= visual.y).all()
    np.testing.assert_allclose(visual.y + visual.error_y.array, visual.customdata[:, 2])
    assert "n is 2 to 5" in words(figure)
    uniform = next(trace for trace in figure.data if trace.mode == "lines")
    seen = result["n_visible"].sel(row="answer", layer=0)
    share = seen.sel(segment="demo1/image") / seen.sum("segment")
    assert uniform.y[1] == pytest.approx(share.isel(episode=[0, 1, 4]).mean().item())


def test_mass_by_demonstration_with_one_episode_has_no_interval_but_a_point():
    figure = plot_mass_by_demonstration(synthetic_result(shots=(2,), text_only=()))
    points = next(trace for trace in figure.data if trace.mode == "lines+markers")
    assert np.isfinite(points.y).all()
    assert points.error_y.array.tolist() == [0, 0]


def cell_under(trace: go.Heatmap, x: float, y: float) -> float:
    """The value of a heat map with cell edges, at a point."""
    return trace.z[np.searchsorted(trace.y, y) - 1, np.searchsorted(trace.x, x) - 1]


def test_overlay_puts_planted_attention_over_the_right_part_of_the_picture():
    result = synthetic_result(plant=Plant(demonstration=0, row=1, column=2))
    figure = plot_overlay(result, heads=[(0, 0)])
    first, second, query = heat_maps(figure)
    assert first.z.shape == (2, 3)
    assert second.z.shape == query.z.shape == (3, 2)
    assert np.unravel_index(np.argmax(first.z), first.z.shape) == (1, 2)
    assert first.z[1, 2] == 1
    assert first.z.sum() == 1
    assert second.z.sum() == query.z.sum() == 0
    # the picture of a 2 x 3 grid is 24 wide and 16 high; row 1, column 2 is its lower right part
    assert first.x.tolist() == [0, 8, 16, 24]
    assert first.y.tolist() == [0, 8, 16]
    assert cell_under(first, 20, 12) == 1
    assert cell_under(first, 20, 4) == cell_under(first, 12, 12) == 0
    for trace, picture in zip(heat_maps(figure), figure.layout.images, strict=True):
        assert (picture.x, picture.y, picture.xanchor, picture.yanchor) == (0, 0, "left", "top")
        assert (picture.sizex, picture.sizey, picture.sizing) == (trace.x[-1], trace.y[-1], "stretch")
        assert (picture.xref, picture.yref, picture.layer) == (trace.xaxis or "x", trace.yaxis or "y", "below")
        axis = figure.layout[(trace.yaxis or "y").replace("y", "yaxis")]
        assert tuple(axis.range) == (trace.y[-1], 0)  # downwards: row 0 is on top
        png = Image.open(io.BytesIO(base64.b64decode(picture.source.split(",")[1])))
        assert png.size == (trace.x[-1], trace.y[-1])
    assert [re.sub(r"<[^>]*>", " ", a.text).split(" mass ")[0].strip() for a in figure.layout.annotations] == [
        "demonstration 0",
        "demonstration 1",
        "query",
    ]
    assert "mass 1.000" in figure.layout.annotations[0].text


def test_overlay_shows_stored_values_and_the_mass_of_each_image():
    result = synthetic_result()
    figure = plot_overlay(result, heads=[(3, 1)], episode=1)
    maps = heat_maps(figure)
    assert len(maps) == 4
    total = result["mass"].isel(episode=1).sel(row="answer", layer=3, head=1)
    for trace, place in zip(maps, ["demo0", "demo1", "demo2", "query"], strict=True):
        assert trace.z.sum() == pytest.approx(total.sel(segment=f"{place}/image").item(), rel=1e-5)
    assert figure.layout.coloraxis.cmax == max(trace.z.max() for trace in maps)
    assert figure.layout.coloraxis.colorscale[0][1].endswith("0.0)")  # clear where there is nothing


def test_overlay_menu_changes_maps_headings_scale_and_title():
    result = synthetic_result()
    heads = [(0, 0), (2, 1)]
    button = plot_overlay(result, heads=heads).layout.updatemenus[0].buttons[1]
    data, layout = button.args
    alone = plot_overlay(result, heads=heads[1:])
    for z, trace in zip(data["z"], heat_maps(alone), strict=True):
        assert z == trace.z.tolist()
    assert layout["coloraxis.cmax"] == alone.layout.coloraxis.cmax
    assert layout["title.text"] == alone.layout.title.text
    assert [layout[f"annotations[{i}].text"] for i in range(3)] == [a.text for a in alone.layout.annotations]
    assert not alone.layout.updatemenus


def test_overlay_of_sixteen_demonstrations_fits():
    figure = plot_overlay(synthetic_result(shots=(16,), text_only=()), heads=[(0, 0)])
    assert len(heat_maps(figure)) == 17
    assert figure.layout.width <= 1200


def test_overlay_says_what_cannot_be_drawn():
    result = synthetic_result(text_only=(0,), stored=3)
    assert stored_episodes(result) == [1, 2]
    with pytest.raises(UsageError, match="only those of episodes 1, 2"):
        plot_overlay(result, heads=[(0, 0)])
    with pytest.raises(UsageError, match="layer 9, head 0"):
        plot_overlay(result, heads=[(9, 0)], episode=1)
    with pytest.raises(UsageError, match="no grid"):
        plot_overlay(result.assign(patch_row=result["patch_row"] * 0 - 1), heads=[(0, 0)], episode=1)
    nothing = synthetic_result(text_only=(0, 1, 2, 3))
    with pytest.raises(UsageError, match="none are"):
        plot_overlay(nothing, heads=[(0, 0)])


def test_page_is_self_contained_and_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    result = synthetic_result(model=evil, caveat=CAVEAT + evil, command=evil, versions={"torch": evil}, data=evil)
    figures = [(f"Heading {evil}", "A <em>caption</em>.", figure) for figure in all_figures(result)]
    table = Table(evil, ["head", "mass"], [[evil, 0.123456], ["none", float("nan")]])
    path = tmp_path / "page.html"
    write_page(path, result, figures, title=f"Title {evil}", tables=[table])
    text = path.read_text(encoding="utf-8")

    assert text.count(get_plotlyjs()) == 1
    ours = text.replace(get_plotlyjs(), "")
    assert "http" not in ours
    assert not re.search(r"<script[^>]+src|<link|url\(|@import|<iframe|<img", ours)
    assert "MathJaxConfig: 'local'" in ours
    assert evil not in ours
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in ours
    assert ours.count('class="note"') == 1
    assert "<em>caption</em>" in ours
    assert "3 of 4 correct" in ours
    assert "0.1235" in ours
    assert 'id="figure-3"' in ours
    assert ours.replace(" ", "").count('"showSendToCloud":false') == 3  # no button that uploads a figure


def test_page_without_caveat_has_no_note_and_the_same_result_gives_the_same_page(tmp_path):
    texts = []
    for name in ("a.html", "b.html"):
        result = synthetic_result()
        write_page(tmp_path / name, result, [("Map", "", plot_attention_map(result))], title="Map")
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
    assert 'class="note"' not in texts[0]
    assert texts[0] == texts[1]


def test_a_result_read_back_from_disk_draws_the_same_figures(tmp_path):
    from probe.store.atomic import read_zarr

    result = synthetic_result(caveat=CAVEAT)
    write_zarr(tmp_path / "result.zarr", result)
    for before, after in zip(all_figures(result), all_figures(read_zarr(tmp_path / "result.zarr")), strict=True):
        assert before.to_json() == after.to_json()


def test_save_figure_says_what_is_wrong(tmp_path, monkeypatch):
    figure = plot_attention_map(synthetic_result())
    with pytest.raises(UsageError, match=r"\.html"):
        save_figure(figure, tmp_path / "figure.gif")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(ProbeError, match="kaleido, which is not installed"):
        save_figure(figure, tmp_path / "figure.pdf")
    assert list(tmp_path.iterdir()) == []


def test_the_figure_script_reads_a_run_and_writes_a_figure(tmp_path, capsys):
    specification = importlib.util.spec_from_file_location("figure_script", ROOT / "figures" / "attention_map.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    assert script.main([str(tmp_path)]) == 1
    assert "no saved dataset" in capsys.readouterr().err
    write_zarr(tmp_path / "result.zarr", synthetic_result())
    assert script.main([str(tmp_path)]) == 0
    assert "tiny-vlm" in (tmp_path / "attention_map.html").read_text(encoding="utf-8")
    assert script.main([str(tmp_path), "--row", "anser"]) == 2
    assert "did you mean answer" in capsys.readouterr().err


def test_a_view_of_the_whole_is_spread_over_the_crops():
    """One token of a 1 x 2 view covers a 2 x 2 corner of the crops' 2 x 4 grid; the image's mass is kept."""
    places = [(0, 0, 0), (0, 0, 1), *((1 + c // 2, r, c) for r in range(2) for c in range(4))]
    tile, row, column = (np.array(axis) for axis in zip(*places, strict=True))
    mass = np.array([0.4, 0.2, *[0.01] * 8])[None, None]
    whole = synthetic_result(shots=(0,), text_only=())
    images = whole.drop_dims(["patch", "image"]).assign(
        patch_mass=(("layer", "head", "patch"), np.broadcast_to(mass, (4, 3, 10))),
        thumbnail=(("image", "y", "x", "channel"), np.zeros((1, 16, 32, 3), np.uint8)),
        image_box=(("image", "edge"), [[-0.5, 0.0, 1.5, 1.0]]),
    )
    result = images.assign_coords(
        patch_image=("patch", np.zeros(10, int)),
        patch_tile=("patch", tile),
        patch_row=("patch", row),
        patch_column=("patch", column),
        image_episode=("image", [0]),
        image_demonstration=("image", [-1]),
        image_rows=("image", [2]),
        image_columns=("image", [4]),
        thumbnail_height=("image", [16]),
        thumbnail_width=("image", [32]),
    )
    figure = plot_overlay(result, heads=[(0, 0)])
    [map_] = heat_maps(figure)
    np.testing.assert_allclose(map_.z, [[0.11, 0.11, 0.06, 0.06]] * 2)
    assert map_.z.sum() == pytest.approx(mass.sum())
    # padded to twice its width, half of it on either side
    np.testing.assert_allclose(map_.x, np.linspace(-16, 48, 5))
    assert "spread over the grid of the crops" in words(figure)


def test_the_uniform_line_of_a_layer_that_sees_nothing_is_zero():
    """As in a layer whose window ends after the demonstrations: such a layer counts, with nothing."""
    result = synthetic_result(shots=(2,), text_only=())
    hidden = result.copy(deep=True)
    demonstrations = hidden["demonstration"].values >= 0
    for name in ("n_visible", "visible_share"):
        hidden[name][:, :, 0, demonstrations] = 0.0
    figure = plot_mass_by_demonstration(hidden, heads=[(0, 0), (1, 0)])
    lines = [trace.y for trace in figure.data if trace.mode == "lines"]
    full = [trace.y for trace in plot_mass_by_demonstration(result).data if trace.mode == "lines"]
    for modality in (0, 1):
        np.testing.assert_allclose(lines[modality], full[modality] * 3 / 4)  # one of four layers
        np.testing.assert_allclose(lines[2 + modality], 0)
        np.testing.assert_allclose(lines[4 + modality], full[modality])
