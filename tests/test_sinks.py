"""Attention sinks: exactly the planted ones are found, and what lies on them can be taken away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from probe import segments
from probe.cli import attention_report, run
from probe.experiments.attention_map import attention_map
from probe.measures.sinks import THRESHOLD, find_sinks
from probe.models.load import load
from probe.models.model import Model
from probe.models.token_map import segments_for
from probe.plots.attention_map import plot_attention_map
from probe.store import read_zarr, write_zarr
from tests.synthetic_result import synthetic_result
from tests.tiny_families import MODEL_TYPES, build
from tests.tiny_qwen import make_episode

SIZES = ((84, 56), (56, 84), (40, 40), (120, 30))
EPISODES = [
    make_episode(2, seed=2, sizes=SIZES),
    make_episode(1, seed=4, images=0),
    make_episode(1, seed=3, images=2, sizes=SIZES),
]
LIKE = [EPISODES[0], make_episode(2, seed=5, sizes=SIZES), make_episode(2, seed=6, sizes=SIZES)]
LAYERS = (1, 2)
"""Where the planted sinks are."""
DIMENSION, HEIGHT, EVERY = 7, 300.0, 7
TOLERANCE = 5e-5


def tiny_model(kind: str, attn: str = "sdpa") -> Model:
    made = build(kind, attn=attn)
    made.processor.chat_template = made.chat_template
    return load(made.module, processor=made.processor)


def places(length: int, every: int = EVERY) -> np.ndarray:
    """Which positions of an episode are planted: the first, and each so many later."""
    return np.arange(length) % every == 0


@contextmanager
def planted(model: Model, every: int = EVERY, first: bool = True) -> Iterator[None]:
    """Make one dimension massive at some positions, from layer 1 on, and as large as the others from layer 3 on."""
    mask: list[Tensor] = []

    def remember(module: Any, args: Any, options: dict[str, Any]) -> None:
        mask[:] = [options.get("attention_mask", torch.ones_like(options["input_ids"]))]

    def put(height: float) -> Any:
        def change(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            x = args[0] if args else options["hidden_states"]
            if x.shape[1] == 1:  # a decoding step
                return None
            number = mask[0].cumsum(1) - 1
            here = (mask[0] > 0) & (number % every == 0) & (first | (number > 0))
            x = x.clone()
            x[..., DIMENSION] = torch.where(here, height * x.square().mean(-1).sqrt(), x[..., DIMENSION])
            return ((x, *args[1:]), options) if args else (args, {**options, "hidden_states": x})

        return change

    blocks = [model.module.get_submodule(site.block) for site in model.sites if site.axis == "text"]
    hooks = [
        model.module.register_forward_pre_hook(remember, with_kwargs=True),
        blocks[LAYERS[0]].register_forward_pre_hook(put(HEIGHT), with_kwargs=True),
        blocks[LAYERS[-1] + 1].register_forward_pre_hook(put(0.01), with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def expected_counts(model: Model, episodes: list[Any]) -> np.ndarray:
    """``[episode, segment]``, planted positions."""
    known = segments_for(max(episode.shots for episode in episodes))
    rows = []
    for episode in episodes:
        index = model.encode(episode).token_map.segment_index(known)
        rows.append(np.bincount(index[places(len(index))], minlength=len(known)))
    return np.array(rows)


def episodes_for(model: Model) -> list[Any]:
    return LIKE if model.family.like_images else EPISODES


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_exactly_the_planted_positions_are_found_and_none_in_a_random_model(kind):
    """In the planted layers alone, of a padded batch with an episode of text alone, by the planted dimension."""
    model = tiny_model(kind)
    episodes = episodes_for(model)
    untouched = attention_map(model, episodes, max_new_tokens=2)
    assert (untouched["n_sinks"] == 0).all()
    assert (untouched["sink_dimensions"] == -1).all()
    assert float(untouched["sink_size"].max()) < THRESHOLD / 2
    assert float(untouched["sink_mass"].max()) == 0
    with planted(model):
        result = attention_map(model, episodes, max_new_tokens=2)
    at = [result["layer"].values.tolist().index(site.layer) for site in model.sites if site.axis == "text"]
    counts = expected_counts(model, episodes)
    for number, layer in enumerate(at):
        here = result.isel(layer=layer)
        if number in LAYERS:
            np.testing.assert_array_equal(here["n_sinks"], counts)
            assert (here["sink_dimensions"].isel(rank=0) == DIMENSION).all()
            assert (here["sink_dimensions"].isel(rank=1) == -1).all()
            assert float(here["sink_size"].isel(rank=0).min()) > 3 * THRESHOLD
        else:
            assert (here["n_sinks"] == 0).all()
            assert (here["sink_dimensions"] == -1).all()
    visual = result["n_sinks"].where(result["modality"] == "visual", 0).sum(("layer", "segment"))
    if model.reads_images_in_text:
        assert visual[0] > 0


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3", "idefics"])
def test_sink_mass_equals_a_loop_over_eager_attention(kind):
    model, eager = tiny_model(kind), tiny_model(kind, "eager")
    episodes = episodes_for(model)
    known = segments_for(2)
    with planted(model):
        result = attention_map(model, episodes, max_new_tokens=2)
    assert (result["sink_mass"] <= result["mass"] + 1e-6).where(result["mass"].notnull(), True).all()
    for number, episode in enumerate(episodes):
        encoding = eager.encode(episode)
        with planted(eager), torch.no_grad():
            inputs = eager.batch([encoding]).inputs
            weights = eager.module(**inputs, output_attentions=True, use_cache=False).attentions
        answer = encoding.token_map.answer
        index = encoding.token_map.segment_index(known)
        sinks = np.flatnonzero(places(len(index)))
        rows = {"answer": answer[:1] - 1, "answer_rest": answer[1:] - 1}
        for row, positions in rows.items():
            got = result.isel(episode=number).sel(row=row)
            for layer in range(model.n_layers):
                for segment in range(len(known)):
                    keys = [key for key in sinks if index[key] == segment] if layer in LAYERS else []
                    mass = got["sink_mass"].values[layer, :, segment]
                    if not (index == segment).any() or not len(positions):
                        assert np.isnan(mass).all()
                        continue
                    loop = np.mean([sum(weights[layer][0, :, q, key].numpy() for key in keys) for q in positions], 0)
                    np.testing.assert_allclose(mass, np.broadcast_to(loop, mass.shape), atol=TOLERANCE)
                    if kind != "gemma3":  # whose layers see a window
                        seen = [np.sum([key <= q for key in keys]) for q in positions]
                        share = np.mean([n / (q + 1) for n, q in zip(seen, positions, strict=True)])
                        assert got["sink_visible"].values[layer, segment] == pytest.approx(np.mean(seen))
                        assert got["sink_share"].values[layer, segment] == pytest.approx(share)


def test_batches_and_parts_change_nothing():
    """Alone, in a padded batch, and joined from parts of an interrupted run; and on the image tokens that are drawn."""
    model = tiny_model("qwen2_5_vl")
    assert model.batch([model.encode(episode) for episode in EPISODES]).pads[2] % EVERY  # or it would not be noticed
    kept: dict[str, xr.Dataset] = {}

    def keep(name, compute):
        if name not in kept:
            kept[name] = compute()
        return kept[name]

    def measured(**options):
        return attention_map(model, EPISODES, rows="demo-answers", max_new_tokens=2, overlay_episodes=3, **options)

    with planted(model):
        together, alone, parts = measured(batch_size=3), measured(batch_size=1), measured(batch_size=2, keep=keep)
        del kept[next(name for name in kept if name.startswith("000002"))]
        resumed = measured(batch_size=2, keep=keep)
    xr.testing.assert_identical(parts, resumed)
    for other in (alone, parts):
        for name in ("n_sinks", "sink_dimensions", "sink_visible", "patch_sink"):
            xr.testing.assert_identical(together[name], other[name])
        for name in ("sink_mass", "sink_share"):
            xr.testing.assert_allclose(together[name], other[name], rtol=0, atol=TOLERANCE)
        xr.testing.assert_allclose(together["sink_size"], other["sink_size"], rtol=1e-3)
    for image in range(together.sizes["image"]):
        token_map = model.encode(EPISODES[int(together["image_episode"][image])]).token_map
        earlier = int((together["image_episode"].values[:image] == together["image_episode"].values[image]).sum())
        marks = places(len(token_map))[token_map.image == earlier]
        own = together["patch_sink"].isel(patch=together["patch_image"].values == image)
        np.testing.assert_array_equal(own, [marks & (layer in LAYERS) for layer in range(4)])


def test_what_the_first_position_or_most_positions_hold():
    """Without the first position the rule finds nothing, nor by what more than half of all positions hold."""
    model = tiny_model("qwen2_5_vl")
    with planted(model, first=False):
        assert (attention_map(model, EPISODES, max_new_tokens=2)["n_sinks"] == 0).all()
    with planted(model, every=1):
        result = attention_map(model, EPISODES, max_new_tokens=2)
    assert (result["n_sinks"] == 0).all()
    assert (result["sink_dimensions"] == -1).all()
    assert float(result["sink_size"].sel(layer=1, rank=0).min()) > THRESHOLD
    assert attention_report._sinks(result).startswith("none found: what is massive at the first position")


def test_the_rule_by_hand():
    """Sizes around the threshold, a second dimension, padding, and what is not finite."""
    x = torch.ones(2, 6, 10)
    x[0, 0, 3], x[0, 0, 8] = 50.0, -30.0  # the first position: two massive dimensions
    x[0, 2, 8] = 20.1
    x[0, 3, 3] = -19.9
    x[0, 4, 5] = 1000.0  # massive, but not where the first position is
    x[1, 0, 3] = 400.0  # padding
    x[1, 5] = float("nan")
    x[1, 1, 3], x[1, 1, 5], x[1, 2, 3] = 25.0, 15.0, 400.0
    there = torch.tensor([[True] * 6, [False] + [True] * 5])
    found = find_sinks(x, there)
    assert found.positions.tolist() == [[True, False, True, False, False, False], [False, True, True] + [False] * 3]
    assert found.dimensions.tolist() == [[3, 8], [3, -1]]
    assert found.sizes.tolist() == [[50, 30], [25, 15]]
    for other in (x.half() * 7, x.bfloat16(), x.double()):
        assert find_sinks(other, there).dimensions.tolist() == found.dimensions.tolist()
        assert find_sinks(other, there).sizes.dtype == torch.float32
    assert find_sinks(x.double() * 7, there).positions.tolist() == found.positions.tolist()
    x[0, 1:3, 3] = 50.0  # three of six
    assert find_sinks(x, there).positions[0].tolist() == [True, True, True, False, False, False]
    x[0, 3, 3] = 50.0  # four of six
    assert find_sinks(x, there).positions[0].tolist() == [True, False, True, False, False, False]
    assert find_sinks(x, there).dimensions[0].tolist() == [-1, 8]


def by_hand() -> xr.Dataset:
    """One episode, one row, two heads; sinks: the first position, one of four image tokens, both delimiters."""
    names = ["sink", "demo0/image", "demo0/question", "demo0/delimiter", "query/image"]
    mass = np.array([[0.4, 0.3, 0.1, 0.2, np.nan], [0.1, 0.2, 0.3, 0.4, np.nan]])
    on_sinks = np.array([[0.4, 0.25, 0.0, 0.2 - 1e-8, np.nan], [0.1, 0.05, 0.0, 0.4, np.nan]])
    visible, sinks = np.array([1.0, 4, 3, 2, 0]), np.array([1.0, 1, 0, 2 - 1e-6, 0])  # but for rounding
    by_head, by_row = ("episode", "row", "layer", "head", "segment"), ("episode", "row", "layer", "segment")
    return xr.Dataset(
        {
            "mass": (by_head, mass[None, None, None], {"units": "probability"}),
            "sink_mass": (by_head, on_sinks[None, None, None]),
            "contribution": (by_head, mass[None, None, None]),
            **{
                name: (by_row, v[None, None, None]) for name, v in {"n_visible": visible, "sink_visible": sinks}.items()
            },
            "visible_share": (by_row, visible[None, None, None] / 10),
            "sink_share": (by_row, sinks[None, None, None] / 10),
            "n_tokens": (("episode", "segment"), visible[None].astype(int)),
            "n_sinks": (("episode", "layer", "segment"), sinks.round()[None, None].astype(int)),
            "sink_size": (("episode", "layer", "rank"), [[[30.0, 2.0]]]),
        },
        coords={
            "row": ["answer"],
            "layer": [5],
            "segment": names,
            "modality": ("segment", ["sink", "visual", "textual", "structural", "visual"]),
            "demonstration": ("segment", [-2, 0, 0, 0, -1]),
        },
        attrs={"sink_threshold": 20.0},
    )


def test_without_sinks_by_hand():
    result = by_hand()
    left = segments.without_sinks(result)
    np.testing.assert_allclose(
        left["mass"].squeeze(), [[0, 0.05, 0.1, 0, np.nan], [0, 0.15, 0.3, 0, np.nan]], atol=1e-12
    )
    assert left["mass"].attrs == {"units": "probability"}
    np.testing.assert_allclose(left["n_visible"].squeeze(), [0, 3, 3, 0, 0])
    density = segments.density(left).squeeze()
    np.testing.assert_allclose(
        density, [[np.nan, 0.05 / 3, 0.1 / 3, np.nan, np.nan], [np.nan, 0.05, 0.1, np.nan, np.nan]]
    )
    lift = segments.group_lift(left).squeeze()
    np.testing.assert_allclose(lift.sel(group="visual"), [0.05 / 0.3, 0.5])
    np.testing.assert_allclose(lift.sel(group="textual"), [0.1 / 0.3, 1])
    assert lift.sel(group=["sink", "structural", "query and template"]).isnull().all()
    group = segments.group_mass(left).squeeze()
    np.testing.assert_allclose(group.sum("group"), [0.15, 0.45])
    assert "contribution" not in left
    assert "sum to less than 1" in left.attrs["left_out"]
    xr.testing.assert_identical(segments.without_sinks(left), left)
    xr.testing.assert_identical(result, by_hand())


def test_the_report_by_hand():
    """The same of a result with and without its sinks."""
    result = by_hand()
    for given in (result, segments.without_sinks(result)):
        found = attention_report.found_sinks(given)
        assert found["layers"] == [5]
        assert found["positions"] == {"sink": 1, "visual": 1, "textual": 0, "structural": 2}
        assert found["share"] == pytest.approx(1.4 / 2, rel=1e-5)
        assert found["image_share"] == pytest.approx(0.3 / 0.5)
        assert found["image_token_share"] == pytest.approx(1 / 4)
    assert attention_report._sinks(result) == (
        "layers 5: 1.0 first, 1.0 image, 0.0 text and 2.0 other positions of an episode, with 70% of the attention; "
        "the images' own are 25.0% of the image tokens, with 60% of the attention on images"
    )
    none = result.assign(
        n_sinks=0 * result["n_sinks"], sink_mass=0 * result["sink_mass"], sink_size=result["sink_size"] / 10
    )
    assert attention_report._sinks(none) == (
        "none found: no dimension of the first position is massive (3; sinks: over 20)"
    )
    assert attention_report.found_sinks(none)["share"] is None
    assert segments.without_sinks(none).attrs["left_out"] == "attention sinks; the rule found none"


def test_the_command_draws_what_is_left_beside_what_is_there(tmp_path, monkeypatch, capsys):
    """Of one run, in two pictures; here all image tokens become sinks in the layer of the head that ranks first."""
    monkeypatch.chdir(tmp_path)
    command = ["attention-map", "--episodes", "4", "--shots", "1", "--out", "run", "--json"]
    assert run(command) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["sinks"]["layers"] == []
    assert plain["sink_threshold"] == THRESHOLD
    first = (plain["heads"][0]["layer"], plain["heads"][0]["head"])
    path = tmp_path / "run" / "result.zarr"
    result = read_zarr(path)
    images = (result["modality"] == "visual") & (result["layer"] == first[0])
    changed = {"n_sinks": result["n_sinks"] + images, "sink_mass": result["mass"].where(images, 0)}
    write_zarr(path, result.assign(changed).transpose(*result["mass"].dims, ...))
    for name in ("attention_map.html", "attention_map_without_sinks.html"):
        assert run([*command, *(["--without-sinks"] if "without" in name else [])]) == 0
        got = json.loads(capsys.readouterr().out)
        assert Path(got["picture"]).name == name
        assert ("left_out" in got) == ("without" in name)
        assert ("sum to less than 1" in Path(got["picture"]).read_text()) == ("without" in name)
        assert got["sinks"]["layers"] == [first[0]]
        assert got["sinks"]["image_share"] == pytest.approx(1)
        ranked = [(head["layer"], head["head"]) for head in got["heads"] if head["modality"] == "visual"]
        assert (ranked[0] == first) == ("without" not in name)
        assert all(layer != first[0] for layer, _ in ranked) == ("without" in name)
    xr.testing.assert_identical(read_zarr(path)["mass"], result["mass"])


def test_what_reads_results_works_on_what_is_left():
    result = synthetic_result()
    left = segments.without_sinks(result)
    mass, before = (segments.group_mass(each) for each in (left, result))
    assert (mass.sel(group="sink", layer=[1, 2, 3]) == 0).all()
    xr.testing.assert_identical(mass.sel(layer=0), before.sel(layer=0))
    xr.testing.assert_identical(mass.sel(group="textual"), before.sel(group="textual"))
    visual = {"group": "visual", "layer": [1, 2, 3]}
    assert (mass.sel(visual) < before.sel(visual)).where(before.sel(visual).notnull(), True).all()
    assert (left["patch_mass"].where(left["patch_sink"], 0) == 0).all()
    xr.testing.assert_identical(
        left["patch_mass"].where(~left["patch_sink"]), result["patch_mass"].where(~result["patch_sink"])
    )
    words = [str(plot_attention_map(each).layout.title.subtitle.text) for each in (left, result)]
    assert ["sum to less than 1" in text for text in words] == [True, False]
