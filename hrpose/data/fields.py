"""Reading JSON, and checks of single values in it: what all annotation files share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hrpose.errors import InputError

_LARGEST_ID = 2**53  # pycocotools keeps ids in float64
_LARGEST_NUMBER = 1e12  # of pixels: squares and products of coordinates stay finite


def read_json(path: str | Path, where: str) -> Any:
    """The content of a JSON file. Raises: InputError, starting with `where`, if it is missing or no such file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except FileNotFoundError:
        raise InputError(f"{where}: no such file") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{where}: is not a JSON text file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not valid JSON ({error})") from None


def is_number(value: Any) -> bool:
    """A finite number; of exactly these types, because true and false count as integers in Python."""
    return type(value) in (int, float) and -_LARGEST_NUMBER < value < _LARGEST_NUMBER


def is_id(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST_ID


def kind(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true/false"}
    return names.get(type(value), "a number")
