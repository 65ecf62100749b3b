"""The one base class of the errors that are the user's to mend."""

from __future__ import annotations


class ProbeError(Exception):
    """Something that a user can put right.

    The message is one or two sentences: what is wrong, where (file, line, episode, layer), and what to change. The
    command line prints it without a traceback and exits with :attr:`exit_code`.
    """

    exit_code = 1


class UsageError(ProbeError):
    """The request itself makes no sense.

    An unknown name, an option out of range, a combination that excludes itself.
    """

    exit_code = 2


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """A sentence that names the nearest known names, or all of them.

    >>> did_you_mean("recogniton", ("vqa", "recognition"))
    'did you mean recognition?'
    >>> did_you_mean("zzz", ("vqa", "recognition"))
    'known are: vqa, recognition.'
    """
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}."
