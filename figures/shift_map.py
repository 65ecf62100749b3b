"""Draw the shift of each head in a saved run: ``python figures/shift_map.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.script import draw_run
from probe.plots.shift_map import plot_shift_map


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    row = {"default": "answer", "help": "row to show: answer or answer_rest (default: %(default)s)"}
    return draw_run(plot_shift_map, __doc__, arguments, row=row)


if __name__ == "__main__":
    sys.exit(main())
