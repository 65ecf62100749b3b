"""The summary of ``probe vector compare``: what vectors are worth and what they take, as tables or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.filesize import decimal
from rich.markup import escape

from probe.cli.report import Reporter, finite, table
from probe.measures.vector_groups import alone, is_part, over_seeds, put_back
from probe.measures.vector_summary import summarise_vectors
from probe.measures.vector_times import time_ratios

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr
    from rich.table import Table

MEASURES = (
    "accuracy",
    "to_zero_shot",
    "to_few_shot",
    "to_random",
    "recovered",
    "forced",
    "copied",
    "log_probability",
    "log_probability_to_zero_shot",
    "log_probability_to_few_shot",
)
ABOUT = ("kind", "method", "where", "shown", "scale", "like", "group_of")
COUNTS = ("training_seed", "training_episodes", "training_shots", "n_parameters", "n_bytes")

NOTE = (
    "Brackets: 95 % intervals over queries (of shares Wilson's, of distances percentile bootstrap, else BCa). "
    "Recovered: the share of the gain from zero-shot to few-shot, 0 is none and 1 all; its interval is conservative, "
    "and a dash says that there may be no gain. Copied: the answer is that of one of the episode's demonstrations, "
    "shown or not. Log p: nats. Forced: each token of the answer is the most probable behind those before it. "
    "Distance: to the states with demonstrations, at the last layer, relative to zero-shot's. Random: a vector whose "
    "directions are drawn and whose norms are those of the one above it."
)
SEEDS_NOTE = (
    "Where vectors differ in the seed of their training alone, a row is the mean over seeds, its brackets the mean of "
    "theirs; how far seeds are apart is shown by itself."
)


ORACLE_NOTE = (
    "An oracle has each query's own shift of attention, at the positions of the gold answer: it cannot generate, its "
    "accuracy is forced, and it copies nothing."
)


def show_comparison(reporter: Reporter, result: xr.Dataset, directory: Path, picture: Path, *, reused: bool) -> None:
    """Print the summary."""
    each = summarise_vectors(result.isel(layer=[-1]))
    if reporter.quiet:
        paths = {"directory": str(directory), "picture": str(picture), "reused": reused}
        reporter.json({**result.attrs, **as_json(each), **paths})
        return
    ways = over_seeds(each)
    rows = _rows(ways)
    reporter.facts(result, reused=reused)
    reporter.out.print(_answers(ways, rows))
    reporter.out.print(_states(ways, rows))
    reporter.out.print(_costs(ways))
    if "first" in result:
        reporter.out.print(_times(result))
    if bool(is_part(ways).any()):
        reporter.out.print(_parts(ways))
    several = bool((each["n_ways"] > 1).any())
    if several:
        reporter.out.print(_seeds(each))
    oracle = "oracle" in ways["kind"].values
    reporter.note(" ".join([NOTE, *([SEEDS_NOTE] if several else []), *([ORACLE_NOTE] if oracle else [])]))
    reporter.ending(result, picture, directory)


def _rows(ways: xr.Dataset) -> list[tuple[str, str]]:
    """What a row is called and which way it is: under each vector what stands beside it; without parts."""
    random = ways["kind"].values == "random"
    back = ways["shown"].values & (ways["kind"].values == "vector")
    labels, found = ways["way"].values, []
    for place in np.flatnonzero(~random & ~back & ~is_part(ways)):
        found.append((str(labels[place]), str(labels[place])))
        found += [("  + demonstrations", str(label)) for label in labels[put_back(ways, ways.isel(way=place)) & back]]
        found += [("  random", str(label)) for label in labels[random & (ways["like"].values == labels[place])]]
    named = {label for _, label in found}
    return found + [(str(label), str(label)) for label in labels[~is_part(ways)] if label not in named]


def _answers(ways: xr.Dataset, rows: list[tuple[str, str]]) -> Table:
    made = _table("Answers", ("way", "accuracy", "recovered", "copied"))
    for name, label in rows:
        way = ways.sel(way=label)
        made.add_row(escape(name), _cell(way["accuracy"]), _cell(way["recovered"]), _cell(way["copied"], ends=False))
    return made


def _states(ways: xr.Dataset, rows: list[tuple[str, str]]) -> Table:
    made = _table("With the gold answer given", ("way", "log p", "forced", "distance"))
    for name, label in rows:
        way = ways.sel(way=label)
        far = way["distance_ratio"].isel(layer=-1)
        made.add_row(escape(name), _cell(way["log_probability"]), _cell(way["forced"], ends=False), _cell(far))
    return made


def _costs(ways: xr.Dataset) -> Table:
    made = _table("What it takes", ("way", "parameters", "stored", "prompt tokens"))
    vectors = alone(ways) & ~is_part(ways) & (ways["kind"].values == "vector")
    chosen = vectors | np.isin(ways["kind"].values, ("zero-shot", "few-shot"))
    for label in ways["way"].values[chosen].tolist():
        way = ways.sel(way=label)
        parameters, stored, tokens = int(way["n_parameters"]), int(way["n_bytes"]), float(way["prompt_tokens"])
        numbers = (f"{parameters:,}", decimal(stored)) if parameters else ("–", "–")
        made.add_row(escape(label), *numbers, f"{tokens:.0f}" if tokens == round(tokens) else f"{tokens:.1f}")
    return made


def _times(result: xr.Dataset) -> Table:
    """How much longer an answer takes than zero-shot."""
    ratios = time_ratios(result)["ratio"]
    made = _table("Time, zero-shot = 1", ("way", "first token", "each further token"))
    for label in ratios["way"].values.tolist():
        cells = (f"{middle:.2f} [{low:.2f}, {high:.2f}]" for middle, low, high in ratios.sel(way=label).values)
        made.add_row(escape(label), *map(escape, cells))
    return made


def _parts(ways: xr.Dataset) -> Table:
    made = _table("Parts of vectors", ("way", "accuracy", "recovered", "log p"))
    for label in ways["way"].values[is_part(ways)].tolist():
        way = ways.sel(way=label)
        cells = (_cell(way[name]) for name in ("accuracy", "recovered"))
        made.add_row(escape(label), *cells, _cell(way["log_probability"], ends=False))
    return made


def _seeds(each: xr.Dataset) -> Table:
    """Vectors of several seeds, from the least to the most."""
    titles = {"accuracy": "accuracy", "recovered": "recovered", "log_probability": "log p"}
    made = _table("From seed to seed", ("vectors", "seeds", *titles.values()))
    vectors = set(each["group_of"].values[alone(each) & ~is_part(each)].tolist())
    for group in each["group"].values[each["n_ways"].values > 1].tolist():
        if group in vectors:
            of = each.sel(group=group)
            spread = [of["spread"].sel(measure=name, seeds=["least", "most"]).values.tolist() for name in titles]
            cells = ["–" if low != low else f"{low:z.3f} to {high:z.3f}" for low, high in spread]
            made.add_row(escape(group), str(int(of["n_seeds"])), *cells)
    return made


def _table(title: str, columns: tuple[str, ...]) -> Table:
    """As others, but names of ways may take two lines, and numbers may not."""
    made = table(title, columns)
    for place, column in enumerate(made.columns):
        column.no_wrap = place > 0
    return made


def _cell(values: xr.DataArray, *, ends: bool = True) -> str:
    estimate, low, high = values.values.tolist()
    if estimate != estimate:
        return "–"
    return f"{estimate:z.3f}" + (escape(f" [{low:z.2f}, {high:z.2f}]") if ends and low == low else "")


def as_json(each: xr.Dataset) -> dict[str, Any]:
    """Every way and every group, for programs."""
    names = each["end"].values.tolist()

    def ends(values: xr.DataArray) -> dict[str, float | None]:
        return dict(zip(names, map(finite, values.values.tolist()), strict=True))

    ways = []
    for label in each["way"].values.tolist():
        way = each.sel(way=label)
        ways.append(
            {
                "way": label,
                **{name: way[name].item() for name in ABOUT},
                **{name: int(way[name]) for name in COUNTS},
                "prompt_tokens": float(way["prompt_tokens"]),
                **{name: ends(way[name]) for name in MEASURES},
                **{name: ends(way[name].isel(layer=-1)) for name in ("distance", "distance_ratio")},
            }
        )
    groups = [
        {
            "group": str(of["group"].item()),
            "n_ways": int(of["n_ways"]),
            "n_seeds": int(of["n_seeds"]),
            **{
                measure: dict(
                    zip(
                        each["seeds"].values.tolist(),
                        map(finite, of["spread"].sel(measure=measure).values),
                        strict=True,
                    )
                )
                for measure in each["measure"].values.tolist()
            },
        }
        for of in (each.isel(group=place) for place in range(each.sizes["group"]))
    ]
    return {"ways": ways, "groups": groups, "n": int(each["n"]), "n_distances": int(each["n_distances"])}


def figures_of(result: xr.Dataset) -> list[tuple[str, str, go.Figure]]:
    """Heading, caption and figure of all that a comparison has to show."""
    from probe.plots.vector_curves import plot_vector_curves, sizes
    from probe.plots.vector_distance import plot_vector_distance
    from probe.plots.vector_parts import has_parts, plot_vector_parts
    from probe.plots.vectors import plot_vectors

    figures = [
        (
            "Answers",
            "The same queries without demonstrations, with them, and with vectors in their place.",
            plot_vectors(result),
        )
    ]
    if has_parts(result):
        figures.append(
            ("Parts", "The same vectors in some layers, heads or positions only.", plot_vector_parts(result))
        )
    if sizes(result):
        figures.append(("Training", "Accuracy by what the vectors were trained on.", plot_vector_curves(result)))
    if bool(result["distance"].notnull().any()):
        figures.append(
            (
                "Distance",
                "How far states are from those with demonstrations, layer by layer.",
                plot_vector_distance(result),
            )
        )
    if "first" in result:
        from probe.plots.vector_times import plot_vector_times

        figures.append(("Time", "How much longer answers take than without anything.", plot_vector_times(result)))
    return figures
