"""The one exception for mistakes in what the user gave: a file, a field, an argument, a flag."""

import reprlib
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


def shown(value: Any) -> str:
    """A value from a file as a message quotes it: its repr, cut short, however large or deeply nested it is."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = 80
