"""The command line: a file for each command, and one place that turns errors into sentences."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


COMMANDS = {
    "attention-map": (
        "probe.cli.attention_map:attention_map",
        "Measure how much attention each head pays to the demonstrations' images and text.",
    ),
    "copy-rate": (
        "probe.cli.copy_rate:copy_rate",
        "Measure how often the model answers what a demonstration answers.",
    ),
    "task-split": (
        "probe.cli.task_split:task_split",
        "Tell what demonstrations teach from what they only remind of.",
    ),
    "heads": (
        "probe.cli.heads:heads",
        "Score every head, kind by kind, and ablate those that stand out.",
    ),
    "knockout": (
        "probe.cli.knockout:knockout",
        "Take attention or heads away, and see whether it matters.",
    ),
    "linear-probe": (
        "probe.cli.linear_probe:linear_probe",
        "Tell what can be read linearly from the residual stream.",
    ),
    "saliency": (
        "probe.cli.saliency:saliency",
        "Measure which flows of attention the right answer depends on.",
    ),
    "shift-map": (
        "probe.cli.shift_map:shift_map",
        "Measure how the demonstrations shift each head, and how constant that shift is.",
    ),
    "vector": (
        "probe.cli.vector:app",
        "Vectors in place of demonstrations: fit, train, put into a model, compare.",
    ),
    "models": ("probe.cli.models:app", "Which models can be read, and proof that one is read rightly."),
}
"""For each command, where it is (imported when it is called) and the line that `probe --help` shows."""


def main() -> None:
    """Run ``probe`` and exit: 0 done, 1 failed, 2 misused."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    # Threads that wait should sleep: spinning, they starve each other when anything else runs on the machine. Read
    # once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from cyclopts import App, CycloptsError
    from rich.console import Console

    from probe.errors import ProbeError

    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    app = App(
        name="probe",
        help=(
            "What do the demonstrations do to a vision-language model?\n\n"
            "Works offline on the bundled model: try `probe attention-map`."
        ),
        version_flags=["--version"],
        help_format="markdown",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        error_console=errors,
    )
    for name, (place, what) in COMMANDS.items():
        # A help given here would replace the command's own, longer one; so only where it is listed.
        app.command(place, name=name, help=None if name in arguments else what)
    debug = bool(os.environ.get("PROBE_DEBUG"))
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _complain(errors, error, 2)
    except ProbeError as error:
        if debug:
            raise
        return _complain(errors, error, error.exit_code)
    except KeyboardInterrupt:
        errors.print("probe: stopped; issue the same command again and it goes on where it stopped.")
        return 130
    return 0


def _complain(errors: Console, error: Exception, code: int) -> int:
    """Print an error as a sentence; a user's text in it is never read as markup."""
    errors.print("probe: ", style="bold red", end="")
    errors.print(str(error), markup=False)
    return code
