"""Imports run downwards: each room of ``probe`` may use the rooms below it and no others.

The rule is read off the source of every file, so an import inside a function counts, and so does one under
``TYPE_CHECKING`` or one by name (``import_module("probe.trace")``).
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROBE = Path(__file__).parent.parent / "probe"

LEAVES = {"errors", "measures", "scoring", "segments", "stats", "store"}

# What a room may import besides itself. A leaf serves every room and knows only other leaves.
ALLOWED: dict[str, set[str]] = {leaf: LEAVES for leaf in LEAVES}
ALLOWED["errors"] = set()
ALLOWED["data"] = LEAVES
ALLOWED["models"] = ALLOWED["data"] | {"data"}
ALLOWED["trace"] = ALLOWED["models"] | {"models"}
ALLOWED["vectors"] = ALLOWED["fusion"] = ALLOWED["reasoning"] = ALLOWED["trace"] | {"trace"}
ALLOWED["experiments"] = ALLOWED["vectors"] | {"vectors", "fusion", "reasoning"}
ALLOWED["plots"] = {"errors", "measures", "segments", "stats", "store"}
ALLOWED["runs"] = LEAVES
ALLOWED["toy"] = {"data", "errors", "stats", "store"}
ALLOWED["cli"] = ALLOWED["experiments"] | {"experiments", "plots", "runs", "probe"}
ALLOWED["__main__"] = {"cli"}
# `probe/__init__.py` offers what the rooms make: everything but the toy's training and the command line.
ALLOWED["probe"] = ALLOWED["cli"] - {"probe"}

# Who else may be imported, and where.
OUTSIDERS = {"nnsight": {"trace"}, "torchvision": set()}

MODULES = sorted(path for path in PROBE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PROBE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """``probe.trace.read`` lies in ``trace``; ``probe`` itself is a room of one file."""
    return module.split(".")[1] if "." in module else module


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of all that ``source``, a module of ``package``, imports, wherever it does so.

    ``from a import b`` gives ``a.b``: whether b is a module or a value, the room is the same, unless a is ``probe``.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(name, package) if node.level else name
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def offences(source: str, module: str, package: str) -> list[str]:
    """Sentences on the imports that ``module`` should not have."""
    found = []
    room = room_of(module)
    for line, name in imports(source, package):
        top, _, rest = name.partition(".")
        if top == "probe":
            target = rest.split(".")[0]
            if target not in ALLOWED:  # `from probe import load`, or `import probe`
                target = "probe"
            if target != room and target not in ALLOWED[room]:
                found.append(f"line {line}: {room} may not import {target} ({name})")
        elif top in OUTSIDERS and room not in OUTSIDERS[top]:
            found.append(f"line {line}: {room} may not import {top}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_downwards(path: Path) -> None:
    module = module_name(path)
    assert room_of(module) in ALLOWED, f"{module}: a new room; say in ALLOWED what it may import"
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    assert not offences(path.read_text(encoding="utf-8"), module, package)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("probe.data.example", "from probe.models import load"),
        ("probe.data.example", "import probe.models.load"),
        ("probe.data.example", "from ..models import load"),
        ("probe.data.example", "from probe import models"),
        ("probe.data.example", "from probe import load"),
        ("probe.data.example", "import probe"),
        ("probe.data.example", "def f():\n    from probe.trace import read"),
        ("probe.data.example", "if TYPE_CHECKING:\n    from probe.trace import read"),
        ("probe.data.example", "importlib.import_module('probe.trace')"),
        ("probe.models.load", "import probe.toy.vocabulary"),
        ("probe.models.load", "from nnsight import NNsight"),
        ("probe.trace.read", "import torchvision.transforms as T"),
        ("probe.measures.mass", "from probe.data import Example"),
        ("probe.plots.maps", "from probe.experiments.attention_map import attention_map"),
        ("probe.experiments.heads", "from probe.plots import plot_heads"),
        ("probe.vectors.mimic", "from probe.fusion import fuse"),
        ("probe.toy.train", "from probe.models import load"),
    ],
)
def test_an_upward_import_is_caught(module: str, source: str) -> None:
    assert offences(source, module, module.rpartition(".")[0])


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("probe.data.tasks", "from probe.errors import UsageError\nfrom .example import Example"),
        ("probe.trace.read", "import nnsight\nfrom probe.models.model import Model"),
        ("probe.cli.main", "from probe import load\nfrom probe.plots import plot_attention_map"),
        ("probe.measures.mass", "import torch\nfrom probe.segments import Segments"),
        ("probe.data.tasks", "from probes import other"),
    ],
)
def test_a_downward_import_passes(module: str, source: str) -> None:
    assert not offences(source, module, module.rpartition(".")[0])


def test_the_command_line_starts_without_heavy_imports() -> None:
    if importlib.util.find_spec("probe.cli") is None:
        pytest.skip("there is no command line yet")
    heavy = {"nnsight", "plotly", "scipy", "sklearn", "torch", "transformer_lens", "transformers", "xarray", "zarr"}
    script = f"import sys, probe, probe.cli; print(*sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
