"""What the ``segment`` axis of a result means, and what follows from mass.

A segment is a set of key positions (``docs/results.md``): all tokens of one role in one demonstration or in the
query, or the sink, or the template. The segments partition the positions of an episode, so the mass of a row sums to
1 over ``segment``. Everything here regroups or rescales that one axis; nothing here is stored.

An episode that lacks a segment holds NaN there. A sum skips it; a sum over missing segments alone is NaN, because
"these tokens do not exist" and "nothing attends to these tokens" are two different findings.

>>> import xarray as xr
>>> coordinates = {"modality": ("segment", ["sink", "visual", "textual"]), "demonstration": ("segment", [-2, 0, -1])}
>>> mass = xr.DataArray([0.5, 0.3, 0.2], dims="segment", coords=coordinates)
>>> by_group(mass).sel(group="visual").item()
0.3
>>> by_group(mass).sel(group="structural").item()
nan
"""

from __future__ import annotations

import xarray as xr

from probe.errors import UsageError, did_you_mean

QUERY = -1
"""The value of the coordinate ``demonstration`` on segments of the query."""

NEITHER = -2
"""The value of the coordinate ``demonstration`` on segments of neither a demonstration nor the query."""

MODALITIES = ("visual", "textual", "structural", "sink")
"""The values of the coordinate ``modality``."""

GROUPS = ("visual", "textual", "structural", "sink", "query and template")
"""A coarser partition: the demonstrations' tokens by modality, the sink, and all the rest."""

CONTENT = ("visual", "textual")
"""The modalities that carry what a demonstration says; structural tokens are never counted among them."""


def density(result: xr.Dataset) -> xr.DataArray:
    """Mass per token of a segment that the row can see.

    Parameters
    ----------
    result
        As in ``docs/results.md``.

    Returns
    -------
    xarray.DataArray
        Dimensions of ``mass``; unit: probability per token; NaN where the row can see no token of the segment.
    """
    visible = result["n_visible"]
    return (result["mass"] / visible.where(visible > 0)).rename("density").assign_attrs(units="probability per token")


def visible_share(result: xr.Dataset) -> xr.DataArray:
    """Share of the keys that a row can see which the segment holds: its mass under uniform attention.

    Parameters
    ----------
    result
        As in ``docs/results.md``.

    Returns
    -------
    xarray.DataArray
        Dimensions (episode, row, layer, segment); NaN where the row can see no key of the segment.
    """
    share = result["visible_share"]
    return share.where(share > 0).assign_attrs(units="share of visible keys")


def lift(result: xr.Dataset) -> xr.DataArray:
    """Mass relative to uniform attention: mass / :func:`visible_share`, so that 1 is uniform.

    Parameters
    ----------
    result
        As in ``docs/results.md``.

    Returns
    -------
    xarray.DataArray
        Dimensions of ``mass``; NaN where the row can see no key of the segment.
    """
    return (result["mass"] / visible_share(result)).rename("lift").assign_attrs(units="1 = uniform attention")


def without_sinks(result: xr.Dataset) -> xr.Dataset:
    """Take the attention sinks out of every segment.

    Nothing is renormalised: masses then sum to less than 1, and a lift of 1 is still uniform attention over all visible
    keys. A segment that holds nothing but sinks keeps a mass of 0 and has no density and no lift.

    Parameters
    ----------
    result
        As in ``docs/results.md``.

    Returns
    -------
    xarray.Dataset
        With ``mass``, ``n_visible``, ``visible_share`` and ``patch_mass`` of the positions that are no sinks of the
        layer, and the attribute ``left_out``, which says so. Without ``contribution`` and what was recorded of every
        token, from which sinks cannot be taken away.
    """
    if "left_out" in result.attrs:
        return result
    visible = result["n_visible"] - result["sink_visible"]
    empty = visible < 1e-4  # a row is the mean over fewer positions; what is below is rounding
    left = {
        "mass": result["mass"] - result["sink_mass"],
        "n_visible": visible,
        "visible_share": result["visible_share"] - result["sink_share"],
    }
    left = {name: values.clip(0).where(~empty | values.isnull(), 0) for name, values in left.items()}
    if "patch_mass" in result:
        left["patch_mass"] = result["patch_mass"].where(~result["patch_sink"], 0)
    rest = result.drop_dims("token", errors="ignore").drop_vars("contribution", errors="ignore")
    rest = rest.assign({name: values.assign_attrs(result[name].attrs) for name, values in left.items()})
    found = bool((result["n_sinks"] > 0).any())
    note = "masses are not renormalised, so they sum to less than 1" if found else "the rule found none"
    return rest.assign_attrs(left_out=f"attention sinks; {note}")


def in_demonstrations(result: xr.Dataset | xr.DataArray) -> xr.DataArray:
    """Which segments belong to a demonstration, its delimiters included.

    Parameters
    ----------
    result
        A result, or anything with its ``segment`` axis.

    Returns
    -------
    xarray.DataArray
        Boolean, dimension (segment).
    """
    return (result["demonstration"] >= 0).rename("in_demonstrations")


