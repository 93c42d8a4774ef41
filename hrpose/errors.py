"""The one exception for mistakes in what the user gave: a file, a field, an argument, a flag."""


class InputError(ValueError):
    """What was given cannot be used; the message says what, where, and which values are valid.

    The command line prints the message as one sentence and exits with code 2. Mistakes of the library itself are never
    raised as this type, so they keep their traceback.
    """


def check(condition: bool, where: str, message: str) -> None:
    """Raise ``InputError("<where>: <message>")`` unless `condition` holds."""
    if not condition:
        raise InputError(f"{where}: {message}")
