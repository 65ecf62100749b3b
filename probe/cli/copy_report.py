"""The summary of ``probe copy-rate``: rates by strategy, by place and by answer type, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from probe.cli.report import Reporter, finite, table
from probe.measures.copy_summary import PUBLISHED

if TYPE_CHECKING:
    import xarray as xr
    from rich.table import Table

MOST_PLACES = 8
"""Beyond these, the first and the last places are shown."""


def show(
    reporter: Reporter, result: xr.Dataset, summary: xr.Dataset, directory: Path, picture: Path, *, reused: bool
) -> None:
    """Print the summary."""
    if reporter.quiet:
        paths = {"directory": str(directory), "picture": str(picture), "reused": reused}
        reporter.json({**result.attrs, **as_json(summary), **paths})
        return
    asked = int(result.attrs["n_queries"])
    reporter.facts(result, [("queries", str(asked))], reused=reused)
    for made in (_copied(summary), _caused(summary), _places(summary), _types(summary)):
        if made is not None:
            reporter.out.print(made)
    fewest = int(summary["n"].sel(measure="copy_rate").min())
    if fewest < asked:
        reporter.note(f"n below {asked}: for the other queries nobody in the pool gives what the strategy needs.")
    reporter.note(
        "Shares with 95 % intervals over queries. Where demonstrations are retrieved, they share the query's answer "
        "because they are like it: the copy rate has no null there, and harmful and counterfactual copying are what to "
        "read. Published: OpenFlamingo v1 / v2, from the slides of arXiv 2312.01571; shots and data set are not stated."
    )
    reporter.ending(result, picture, directory)


def _groups(summary: xr.Dataset) -> list[xr.Dataset]:
    return [summary.isel(group=place) for place in range(summary.sizes["group"])]


def _copied(summary: xr.Dataset) -> Table:
    """How much is copied, with what it has to be compared with."""
    made = table("Copy rate (CR)", ("demonstrations", "n", "CR", "gold shown", "null", "excess", "published, %"))
    for group in _groups(summary):
        reference = PUBLISHED.get(str(group["strategy"].item()))
        made.add_row(
            str(group["group"].item()),
            str(int(group["n"].sel(measure="copy_rate"))),
            *(_rate(group, measure) for measure in ("copy_rate", "gold_shown", "null", "excess")),
            "–" if reference is None else f"{reference[0]:.1f} / {reference[1]:.1f}",
        )
    return made


def _caused(summary: xr.Dataset) -> Table:
    """What copying does, and whether demonstrations cause it."""
    measures = ("accuracy", "majority", "harmful", "copied_if_wrong", "counterfactual")
    made = table("What copying does", ("demonstrations", *(name.replace("_", " ") for name in measures)))
    for group in _groups(summary):
        made.add_row(str(group["group"].item()), *(_rate(group, measure) for measure in measures))
    return made


def _places(summary: xr.Dataset) -> Table | None:
    """Which demonstration is copied."""
    n = summary.sizes["place"]
    if n < 2:
        return None
    shown = list(range(n)) if n <= MOST_PLACES else [0, 1, 2, n - 3, n - 2, n - 1]
    made = table("Which one is copied, where one alone gives the answer", ("demonstrations", "n", *map(str, shown)))
    for group in _groups(summary):
        if int(group["shots"]) > 1:
            shares = group["profile"].sel(end="estimate").values[shown].tolist()
            cells = ["–" if share != share else f"{share:.2f}" for share in shares]
            made.add_row(str(group["group"].item()), str(int(group["n_profile"])), *cells)
    return made if made.row_count else None


def _types(summary: xr.Dataset) -> Table | None:
    """Copy rate and harmful copying by answer type."""
    types = summary["answer_type"].values.tolist()
    if len(types) < 2:
        return None
    made = table("By answer type", ("demonstrations", *(f"{k}: {what}" for k in types for what in ("CR", "harmful"))))
    for group in _groups(summary):
        by_type = group.drop_vars(("rate", "n")).rename(rate_by_type="rate", n_by_type="n")
        cells = [_rate(by_type.sel(answer_type=k), m) for k in types for m in ("copy_rate", "harmful")]
        made.add_row(str(group["group"].item()), *cells)
    return made


def _rate(group: xr.Dataset, measure: str) -> str:
    """``0.437 [0.38, 0.49]``, and its n where that is smaller than the group's."""
    estimate, low, high = group["rate"].sel(measure=measure).values.tolist()
    if estimate != estimate:
        return "–"
    n, all_of_them = (int(group["n"].sel(measure=name)) for name in (measure, "copy_rate"))
    of_fewer = f", n {n}" if n < all_of_them else ""
    return f"{estimate:.3f}" + (escape(f" [{low:.2f}, {high:.2f}]") if low == low else "") + of_fewer


def as_json(summary: xr.Dataset) -> dict[str, Any]:
    """The tables, for programs."""
    groups = []
    for group in _groups(summary):
        by_type = {
            str(kind): _as_json(group["rate_by_type"].sel(answer_type=kind), group["n_by_type"].sel(answer_type=kind))
            for kind in summary["answer_type"].values
        }
        groups.append(
            {
                "strategy": str(group["strategy"].item()),
                "shots": int(group["shots"]),
                **_as_json(group["rate"], group["n"]),
                "by_answer_type": by_type,
                "profile": [finite(value) for value in group["profile"].sel(end="estimate").values.tolist()],
            }
        )
    return {"groups": groups, "published_percent": {name: list(values) for name, values in PUBLISHED.items()}}


def _as_json(rate: xr.DataArray, n: xr.DataArray) -> dict[str, Any]:
    measures: Sequence[str] = rate["measure"].values.tolist()
    ends: Sequence[str] = rate["end"].values.tolist()
    return {
        measure: {
            **{end: finite(float(rate.sel(measure=measure, end=end))) for end in ends},
            "n": int(n.sel(measure=measure)),
        }
        for measure in measures
    }
