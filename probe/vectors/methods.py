"""The methods by name: what commands choose from, and what a stored card is read with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from probe.errors import UsageError, did_you_mean
from probe.vectors.live import Live
from probe.vectors.m2iv import M2iv
from probe.vectors.mean import MeanDifference
from probe.vectors.method import Method
from probe.vectors.mimic import Mimic

METHODS: dict[str, type[Method]] = {each.name: each for each in (Live, Mimic, M2iv, MeanDifference)}


def method_of(name: str, options: Mapping[str, object] | None = None) -> Method:
    """A method by its name and options.

    Raises
    ------
    UsageError
        If there is no such method or option.
    """
    if name not in METHODS:
        raise UsageError(f"There is no method {name!r}; {did_you_mean(name, tuple(METHODS))}")
    known = [field.name for field in fields(METHODS[name])]
    for option in options or {}:
        if option not in known:
            raise UsageError(f"{name} has no option {option!r}; {did_you_mean(option, tuple(known))}")
    return METHODS[name](**(options or {}))
