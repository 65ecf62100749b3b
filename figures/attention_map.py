"""Draw the attention map of a saved run: ``python figures/attention_map.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from probe.errors import ProbeError
from probe.plots.attention_map import plot_attention_map
from probe.plots.save import save_figure
from probe.store.atomic import read_zarr


def main(arguments: list[str] | None = None) -> int:
    """Read ``RUN_DIR/result.zarr``, write the figure, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="directory that holds result.zarr")
    parser.add_argument("--row", default="answer", help="which positions look (default: answer)")
    parser.add_argument(
        "--out", type=Path, help=".html, .pdf, .svg or .png (default: attention_map.html in the run directory)"
    )
    options = parser.parse_args(arguments)
    out = options.out or options.run / "attention_map.html"
    try:
        save_figure(plot_attention_map(read_zarr(options.run / "result.zarr"), row=options.row), out)
    except ProbeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
