"""The summary of ``probe attention-map``: the heads that attend most, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from probe.cli.report import Reporter, finite, table
from probe.segments import QUERY

if TYPE_CHECKING:
    import xarray as xr
    from rich.table import Table

    from probe.experiments.ranking import RankedHead

WHAT = {"visual": "demonstrations' images", "textual": "demonstrations' text"}


def show(
    reporter: Reporter,
    result: xr.Dataset,
    ranked: Sequence[RankedHead],
    directory: Path,
    picture: Path,
    *,
    reused: bool,
) -> None:
    """Print the summary."""
    if reporter.quiet:
        reporter.json(summary(result, ranked, directory, picture, reused=reused))
        return
    reporter.facts(result, _facts(result), reused=reused)
    for modality, what in WHAT.items():
        heads = [head for head in ranked if head.modality == modality]
        if heads:
            reporter.out.print(_table(heads, what))
    if ranked:
        reporter.note(
            f"Ranked on one half of the episodes, reported on the other (n = {ranked[0].mass.n}). A lift of 1 is "
            "uniform attention. Attention is not use: knock a head out before you believe in it."
        )
    else:
        reporter.out.print("No demonstrations, so no heads to rank.")
    if "no_overlay" in result.attrs:
        reporter.note(f"Nothing is drawn on the images: {result.attrs['no_overlay']}.")
    reporter.ending(result, picture, directory)


def summary(
    result: xr.Dataset, ranked: Sequence[RankedHead], directory: Path, picture: Path, *, reused: bool
) -> dict[str, Any]:
    """The same as the tables, for programs."""
    from probe.stats import wilson

    accuracy = wilson(int(result["correct"].sum()), result.sizes["episode"])
    return {
        **result.attrs,
        "accuracy": {"estimate": accuracy.estimate, "low": accuracy.low, "high": accuracy.high, "n": accuracy.n},
        "worst_residual": float(result["residual"].max()),
        "heads": [
            {
                "modality": head.modality,
                "rank": head.rank,
                "layer": head.layer,
                "head": head.head,
                "mass": finite(head.mass.estimate),
                "low": finite(head.mass.low),
                "high": finite(head.mass.high),
                "n": head.mass.n,
                "per_token": finite(head.per_token),
                "lift": finite(head.lift),
            }
            for head in ranked
        ],
        "directory": str(directory),
        "picture": str(picture),
        "reused": reused,
    }


def _facts(result: xr.Dataset) -> list[tuple[str, str]]:
    from probe.stats import wilson

    attrs = result.attrs
    accuracy = wilson(int(result["correct"].sum()), result.sizes["episode"])
    resized = int(result["n_resized"].sum())
    scale = f", to {attrs['image_scale']:.2g} of their sides on average" if resized else ""
    facts = [
        ("right answers", f"{accuracy} (95 %, Wilson)"),
        ("unknown words", f"{attrs['unknown_word_share']:.1%}"),
        ("images resized", f"{attrs['images_resized']}{scale}"),
        (
            "check",
            f"head outputs rebuilt from q, k, v to {float(result['residual'].max()):.1e} "
            f"(bound {attrs['residual_bound']:g})",
        ),
    ]
    if "cross_mass" in result:
        facts.append(("cross-attention", _cross_attention(result)))
    return facts


def _cross_attention(result: xr.Dataset) -> str:
    """What the first answer row reads of the images where they are no tokens of the text."""
    row = result["cross_mass"].isel(row=0).mean(("episode", "cross_layer", "head"))
    if not bool(row.notnull().any()):
        return "these episodes have no images to read"
    query = float(row.where((row["role"] == "image") & (row["demonstration"] == QUERY)).sum())
    demonstrations = float(row.where(row["demonstration"] >= 0).sum())
    layers = ", ".join(map(str, result["cross_layer"].values.tolist()))
    gates = result["cross_gate"].values
    return (
        f"layers {layers}: mass {query:.2f} on the query's images, {demonstrations:.2f} on the demonstrations'; gates "
        f"{gates.min():.2g} to {gates.max():.2g}"
    )


def _table(heads: Sequence[RankedHead], what: str) -> Table:
    made = table(f"Heads that attend most to the {what}", ("layer.head", "mass [95 % interval]", "per token", "lift"))
    for head in heads:
        made.add_row(f"{head.layer}.{head.head}", escape(str(head.mass)), f"{head.per_token:.2g}", f"{head.lift:.2f}")
    return made
