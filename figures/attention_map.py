"""Draw the attention map of a saved run: ``python figures/attention_map.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.attention_map import plot_attention_map
from probe.plots.script import draw_run


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    row = {"default": "answer", "help": "which positions look (default: answer)"}
    return draw_run(plot_attention_map, __doc__, arguments, row=row)


if __name__ == "__main__":
    sys.exit(main())