def by_group(values: xr.DataArray) -> xr.DataArray:
    """Sum over the segments of each of :data:`GROUPS`.

    Parameters
    ----------
    values
        Anything that adds up over segments (mass, tokens, share), with dimension ``segment`` and its coordinates.

    Returns
    -------
    xarray.DataArray
        ``group`` first, then the other dimensions of ``values``. NaN where all segments of the group are missing.
    """
    sink = values["modality"] == "sink"
    demonstrations = in_demonstrations(values) & ~sink
    masks = {
        **{name: demonstrations & (values["modality"] == name) for name in ("visual", "textual", "structural")},
        "sink": sink,
        "query and template": ~demonstrations & ~sink,
    }
    return _stack([_sum(values, masks[name]) for name in GROUPS], "group", GROUPS)


def by_demonstration(values: xr.DataArray) -> xr.DataArray:
    """Sum over the segments of each demonstration, visual and textual apart.

    Parameters
    ----------
    values
        Anything that adds up over segments, with dimension ``segment`` and its coordinates.

    Returns
    -------
    xarray.DataArray
        Dimensions (modality, demonstration, …): modality is ``visual`` or ``textual``, demonstration counts from 0, the
        one that is read first. NaN where an episode has no such tokens.

    Raises
    ------
    UsageError
        If there is no demonstration at all.
    """
    present = values["demonstration"].values
    places = sorted({int(place) for place in present[present >= 0]})
    if not places:
        raise UsageError(
            "These episodes have no demonstrations; to see where their mass lies, run with one shot or more."
        )
    rows = []
    for modality in CONTENT:
        here = values["modality"] == modality
        sums = [_sum(values, here & (values["demonstration"] == place)) for place in places]
        rows.append(_stack(sums, "demonstration", places))
    return _stack(rows, "modality", CONTENT)


def group_mass(result: xr.Dataset, *, row: str = "answer", per_token: bool = False) -> xr.DataArray:
    """Mass of one row on five groups that partition it.

    Parameters
    ----------
    result
        As in ``docs/results.md``.
    row
        One label of the coordinate ``row``.
    per_token
        Divide by the number of the group's tokens that the row can see.

    Returns
    -------
    xarray.DataArray
        Dimensions (group, episode, layer, head), groups as in :data:`GROUPS`; without ``per_token`` the groups that an
        episode has sum to 1.
    """
    selected = select_row(result, row)
    mass = by_group(selected["mass"])
    if not per_token:
        return mass.rename("group_mass").assign_attrs(units="probability")
    visible = by_group(selected["n_visible"])
    return (mass / visible.where(visible > 0)).rename("group_density").assign_attrs(units="probability per token")


def group_lift(result: xr.Dataset, *, row: str = "answer") -> xr.DataArray:
    """Mass of one row on five groups, relative to uniform attention over the keys that the row can see.

    Parameters
    ----------
    result
        As in ``docs/results.md``.
    row
        One label of the coordinate ``row``.

    Returns
    -------
    xarray.DataArray
        Dimensions (group, episode, layer, head); 1 is uniform; NaN where the row can see no key of the group.
    """
    selected = select_row(result, row)
    share = by_group(visible_share(selected))
    return (by_group(selected["mass"]) / share).rename("group_lift").assign_attrs(units="1 = uniform attention")


def mass_by_demonstration(result: xr.Dataset, *, row: str = "answer") -> xr.DataArray:
    """Mass of one row on the visual and on the textual tokens of each demonstration.

    Parameters
    ----------
    result
        As in ``docs/results.md``.
    row
        One label of the coordinate ``row``.

    Returns
    -------
    xarray.DataArray
        Dimensions (modality, demonstration, episode, layer, head); unit: probability; NaN where the episode has fewer
        demonstrations, or none of these tokens.
    """
    mass = by_demonstration(select_row(result, row)["mass"])
    return mass.rename("mass_by_demonstration").assign_attrs(units="probability")


def select_row(result: xr.Dataset, row: str) -> xr.Dataset:
    """Keep one row.

    Parameters
    ----------
    result
        As in ``docs/results.md``.
    row
        One label of the coordinate ``row``.

    Returns
    -------
    xarray.Dataset
        Without the dimension ``row``.

    Raises
    ------
    UsageError
        If the result has no such row.
    """
    known = [str(label) for label in result["row"].values]
    if row not in known:
        raise UsageError(f"The result has no row {row!r}; {did_you_mean(row, known)}")
    return result.isel(row=known.index(row))


def _sum(values: xr.DataArray, mask: xr.DataArray) -> xr.DataArray:
    """Sum over the masked segments; NaN, not 0, where none of them is there."""
    chosen = values.isel(segment=mask.values.nonzero()[0])
    return chosen.astype(float, copy=False).sum("segment", skipna=True, min_count=1)


def _stack(parts: list[xr.DataArray], name: str, labels: tuple[str, ...] | list[int]) -> xr.DataArray:
    return xr.concat(parts, dim=xr.DataArray(list(labels), dims=name, name=name))
