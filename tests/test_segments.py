"""What follows from mass: the groups partition a row, and a missing segment is never a zero."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import xarray as xr

from probe import segments
from probe.errors import UsageError
from tests.synthetic_result import Plant, synthetic_result


@pytest.fixture(scope="module")
def result() -> xr.Dataset:
    return synthetic_result()


def test_the_groups_of_a_row_sum_to_one(result):
    mass = segments.group_mass(result)
    assert mass.dims == ("group", "episode", "layer", "head")
    assert mass["group"].values.tolist() == list(segments.GROUPS)
    np.testing.assert_allclose(mass.sum("group").values, 1, atol=1e-6)


def test_group_mass_equals_a_plain_loop_over_segments(result):
    mass = segments.group_mass(result)
    expected = np.zeros(mass.shape)
    for i, label in enumerate(result["segment"].values.tolist()):
        role = label.split("/")[-1]
        if label == "sink":
            group = "sink"
        elif label.startswith("demo"):
            group = {"image": "visual", "question": "textual", "answer": "textual", "delimiter": "structural"}[role]
        else:
            group = "query and template"
        values = result["mass"].sel(row="answer").values[..., i]
        expected[segments.GROUPS.index(group)] += np.nan_to_num(values)
    np.testing.assert_allclose(np.nan_to_num(mass.values), expected, atol=1e-6)


def test_missing_is_nan_and_unattended_is_zero():
    result = synthetic_result(plant=Plant(demonstration=0, row=1, column=2))
    mass = segments.group_mass(result)
    assert np.isnan(mass.sel(group="visual").isel(episode=2)).all()  # the episode without images
    with_images = mass.isel(episode=[0, 1, 3])
    assert (with_images.sel(group="visual") == 1).all()
    assert (with_images.sel(group="textual") == 0).all()
    assert np.isnan(segments.group_lift(result).sel(group="visual").isel(episode=2)).all()


def test_a_row_that_an_episode_lacks_is_nan_throughout(result):
    mass = segments.group_mass(result, row="answer_rest")
    assert np.isnan(mass.isel(episode=[0, 2, 3])).all()
    np.testing.assert_allclose(mass.isel(episode=1).sum("group"), 1, atol=1e-6)


def test_a_group_without_any_segment_is_nan(result):
    without = result.isel(segment=result["role"].values != "image")
    assert np.isnan(segments.group_mass(without).sel(group="visual")).all()
    assert np.isnan(segments.mass_by_demonstration(without).sel(modality="visual")).all()


def test_density_and_mass_per_token(result):
    density = segments.density(result)
    assert set(density.dims) == set(result["mass"].dims)
    place = {"episode": 0, "row": 0, "layer": 1, "head": 2}
    image = result["mass"].isel(place).sel(segment="demo0/image")
    assert density.isel(place).sel(segment="demo0/image").item() == pytest.approx(image.item() / 6)
    assert np.isnan(density.isel(episode=2).sel(segment="demo0/image")).all()
    textual = segments.group_mass(result).sel(group="textual").isel(episode=0)
    per_token = segments.group_mass(result, per_token=True).sel(group="textual").isel(episode=0)
    np.testing.assert_allclose(per_token, textual / (2 * 3))  # two demonstrations of 2 + 1 tokens


def test_uniform_attention_has_lift_one(result):
    uniform = result["n_visible"] / result["n_visible"].sum("segment")
    mass = uniform.where(result["n_tokens"] > 0).expand_dims(head=3).transpose(*result["mass"].dims)
    flat = result.assign(mass=mass.assign_coords(head=result["head"]))
    lift = segments.lift(flat)
    seen = flat["n_visible"].sel(row="answer") > 0
    np.testing.assert_allclose(lift.sel(row="answer").where(seen, 1), 1)
    assert np.isnan(lift.sel(row="answer").where(~seen)).all()
    grouped = segments.group_lift(flat)
    np.testing.assert_allclose(grouped.where(grouped.notnull(), 1), 1)


def test_what_a_row_cannot_see_has_mass_zero_and_no_lift(result):
    own_answer = {"row": "answer", "segment": "query/answer"}
    assert (result["mass"].sel(own_answer) == 0).all()
    assert np.isnan(segments.lift(result).sel(own_answer)).all()


def test_mass_by_demonstration(result):
    mass = segments.mass_by_demonstration(result)
    assert mass.dims == ("modality", "demonstration", "episode", "layer", "head")
    assert mass["modality"].values.tolist() == ["visual", "textual"]
    assert mass["demonstration"].values.tolist() == [0, 1, 2]
    for episode, shots in enumerate(result["shots"].values):
        there = mass.sel(modality="textual").isel(episode=episode, layer=0, head=0).notnull()
        assert there.values.tolist() == [d < shots for d in range(3)]
    group = segments.group_mass(result)
    for modality in ("visual", "textual"):
        total = mass.sel(modality=modality).sum("demonstration", min_count=1)
        np.testing.assert_allclose(total, group.sel(group=modality))


def test_in_demonstrations(result):
    inside = segments.in_demonstrations(result)
    assert inside.dims == ("segment",)
    assert result["segment"].values[inside.values].tolist() == [
        s for s in result["segment"].values if s.startswith("demo")
    ]


def test_requests_that_make_no_sense(result):
    with pytest.raises(UsageError, match="did you mean answer"):
        segments.group_mass(result, row="anwser")
    zero_shot = result.isel(segment=~segments.in_demonstrations(result).values)
    with pytest.raises(UsageError, match="no demonstrations"):
        segments.mass_by_demonstration(zero_shot)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(segments).failed == 0
