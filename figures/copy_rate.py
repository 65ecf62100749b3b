"""Draw the copying of a saved run: ``python figures/copy_rate.py RUN_DIR [--shots 4] [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.copy_rate import plot_copy_rate
from probe.plots.script import draw_run


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    shots = {"type": int, "help": "draw what was read with so many demonstrations (default: all if they fit)"}
    return draw_run(plot_copy_rate, __doc__, arguments, shots=shots)


if __name__ == "__main__":
    sys.exit(main())
