"""What annotated shapes and types are checked with while the tests run."""

from beartype import BeartypeConf, beartype

# Beartype comes before nnsight, here and in any program that wants both: nnsight adds a method to `object`, after which
# beartype can no longer be imported.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float, as it does for mypy
