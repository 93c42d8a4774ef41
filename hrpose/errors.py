"""The one exception for mistakes in what the user gave: a file, a field, an argument, a flag."""

import reprlib
from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """What was given cannot be used; the message says what, where, and which values are valid.

    The command line prints the message as one sentence and exits with code 2. Mistakes of the library itself are never
    raised as this type, so they keep their traceback.
    """


def check(condition: bool, where: str, message: str) -> None:
    """Raise ``InputError("<where>: <message>")`` unless `condition` holds."""
    if not condition:
        raise InputError(f"{where}: {message}")


def check_count(value: Any, where: str, name: str) -> None:
    """Raise unless `value` is an integer >= 1."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    check(valid, where, f"{name} must be an integer >= 1, got {value!r}")


def check_choice(value: Any, choices: Sequence[Any], where: str, name: str) -> None:
    """Raise, listing the choices, unless `value` is one of them."""
    check(value in choices, where, f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def shown(value: Any) -> str:
    """A value from a file as a message quotes it: its repr, cut short, however large or deeply nested it is."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = 80
