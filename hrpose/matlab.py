"""MATLAB's .mat files, which MPII is published in; by scipy, an optional extra."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from hrpose.errors import InputError
from hrpose.files import write_atomically


def read_mat(path: str | Path, where: str, structs: bool = False) -> dict[str, Any]:
    """The variables of a .mat file (MATLAB up to 7.2) by name.

    Args:
        where:   names the file in errors.
        structs: structs become objects with an attribute per field, else records.
    Returns: numpy arrays as MATLAB has them, of two dimensions at least; those of structs and cells hold objects.
    Raises: InputError if the file is missing, is no such file, or scipy is not installed.
    """
    matlab = _scipy_io(where)
    try:
        found = matlab.loadmat(io.BytesIO(Path(path).read_bytes()), struct_as_record=not structs)
    except FileNotFoundError:
        raise InputError(f"{where}: no such file") from None
    except NotImplementedError:
        raise InputError(f"{where}: is a MATLAB 7.3 file; save it again in MATLAB with save(..., '-v7')") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # scipy raises whatever its parser meets: TypeError, KeyError, zlib.error, ...
        raise InputError(f"{where}: is not a MATLAB .mat file, or damaged ({error})") from None
    return {name: value for name, value in found.items() if not name.startswith("__")}


def write_mat(path: str | Path, variables: dict[str, Any]) -> None:
    """Write variables as a MATLAB 5 file, whole or not at all. Raises: InputError naming the path."""
    buffer = io.BytesIO()
    _scipy_io(f"{path}").savemat(buffer, variables, do_compression=True)
    write_atomically(path, buffer.getvalue())


def check_scipy(where: str) -> None:
    """Raise an InputError, starting with `where`, if scipy is not installed: before work that it is to write."""
    _scipy_io(where)


def _scipy_io(where: str) -> Any:
    try:
        import scipy.io
    except ImportError:
        raise InputError(f"{where}: .mat files need scipy: pip install 'hrpose[mpii]'") from None
    return scipy.io
