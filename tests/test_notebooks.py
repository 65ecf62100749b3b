"""The notebooks in ``analyses/`` run from top to bottom, and each is the same as the script that it is paired with."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ANALYSES = Path(__file__).parent.parent / "analyses"

# A script with `# %%` cells is one half of a notebook; any other (bench_*.py) is only a script.
SCRIPTS = sorted(
    path
    for path in ANALYSES.glob("*.py")
    if any(line.startswith("# %%") for line in path.read_text(encoding="utf-8").splitlines())
)
NOTEBOOKS = sorted(ANALYSES.glob("*.ipynb"))


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What a reader sees and runs, without outputs and metadata."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def read_notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def test_scripts_and_notebooks_come_in_pairs() -> None:
    assert [path.stem for path in SCRIPTS] == [path.stem for path in NOTEBOOKS], "`make notebooks` writes the pairs"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_says_what_its_script_says(script: Path) -> None:
    notebook = read_notebook(script.with_suffix(".ipynb"))
    assert cells(notebook) == cells(jupytext.read(script)), "`make notebooks` brings the pair together again"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    # In an empty directory: a notebook depends on nothing that happens to lie beside it, and leaves nothing there.
    directory = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(read_notebook(path), timeout=600, kernel_name="python3", resources=directory).execute()
