"""What ``probe vector train``, ``fit`` and ``apply`` print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from probe.cli.report import Reporter, finite, table
from probe.cli.vector_options import VECTORS

if TYPE_CHECKING:
    import xarray as xr


def show_training(
    reporter: Reporter, result: xr.Dataset, directory: Path, picture: Path | None, *, reused: bool
) -> None:
    """Print what was found, and where it is."""
    rows = [_found(result.sel(vector=name)) for name in result["vector"].values.tolist()]
    if reporter.quiet:
        paths = {"directory": str(directory), "vectors": str(directory / VECTORS), "reused": reused}
        reporter.json({**result.attrs, "found": rows, **paths})
        return
    attrs = result.attrs
    shots = ", ".join(str(k) for k in sorted(set(result["shots"].values.tolist())))
    reporter.out.print(
        escape(
            f"{attrs['model']} ({attrs['model_family']}, {attrs['dtype']}), {attrs['n_done']} episodes of "
            f"{attrs['data'] if 'data' in attrs else attrs['task']}, {shots} shots, seed {attrs['seed']}"
        )
        + ("\nthis run was finished before and is shown again" if reused else ""),
        highlight=False,
    )
    made = table("Vectors", ("vector", "parameters", "validation loss", "best epoch"))
    for row in rows:
        loss, epochs = row["validation"], row["epochs"]
        made.add_row(
            escape(str(row["vector"])),
            f"{row['parameters']:,}",
            "–" if loss is None else f"{loss:.4f}",
            f"{row['best_epoch']} of {epochs}" if epochs else "–",
        )
    reporter.out.print(made)
    if str(attrs["teacher"])[0] != "0":
        reporter.note(f"Teacher: {attrs['teacher']}.")
    reporter.note(
        "Validation loss: the method's own objective, on episodes that were not learned from; losses of different "
        f"methods are of different things. Compare them by: probe vector compare {directory}"
    )
    if picture is not None:
        reporter.ending(result, picture, directory)
    reporter.out.print(f"Vectors: {directory / VECTORS}", soft_wrap=True, highlight=False, markup=False)


def _found(row: xr.Dataset) -> dict[str, object]:
    validation = row["validation"].dropna("epoch")
    return {
        "vector": str(row["vector"].item()),
        "method": str(row["method"].item()),
        "shots": int(row["shots"]),
        "training_episodes": int(row["training_episodes"]),
        "training_seed": int(row["training_seed"]),
        "parameters": int(row["n_parameters"]),
        "validation": finite(float(validation.min())) if validation.size else None,
        "best_epoch": int(row["best_epoch"]),
        "epochs": int(row["loss"].notnull().sum()),
    }


def show_application(reporter: Reporter, result: xr.Dataset, directory: Path, *, reused: bool) -> None:
    """Print how queries were answered with a vector in the model, and without."""
    from probe.stats import paired_difference, wilson

    n = result.sizes["episode"]
    shares = {name: wilson(int(result[name].sum()), n) for name in ("correct", "correct_without")}
    change = paired_difference(result["correct"].values.astype(float), result["correct_without"].values.astype(float))
    gain = float((result["log_probability"] - result["log_probability_without"]).mean())
    if reporter.quiet:
        numbers = {name: interval.ends for name, interval in shares.items()}
        reporter.json(
            {
                **result.attrs,
                **numbers,
                "change": change.ends,
                "log_probability_change": gain,
                "directory": str(directory),
                "reused": reused,
            }
        )
        return
    reporter.facts(result, [("vector", str(result.attrs["vector"]))], reused=reused)
    made = table("Answers", ("query", "gold", "with the vector", "without"))
    names = ("query", "gold", "prediction", "prediction_without")
    for row in zip(*(result[name].values[:10].tolist() for name in names), strict=True):
        made.add_row(*(escape(str(cell)) for cell in row))
    reporter.out.print(made)
    if n > 10:
        reporter.note(f"The first 10 of {n}; all are in the arrays.")
    reporter.out.print(f"Accuracy with the vector: {shares['correct']}", markup=False, highlight=False)
    reporter.out.print(f"Accuracy without:         {shares['correct_without']}", markup=False, highlight=False)
    reporter.out.print(f"Difference:               {change}", markup=False, highlight=False)
    reporter.note("95 % intervals over queries: Wilson's, and Newcombe's for the paired difference.")
    if "caveat" in result.attrs:
        reporter.out.print(result.attrs["caveat"], style="italic yellow", markup=False)
    reporter.out.print(f"Arrays:  {directory / 'result.zarr'}", soft_wrap=True, highlight=False, markup=False)
