"""The Python in the documentation runs, top to bottom of a page, and prints what the page says that it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

import probe

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("choosing.md", "data.md", "scoring.md")
BLOCK = re.compile(r"^(% needs files\n)?```(python|text)\n(.*?)^```$", re.M | re.S)


def blocks(page: str) -> list[tuple[str, str | None]]:
    """Each block of Python with the output that stands below it, those left out that read files of the user's own."""
    found: list[list[str | None]] = []
    for needs, language, content in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        if language == "python":
            found.append([None if needs else content, None])
        elif found:
            found[-1][1] = content
    return [(code, output) for code, output in found if code is not None]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page, "probe": probe, "Path": Path}  # imported where files are needed
    for code, output in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"docs/{page}", "exec"), names)
        if output is not None:
            assert printed.getvalue().strip() == output.strip()
