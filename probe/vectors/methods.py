"""The methods by name: what commands choose from, and what a stored card is read with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields

from probe.errors import UsageError, did_you_mean
from probe.vectors.fitted import FittedShift
from probe.vectors.function_vector import FunctionVector
from probe.vectors.hificl import Hificl
from probe.vectors.i2cl import I2cl
from probe.vectors.icv import Icv
from probe.vectors.live import Live
from probe.vectors.lora import Lora
from probe.vectors.m2iv import M2iv
from probe.vectors.mean import MeanDifference
from probe.vectors.method import Method
from probe.vectors.mimic import Mimic
from probe.vectors.mtv import Mtv
from probe.vectors.task_vector import TaskVector

METHODS: dict[str, type[Method]] = {
    each.name: each
    for each in (
        *(Live, Mimic, M2iv, Hificl, I2cl, Lora),
        *(FittedShift, MeanDifference, TaskVector, FunctionVector, Icv, Mtv),
    )
}


def method_of(name: str, options: Mapping[str, object] | None = None) -> Method:
    """A method by its name and options.

    Raises
    ------
    UsageError
        If there is no such method or option, or an option's value is of another kind than its default.
    """
    if name not in METHODS:
        raise UsageError(f"There is no method {name!r}; {did_you_mean(name, tuple(METHODS))}")
    usual = {field.name: field.default for field in fields(METHODS[name])}
    for option, value in (options or {}).items():
        if option not in usual:
            raise UsageError(f"{name} has no option {option!r}; {did_you_mean(option, tuple(usual))}")
        if not _is_like(value, usual[option]):
            raise UsageError(f"The option {option} of {name} cannot be {value!r}; the default is {usual[option]!r}.")
    given = dict(options or {})
    for option, value in given.items():
        if isinstance(usual[option], float) and isinstance(value, int):
            given[option] = float(value)  # 1 and 1.0 are one option, and a tensor filled with it has to be of floats
    return METHODS[name](**given)


def _is_like(value: object, usual: object) -> bool:
    """Whether both are numbers (finite), whole numbers, truth values or texts."""
    if isinstance(usual, float) and not isinstance(value, bool):
        return isinstance(value, (int, float)) and math.isfinite(value)
    return usual is None or type(value) is type(usual)
