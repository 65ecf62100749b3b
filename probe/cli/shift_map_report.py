"""The summary of ``probe shift-map``: the heads that are shifted most and where the mass lies, or all as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from probe.cli.report import Reporter, finite, table
from probe.measures.shift_summary import summarise_shift

if TYPE_CHECKING:
    import xarray as xr
    from rich.table import Table

WITH_ENDS = ("mu", "difference", "shift", "logit_effect", "agreement", "explained", "effective_rank")
ALONE = ("agreement_chance", "effective_rank_chance", "p", "rank", "n")


def show(
    reporter: Reporter, result: xr.Dataset, row: str, top: int, directory: Path, picture: Path, *, reused: bool
) -> None:
    """Print the summary."""
    summary = summarise_shift(result, row=row)
    if reporter.quiet:
        paths = {"directory": str(directory), "picture": str(picture), "reused": reused}
        reporter.json({**result.attrs, "row": row, **as_json(summary), **paths})
        return
    reporter.facts(result, _facts(result, summary, row), reused=reused)
    reporter.out.print(_heads(summary, top))
    reporter.out.print(_layers(summary))
    reporter.note(
        "Heads (layer.head) as half of the episodes ranks them by the size of their shift; the numbers, with 95 % "
        "intervals over episodes, are those of the other half. Effect: direct, on the logit of the answer minus the "
        "mean logit; * p ≤ 0.05, family-wise over all heads. Agreement: mean cosine of SA_D - SA_Q between episodes; "
        "chance: what random directions exceed once in 20 times. Explained: by the best constant vector of the first "
        "half. Rank: directions that the shifts take up, of random ones of the same lengths. Masses are means over "
        "heads. A constant shift need not be used: check by a knockout (probe knockout)."
    )
    if "image_mass" in result.attrs:
        reporter.note(f"Mass on images is {result.attrs['image_mass']}.")
    reporter.ending(result, picture, directory)


def _facts(result: xr.Dataset, summary: xr.Dataset, row: str) -> list[tuple[str, str]]:
    said = result["answer_logit"].sel(row=row)
    likeness = float(summary["reliability"])
    return [
        ("row", f"{row}; the answer's logit is {float(said.mean()):.3g} above the mean logit"),
        ("halves", f"they agree on the sizes of shifts to {_number(likeness)} (Spearman's correlation over heads)"),
        (
            "check",
            f"head outputs rebuilt from mu, SA_D, SA_Q to {float(result['residual'].max()):.1e}, logits from the "
            f"residual stream to {float(result['logit_residual'].max()):.1e} (bound "
            f"{result.attrs['residual_bound']:g})",
        ),
    ]


def _heads(summary: xr.Dataset, top: int) -> Table:
    """The heads that are shifted most."""
    chance = f"agreement\n(chance {float(summary['agreement_chance'].max()):.2g})"
    made = table("Heads that are shifted most", ("head", "mu", "shift", "effect", chance, "explained", "rank"))
    for place in range(1, top + 1):
        at = np.argwhere(summary["rank"].values == place)
        if not len(at):
            break
        cell = summary.isel(layer=at[0][0], head=at[0][1])
        sure = "*" if float(cell["p"]) <= 0.05 else ""
        made.add_row(
            f"{int(cell['layer'])}.{int(cell['head'])}",
            _cell(cell["mu"]),
            _cell(cell["shift"]),
            _cell(cell["logit_effect"], "+.2f") + sure,
            _cell(cell["agreement"]),
            _cell(cell["explained"]),
            f"{float(cell['effective_rank'].sel(end='estimate')):.1f} of {float(cell['effective_rank_chance']):.1f}",
        )
    return made


def _layers(summary: xr.Dataset) -> Table:
    """The mass by layer and modality."""
    modalities = summary["modality"].values.tolist()
    made = table("Attention mass of the demonstrations, and of the sink", ("layer", *modalities, "(sink)"))
    for layer in summary["layer"].values.tolist():
        own = summary.sel(layer=layer)
        parts = [*(own["mu_by_modality"].sel(modality=modality) for modality in modalities), own["sink_mass"]]
        made.add_row(str(layer), *map(_cell, parts))
    return made


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"


def _cell(ends: xr.DataArray, form: str = ".2f") -> str:
    estimate, low, high = ends.values.tolist()
    if estimate != estimate:
        return "–"
    return f"{estimate:{form}}" + (escape(f" [{low:{form}}, {high:{form}}]") if low == low else "")


def as_json(summary: xr.Dataset) -> dict[str, Any]:
    """All heads, and the mass by layer, for programs."""
    ends = summary["end"].values.tolist()

    def named(values: xr.DataArray) -> dict[str, float | None]:
        return dict(zip(ends, map(finite, values.values.tolist()), strict=True))

    heads = []
    for layer in summary["layer"].values.tolist():
        for head in summary["head"].values.tolist():
            cell = summary.sel(layer=layer, head=head)
            alone = {name: finite(float(cell[name])) for name in ALONE}
            heads.append({"layer": layer, "head": head, **{name: named(cell[name]) for name in WITH_ENDS}, **alone})
    masses = {
        name: {
            str(layer): {
                str(part): named(summary[f"mu_by_{name}"].sel({"layer": layer, name: part}))
                for part in summary[name].values.tolist()
            }
            for layer in summary["layer"].values.tolist()
        }
        for name in ("modality", "demonstration")
    }
    return {
        "n_reported": summary.attrs["n_reported"],
        "reliability": finite(float(summary["reliability"])),
        "heads": heads,
        "mu_by_modality": masses["modality"],
        "mu_by_demonstration": masses["demonstration"],
        "sink_mass": {str(at): named(summary["sink_mass"].sel(layer=at)) for at in summary["layer"].values.tolist()},
    }
