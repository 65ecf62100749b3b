"""The summary of ``probe task-split``: accuracies by setting and shots, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from probe.cli.report import Reporter, finite, table
from probe.measures.reliance import Reliance, reliance
from probe.measures.split_summary import summarise_split

if TYPE_CHECKING:
    import xarray as xr
    from rich.table import Table

    from probe.stats import Interval

TITLES = {"images": "with images", "words": "text-only twin"}


def show(reporter: Reporter, result: xr.Dataset, directory: Path, picture: Path, *, reused: bool) -> None:
    """Print the summary."""
    summaries = {str(name): summarise_split(result.sel(shown=name)) for name in result["shown"].values}
    rests = reliance(result.rename(reliance_score="score")) if "reliance_score" in result else None
    if reporter.quiet:
        paths = {"directory": str(directory), "picture": str(picture), "reused": reused}
        shown = {name: _as_json(summary) for name, summary in summaries.items()}
        reporter.json({**result.attrs, "shown": shown, "reliance": rests and _reliance_json(rests), **paths})
        return
    reporter.facts(result, reused=reused)
    for name, summary in summaries.items():
        reporter.out.print(_accuracies(summary, TITLES[name]))
        reporter.out.print(_beyond(summary, TITLES[name]))
    reporter.note(
        "Shares with 95 % intervals (Wilson) over episodes of all seeds; range: the seeds by themselves. TR and TL are "
        "(accuracy - guess) / (1 - guess) with random labels and with symbols, where guess is the best of chance and "
        "the commonest label of the pool or of the context."
    )
    if "no_words" in result.attrs:
        reporter.note(f"Symbols stated in words were not read. {result.attrs['no_words']}")
    if rests is None:
        reporter.note(f"Modality reliance was not measured: {result.attrs['no_reliance']}.")
    else:
        reporter.out.print(
            f"Modality reliance: {escape(str(rests.index))} of what answers rest on is the question (losses: another "
            f"question {escape(str(rests.linguistic))}, blurred image {escape(str(rests.visual))}; n = "
            f"{rests.index.n})."
        )
    reporter.ending(result, picture, directory)


def _accuracies(summary: xr.Dataset, title: str) -> Table:
    """One row for each setting."""
    shots = summary["shot"].values.tolist()
    made = table(f"Accuracy by shots, {title}", ("labels", *map(str, shots)))
    for setting in summary["setting"].values.tolist():
        made.add_row(setting, *(_cell(summary["accuracy"].sel(setting=setting, shot=shot)) for shot in shots))
        if summary.sizes["seed"] > 1:
            made.add_row("  range", *(_range(summary["by_seed"].sel(setting=setting, shot=shot)) for shot in shots))
    for setting in ("random", "abstract"):
        guesses = summary["guess"].sel(setting=setting).values.tolist()
        made.add_row(f"guess ({setting})", *("–" if g != g else f"{g:.3f}" for g in guesses))
    return made


def _beyond(summary: xr.Dataset, title: str) -> Table:
    """What is left beyond guessing, and whether answers are labels or copies."""
    shots = summary["shot"].values.tolist()
    made = table(f"Recognition, learning, copying, {title}", ("", *map(str, shots)))
    rows = [
        ("TR (random labels)", "corrected", "random"),
        ("TL (symbols)", "corrected", "abstract"),
        ("free answers right (gold)", "generated", "gold"),
        ("free answers right (random)", "generated", "random"),
        ("TR ratio (random labels)", "in_labels", "random"),
        ("TR ratio (symbols)", "in_labels", "abstract"),
        ("wrong answers copied (symbols)", "wrong_copied", "abstract"),
    ]
    for name, variable, setting in rows:
        made.add_row(name, *(_cell(summary[variable].sel(setting=setting, shot=shot), 2) for shot in shots))
    return made


def _cell(ends: xr.DataArray, digits: int = 3) -> str:
    estimate, low, high = ends.values.tolist()
    return "–" if estimate != estimate else escape(f"{estimate:.{digits}f} [{low:.2f}, {high:.2f}]")


def _range(by_seed: xr.DataArray) -> str:
    values = by_seed.values[~np.isnan(by_seed.values)]
    return f"{values.min():.2f} to {values.max():.2f}" if len(values) else "–"


def _as_json(summary: xr.Dataset) -> dict[str, Any]:
    """By variable, setting and shots."""
    names: Sequence[str] = ("accuracy", "generated", "in_labels", "in_context", "wrong_copied", "corrected")
    ends = summary["end"].values.tolist()

    def cell(setting: str, shot: int) -> dict[str, Any]:
        part = summary.sel(setting=setting, shot=shot)
        found: dict[str, Any] = {
            name: dict(zip(ends, map(finite, part[name].values.tolist()), strict=True)) for name in names
        }
        return found | {"guess": finite(float(part["guess"])), "n": int(part["n"]), "n_wrong": int(part["n_wrong"])}

    settings, shots = summary["setting"].values.tolist(), summary["shot"].values.tolist()
    return {setting: {str(shot): cell(setting, shot) for shot in shots} for setting in settings}


def _reliance_json(rests: Reliance) -> dict[str, Any]:
    def ends(interval: Interval) -> dict[str, Any]:
        return {"estimate": finite(interval.estimate), "low": finite(interval.low), "high": finite(interval.high)}

    return {"visual": ends(rests.visual), "linguistic": ends(rests.linguistic), "index": ends(rests.index)}
