"""Write the tables of ``docs/families.md``: all families, and the checks that random tiny models of them pass.

python -m tests.model_matrix
"""

from __future__ import annotations

from pathlib import Path

from probe.experiments.certification import certify
from probe.models.families import FAMILIES
from probe.models.load import load
from probe.models.model import Model
from tests.tiny_families import build

DOCS = Path(__file__).parent.parent / "docs"
WRITTEN = "<!-- Written by python -m tests.model_matrix -->\n\n"


def tiny_model(model_type: str) -> Model:
    """A random model of a family."""
    made = build(model_type)
    made.processor.chat_template = made.chat_template
    return load(made.module, processor=made.processor)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return WRITTEN + "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def families() -> str:
    """Names, aliases and what is special."""
    rows = [
        [f.name, f"`{f.model_type}`", ", ".join(f"`{alias}` ({repo})" for alias, repo in f.aliases.items()), f.special]
        for f in FAMILIES.values()
    ]
    return table(["family", "`model_type`", "aliases", "what is special"], rows)


def matrix() -> str:
    """Checks by family."""
    rows, names = [], []
    for kind, family in FAMILIES.items():
        model = tiny_model(kind)
        checks = certify(model)
        names = [check.name for check in checks]
        axes = {site.axis for site in model.sites}
        rows.append([family.name, " and ".join(sorted(axes)), *("yes" if c.passed else "**no**" for c in checks)])
    return table(["family", "key axes", *names], rows)


PAGES = {DOCS / "families_table.md": families, DOCS / "model_matrix.md": matrix}

if __name__ == "__main__":
    for path, write in PAGES.items():
        path.write_text(write(), encoding="utf-8")
