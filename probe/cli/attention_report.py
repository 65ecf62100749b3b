"""The summary of ``probe attention-map``: the heads that attend most, as tables or as JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from probe.cli.knockout_report import as_json as effects_as_json
from probe.cli.report import Reporter, finite, table
from probe.experiments.without import head_knockout
from probe.measures.effects import WITHOUT, effects, unnest
from probe.segments import QUERY
from probe.stats import ENDS

if TYPE_CHECKING:
    import xarray as xr
    from rich.table import Table

    from probe.experiments.ranking import RankedHead

HEADS = re.compile(r"\d+\.\d+$")
"""Ends the label of a knockout in a single head."""

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
    lost = _lost_by_head(result, ranked)
    for modality, what in WHAT.items():
        heads = [head for head in ranked if head.modality == modality]
        if heads:
            reporter.out.print(_table(heads, what, lost))
    without = unnest(result, WITHOUT)
    if without is not None:
        reporter.out.print(_without(effects(without)))
    if ranked:
        reporter.note(
            f"Ranked on one half of the episodes, reported on the other (n = {ranked[0].mass.n}). A lift of 1 is "
            "uniform attention. "
            + (
                "Without: the change of log p of the answer, in nats, when this head alone cannot see them from the "
                "row that answers, on the reporting half. Other heads may stand in for it."
                if lost
                else "Attention is not use: knock a head out before you believe in it (--knockout)."
            )
        )
    else:
        reporter.out.print("No demonstrations, so no heads to rank.")
    if "left_out" in result.attrs:
        reporter.note(f"Left out: {result.attrs['left_out']}.")
    if "no_overlay" in result.attrs:
        reporter.note(f"Nothing is drawn on the images: {result.attrs['no_overlay']}.")
    reporter.ending(result, picture, directory)


def summary(
    result: xr.Dataset, ranked: Sequence[RankedHead], directory: Path, picture: Path, *, reused: bool
) -> dict[str, Any]:
    """The same as the tables, for programs."""
    from probe.stats import wilson

    lost, without = _lost_by_head(result, ranked), unnest(result, WITHOUT)

    accuracy = wilson(int(result["correct"].sum()), result.sizes["episode"])
    return {
        **result.attrs,
        "accuracy": {"estimate": accuracy.estimate, "low": accuracy.low, "high": accuracy.high, "n": accuracy.n},
        "worst_residual": float(result["residual"].max()),
        "sinks": found_sinks(result),
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
                **({"without": dict(zip(ENDS, map(finite, lost[head]), strict=True))} if head in lost else {}),
            }
            for head in ranked
        ],
        **({} if without is None else {"without": effects_as_json(_of_groups(effects(without)))}),
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
    facts.append(("sinks", _sinks(result)))
    if "cross_mass" in result:
        facts.append(("cross-attention", _cross_attention(result)))
    return facts


def found_sinks(result: xr.Dataset) -> dict[str, Any]:
    """Where attention sinks are, how many of each modality, and what the first answer row pays to them.

    Parameters
    ----------
    result
        From :func:`probe.attention_map`, with or without its sinks.

    Returns
    -------
    dict
        ``layers`` that have any; ``largest_at_first``, the largest size of a dimension at a first position. Over these
        layers (none: ``None``): ``positions`` of each modality in an episode (mean), ``sink`` being the first; the
        ``share`` of all attention that lies on sinks, and, of the images' own sinks, their ``image_share`` of the
        attention on images and their ``image_token_share`` of the image tokens.
    """
    layers = [int(layer) for layer in result["layer"].values[(result["n_sinks"] > 0).any(("episode", "segment"))]]
    there = result.sel(layer=layers)
    images = there["modality"] == "visual"
    on_sinks = there["sink_mass"].isel(row=0)
    paid = there["mass"].isel(row=0) + (on_sinks if "left_out" in result.attrs else 0)
    n_sinks, n_tokens = there["n_sinks"].where(there["n_tokens"] > 0), there["n_tokens"].where(images)

    def ratio(part: xr.DataArray, whole: xr.DataArray) -> float | None:
        return finite(float(part.sum() / whole.sum())) if float(whole.sum()) else None

    by_modality = n_sinks.groupby("modality").sum("segment").mean(("episode", "layer"))
    positions = {str(m): float(n) for m, n in zip(by_modality["modality"].values, by_modality.values, strict=True)}
    return {
        "layers": layers,
        "positions": positions if layers else None,
        "share": ratio(on_sinks, paid),
        "image_share": ratio(on_sinks.where(images), paid.where(images)),
        "image_token_share": ratio(n_sinks.where(images), n_tokens.broadcast_like(n_sinks)),
        "largest_at_first": finite(float(result["sink_size"].max())),
    }


def _sinks(result: xr.Dataset) -> str:
    """The same in a sentence."""
    found, threshold = found_sinks(result), result.attrs["sink_threshold"]
    if not found["layers"]:
        largest = found["largest_at_first"] or 0.0
        if largest > threshold:
            return f"none found: what is massive at the first position ({largest:.3g}) is so at most positions"
        return f"none found: no dimension of the first position is massive ({largest:.2g}; sinks: over {threshold:g})"
    n, images = found["positions"], ""
    if found["image_share"] is not None:
        images = (
            f"; the images' own are {found['image_token_share']:.1%} of the image tokens, with "
            f"{found['image_share']:.0%} of the attention on images"
        )
    return (
        f"layers {', '.join(map(str, found['layers']))}: {n['sink']:.1f} first, {n['visual']:.1f} image, "
        f"{n['textual']:.1f} text and {n['structural']:.1f} other positions of an episode, with {found['share']:.0%} "
        f"of the attention{images}"
    )


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


def _table(heads: Sequence[RankedHead], what: str, lost: Mapping[RankedHead, Sequence[float]]) -> Table:
    columns = ("layer.head", "mass [95 % interval]", "per token", "lift", *(("without",) if lost else ()))
    made = table(f"Heads that attend most to the {what}", columns)
    for head in heads:
        numbers = (f"{head.per_token:.2g}", f"{head.lift:.2f}")
        row = [f"{head.layer}.{head.head}", escape(str(head.mass)), *(x.replace("nan", "–") for x in numbers)]
        if lost:
            row.append(_change(lost[head]) if head in lost else "–")
        made.add_row(*row)
    return made


def _lost_by_head(result: xr.Dataset, ranked: Sequence[RankedHead]) -> dict[RankedHead, list[float]]:
    """What it costs to hide from each ranked head what it attends to, on the half that did not rank it.

    Estimate, low and high of the change of log p; empty where nothing was knocked out.
    """
    found = unnest(result, WITHOUT)
    reporting = result["episode"].values[result["half"].values == "report"]
    if found is None or not len(reporting):
        return {}
    summary = effects(found.sel(episode=reporting))["effect"].sel(measure="log_probability")
    labels = {head: head_knockout(head).label for head in ranked}
    known = summary["intervention"].values.tolist()
    return {head: summary.sel(intervention=label).values.tolist() for head, label in labels.items() if label in known}


def _without(summary: xr.Dataset) -> Table:
    """What it costs to hide each group of tokens in all layers that were recorded."""
    made = table(
        "Without, from the row that answers", ("hidden", "tokens", "log p", "beyond random tokens", "accuracy")
    )
    groups = _of_groups(summary)
    for label in groups["intervention"].values.tolist():
        own = groups.sel(intervention=label)
        log_p, correct = (own.sel(measure=measure) for measure in ("log_probability", "correct"))
        made.add_row(
            escape(label.replace(" → answer", "")),
            f"{float(own['n_hidden']):.3g}",
            _change(log_p["effect"].values.tolist()),
            _change(log_p["beyond"].sel(control="keys").values.tolist()),
            _change(correct["effect"].values.tolist()),
        )
    return made


def _of_groups(summary: xr.Dataset) -> xr.Dataset:
    """Without what is hidden from single heads, whose effects stand beside their mass."""
    labels = [label for label in summary["intervention"].values.tolist() if not HEADS.search(label)]
    return summary.sel(intervention=labels)


def _change(ends: Sequence[float]) -> str:
    estimate, low, high = ends
    if estimate != estimate:
        return "–"
    return f"{estimate:+.3f}" + (escape(f" [{low:+.3f}, {high:+.3f}]") if low == low else "")
