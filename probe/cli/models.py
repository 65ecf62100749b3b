"""``probe models``: the families and names that can be read, what is special about one, and its certification."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from probe.cli.options import Json
from probe.errors import ProbeError

if TYPE_CHECKING:
    from rich.table import Table

JsonOption = Annotated[Json, Parameter(name="--json")]

app = App(name="models", help="Which models can be read, and proof that one is read rightly.")


@app.command(name="list")
def list_(*, json: JsonOption = False) -> None:
    """List the families of models and the short names of their checkpoints.

    Any other checkpoint of these families can be given as a directory or as a repository of the Hugging Face Hub.

    Parameters
    ----------
    json
        Print JSON and nothing else.
    """
    from probe.models.families import FAMILIES
    from probe.models.names import BUNDLED

    entries = [
        {"family": f.name, "model_type": f.model_type, "special": f.special, "aliases": dict(f.aliases)}
        for f in FAMILIES.values()
    ]
    if json:
        _print_json({"bundled": list(BUNDLED), "families": entries})
        return
    table = _table("family", "aliases", "what is special")
    for family in FAMILIES.values():
        table.add_row(family.name, ", ".join(family.aliases), family.special)
    _print(table, f"Bundled, offline: {', '.join(BUNDLED)}. What an alias stands for: probe models info ALIAS.")


@app.command
def info(model: str, /, *, json: JsonOption = False) -> None:
    """Say what a name stands for and how the model is built, without loading its weights.

    Parameters
    ----------
    model
        As for `--model`: a bundled model, an alias, a repository or a directory.
    json
        Print JSON and nothing else.
    """
    from probe.models.info import describe

    facts = describe(model)
    if json:
        _print_json(facts)
        return
    table = _table("", "")
    table.show_header = False
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), str(value))
    _print(table)


@app.command
def check(
    model: str = "toy",
    /,
    *,
    dtype: str | None = None,
    device: str | None = None,
    prompt: str | None = None,
    json: JsonOption = False,
) -> None:
    """Prove on a loaded model that what probe records is what the model computes.

    Every check compares two ways that share as little as possible: recorded mass with the attention matrix as seen
    through another door, an edit with a plain torch hook, a padded batch with its episodes alone. The command fails if
    a check does. Run it once for a checkpoint, dtype and device before you trust their numbers:

        probe models check qwen-vl --dtype bfloat16 --device cuda:0

    Parameters
    ----------
    model
        As for `--model`: a bundled model, an alias, a repository or a directory.
    dtype
        float32, bfloat16 or float16; the default is float32 on a CPU, else the checkpoint's.
    device
        Such as cpu or cuda:0; the default is the first GPU, else the CPU.
    prompt
        A prompt format or a file with a chat template, as for `probe attention-map`.
    json
        Print JSON and nothing else.
    """
    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("loading the model"):
        from transformers.utils.logging import disable_progress_bar

        from probe.experiments.certification import CHECKS, certify
        from probe.models.load import load

        disable_progress_bar()
        loaded = load(model, dtype=dtype, device=device, prompt=prompt)
    with reporter.progress("checking", len(CHECKS)) as progress:
        checks = certify(loaded, progress=progress)
    number = str(loaded.dtype).removeprefix("torch.")
    facts: dict[str, Any] = {
        "model": loaded.name,
        "family": loaded.family.name,
        "origin": loaded.origin,
        "fingerprint": loaded.fingerprint,
        "dtype": number,
        "device": str(loaded.device),
        "attn_implementation": loaded.attention_implementation,
        "prompt": loaded.prompt,
    }
    if json:
        _print_json({**facts, "checks": [{"name": c.name, "found": c.found, "passed": c.passed} for c in checks]})
    else:
        table = _table("check", "found", "passed")
        for item in checks:
            table.add_row(item.name, item.found, "yes" if item.passed else "[bold red]NO[/]")
        heading = f"{loaded.origin or loaded.name}: {loaded.family.name}, {number} on {loaded.device}, "
        _print(table, f"{heading}{loaded.attention_implementation} attention, prompt: {loaded.prompt}")
    failed = [item.name for item in checks if not item.passed]
    if failed:
        raise ProbeError(
            f"{len(failed)} of {len(checks)} checks failed ({'; '.join(failed)}): do not trust numbers of this model "
            f"in {number} on {loaded.device}. Please report the model and `probe --version`."
        )


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, style="bold" if number == 0 else None, overflow="fold")
    return table


def _print(table: Table, *lines: str) -> None:
    from rich.console import Console

    console = Console()
    console.print(table)
    for line in lines:
        console.print(line, style="dim", markup=False, highlight=False)


def _print_json(what: object) -> None:
    from rich.console import Console

    Console(soft_wrap=True).print_json(json_module.dumps(what))
