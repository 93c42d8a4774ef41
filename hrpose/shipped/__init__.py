"""The network that comes with the package: its checkpoint and, beside it, the card that says what it is."""

from pathlib import Path

NAME = "dpn4_32_lsp"


def shipped_checkpoint() -> Path:
    """The checkpoint that ``Predictor()``, `hrpose predict`, `hrpose evaluate` and `hrpose demo` take when none is
    named: DPN4_32, 14 joints (``LSP14``), input 192x256. Its data, training, scores and limits are in the .md file of
    the same name."""
    return Path(__file__).with_name(f"{NAME}.pt")
