"""The README says what the code does: its figures, its commands, its Python."""

import re
from pathlib import Path

import pytest

import hrpose
from hrpose import published
from hrpose.cli import main

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_table_of_networks_holds_the_computed_and_the_printed_figures():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| dpn")
    ]
    computed = published.table()
    assert len(rows) == len(computed)
    for cells, row in zip(rows, computed, strict=True):
        name = " ".join([row["model"], *(f"{k}={v}" for k, v in row["options"].items())])
        assert cells[0] == name
        assert cells[1] == "{}x{}".format(*row["input"])
        assert int(cells[2]) == row["num_keypoints"]
        assert int(cells[3].replace(",", "")) == row["params"]
        assert int(cells[5].replace(",", "")) == row["macs"]
        assert float(cells[6]) == pytest.approx(row["gmacs"], abs=6e-4)
        for cell, printed, ours in ((cells[4], "paper_params_m", "params_m"), (cells[7], "paper_gmacs", "gmacs")):
            assert (cell == "-") == (row[printed] is None)
            if row[printed] is not None:  # the figure the paper prints is ours, rounded
                assert float(cell.removesuffix(" M")) == row[printed] == pytest.approx(row[ours], abs=0.05)


def test_every_command_in_the_readme_has_these_flags(capsys):
    commands = re.findall(r"hrpose (demo|predict|train|evaluate|models|doctor)\b([^`\n&]*)", TEXT)
    assert {name for name, _ in commands} == {"demo", "predict", "train", "evaluate", "models", "doctor"}
    for name in {name for name, _ in commands}:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        for flag in {flag for other, text in commands if other == name for flag in re.findall(r"--[a-z-]+", text)}:
            assert flag in shown, f"hrpose {name} has no {flag}"


def test_every_name_of_the_package_in_the_readme_exists():
    for path in set(re.findall(r"\bhrpose((?:\.[A-Za-z_]+)+)", TEXT)):
        found = hrpose
        for name in path.strip(".").split("."):
            found = getattr(found, name)
