"""The tables of a model's card, in Markdown, from an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from scipy.stats import binomtest

from probe.data.scenes import ATTRIBUTES
from probe.data.tasks import TEXT_SUFFIX
from probe.stats import wilson
from probe.toy.bars import Bar, Shares
from probe.toy.recipe import Mixture


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def share(counts: Sequence[int]) -> str:
    """[right, n] with its interval."""
    return str(wilson(*counts))


def guided_heads(recipe: dict[str, Any]) -> dict[str, str]:
    """What each seeded head was made or told to do, by ``layer.head``."""
    told = {f"{layer}.{head}": f"looks {distance} back" for layer, head, distance in recipe["look_back"]}
    guidance = recipe["guidance"] or {}
    told |= {f"{layer}.{head}": "same class" for layer, head in guidance.get("classes", ())}
    told |= {f"{layer}.{head}": "same label" for layer, head in guidance.get("labels", ())}
    return told


def mixture_of(recipe: dict[str, Any]) -> dict[str, float]:
    """The shares of what training showed; one that a recipe is too old to name is 0."""
    return {**dict.fromkeys(asdict(Mixture()), 0.0), **recipe["mixture"]}


def recipe_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The choices in which two recipes differ, those within a mixture by their own names."""
    flat = [{**{k: v for k, v in r.items() if k != "mixture"}, **mixture_of(r)} for r in (ours, theirs)]
    names = dict.fromkeys([*flat[0], *flat[1]])
    return [name for name in names if flat[0].get(name) != flat[1].get(name)]


def accuracy_table(result: dict[str, Any]) -> str:
    """Accuracy by task and shots, with the baselines of the binding tasks."""
    shares = Shares(result)
    rows = []
    for task in shares.tasks:
        rows.append([f"`{task}`", *(str(shares[task, s]) for s in shares.shots)])
        if task.startswith("binding") and not task.endswith(TEXT_SUFFIX):
            for name, label in (("majority", "commonest label"), ("last", "last label")):
                given = [shares.cells[task, s] for s in shares.shots]
                rows.append([f"… {label}", *(f"{c[name] / c['n']:.3f}" if name in c else "–" for c in given)])
    return table(["task", *(f"{s} shot{'s' if s != 1 else ''}" for s in shares.shots)], rows)


def novel_table(result: dict[str, Any]) -> str:
    """Accuracy at eight shots on seen and on held-out pairs of colour and kind."""
    seen = Shares(result)
    rows = [
        [f"`{c['task']}`", str(seen[c["task"], c["shots"]]), share((c["right"], c["n"]))] for c in result["novel_pairs"]
    ]
    return table(["task", "seen pair", "held-out pair"], rows)


def attribute_table(result: dict[str, Any]) -> str:
    """Accuracy at eight shots by the attribute that is asked, on seen and on held-out pairs."""
    rows = []
    for part, name in (("accuracy", ""), ("novel_pairs", ", held-out pair")):
        for cell in result[part]:
            if cell["shots"] == 8 and "by_attribute" in cell and not cell["task"].endswith(TEXT_SUFFIX):
                shares = [share(cell["by_attribute"][attribute]) for attribute in ATTRIBUTES]
                rows.append([f"`{cell['task']}`{name}", *shares])
    return table(["task", *ATTRIBUTES], rows)


def copying_table(result: dict[str, Any]) -> str:
    """What three near-duplicates of the query with the same wrong answer do."""
    rows = []
    for cell in result["copying"]:
        for name in ("clean", "provoked"):
            part = cell[name]
            rows.append(
                [
                    f"`{cell['task']}`, {name}",
                    share((part["right"], cell["n"])),
                    f"{part['planted']} of {part['errors']}" if name == "provoked" else "–",
                    f"{part['copied']} of {part['errors']}",
                    f"{part['copied_by_chance']} of {part['errors']}",
                ]
            )
    header = ["episodes", "accuracy", "errors: planted answer", "errors: any demonstration's", "… of another episode"]
    return table(header, rows)


def heads_table(result: dict[str, Any]) -> str:
    """What removing each head does to each task, in points of accuracy."""
    told = guided_heads(result["recipe"])
    measured = {cell["task"]: cell for cell in result["heads"]}
    number = sum(len(cell["effects"]) for cell in measured.values())
    rows = []
    for head in next(iter(measured.values()))["effects"]:
        row = [head.replace("+", " and "), told.get(head, "together" if "+" in head else "")]
        for cell in measured.values():
            lost, gained = cell["effects"][head]["lost"], cell["effects"][head]["gained"]
            points = f"{100 * (gained - lost) / cell['n']:+.1f}"
            row.append(f"**{points}**" if _sign_test(lost, gained) < 0.05 / number else points)
        rows.append(row)
    header = ["head", "seeded", *(f"`{task}`" for task in measured)]
    whole = ["none", "", *(f"{cell['right'] / cell['n']:.3f}" for cell in measured.values())]
    return table(header, [whole, *rows])


def bars_table(judged: Sequence[Sequence[Bar]], columns: Sequence[str]) -> str:
    """Every demand, and what each model reaches."""
    rows = [
        [row[0].name, row[0].demand, *(f"{bar.figure}{'' if bar.met else ' **missed**'}" for bar in row)]
        for row in zip(*judged, strict=True)
    ]
    return table(["measured", "bar", *columns], rows)


def least_change(result: dict[str, Any]) -> float:
    """In points, the smallest loss in one cell of the table of heads that the sign test would notice there alone."""
    return 100 * next(lost for lost in range(1, 100) if _sign_test(lost, 0) < 0.05) / float(result["heads"][0]["n"])


def _sign_test(lost: int, gained: int) -> float:
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
