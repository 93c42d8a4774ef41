"""The README says what the code does: its figures, its commands, its Python."""

import re
from pathlib import Path

import pytest

import hrpose
from hrpose import published
from hrpose.cli import main

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_table_of_networks_is_the_computed_one():
    """`hrpose models --markdown` prints it; tests/test_published.py checks its figures."""
    assert published.markdown_table(published.table()) in TEXT


def test_every_network_is_named():
    named = set()
    for pattern in re.findall(r"`((?:dpn|hrnet|ram|simple|hour|cpn|resnet)[\w{},]*)`", TEXT):
        head, *rest = re.split(r"{([^}]*)}", pattern)
        names = [head]
        for choices, tail in zip(rest[::2], rest[1::2], strict=True):
            names = [name + choice + tail for name in names for choice in choices.split(",")]
        named.update(names)
    assert set(hrpose.list_models()) <= named


def test_every_command_in_the_readme_has_these_flags(capsys):
    commands = re.findall(r"hrpose (demo|predict|train|recipe|evaluate|models|bench|doctor)\b([^`\n&]*)", TEXT)
    assert {name for name, _ in commands} == {
        "demo",
        "predict",
        "train",
        "recipe",
        "evaluate",
        "models",
        "bench",
        "doctor",
    }
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
