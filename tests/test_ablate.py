"""`hrpose ablate`: which networks a table names, and a comparison that is run, run again and read by hand."""

import json
import statistics

import pytest

from hrpose.checkpoint import load_checkpoint
from hrpose.cli import main
from hrpose.cli.ablate import Variant, markdown, results_of, variants_of
from hrpose.errors import InputError
from hrpose.synth import SceneOptions, write_dataset


def test_variants_are_those_the_papers_print():
    by_label = {variant.label: variant.printed for variant in variants_of(["III"], ["dpn1_32*"])}
    assert by_label == {
        "dpn1_32": 50.6,
        "dpn1_32 dilation=1": 40.1,
        "dpn1_32 dilation=2": 49.3,
        "dpn1_32 dilation=4": 48.7,
        "dpn1_32 dilation=6": 43.9,
        "dpn1_32 dilation=8": 38.5,
    }
    assert (
        len(variants_of(["II"], [])) == 8 and len(variants_of(["III"], [])) == 12 and len(variants_of(["V"], [])) == 8
    )
    both = variants_of(["III", "V"], ["dpn1_32*", "dpn4_32 dilation=reversed"])  # dpn1_32 is in both, and comes once
    assert len(both) == 8
    assert [v.label for v in both][-2:] == ["dpn1_32 dilation=reversed", "dpn4_32 dilation=reversed"]
    exact = ["dpn1_32", "dpn4_32 dilation=4"]
    assert [v.label for v in variants_of(["III"], exact)] == exact
    parts = {variant.label: variant.printed for variant in variants_of(["ram_gpr"], [])}
    assert parts == {
        "hrnet_w32": 74.4,
        "ram_gpr_w32": 76.0,
        "ram_gpr_w32 attention=false": 75.7,
        "ram_gpr_w32 refinement=false": 75.2,
    }
    with pytest.raises(InputError, match=r"--only: must be among the variants .*\(dpn1_64, .*got \['x'\]"):
        variants_of(["II"], ["x"])
    with pytest.raises(InputError, match="TABLE: must be one of II, III, V, ram_gpr, got 'IX'"):
        variants_of(["IX"], [])


def test_figures_are_means_of_last_epochs(tmp_path):
    variant = Variant("dpn1_32", (("dilation", 4),), 48.7)
    for seed, scores in enumerate(([0.9, 0.10], [0.2, 0.13], [0.3])):
        folder = tmp_path / "dpn1_32-dilation-4" / f"seed{seed}"
        folder.mkdir(parents=True)
        entries = [{"kind": "epoch", "epoch": i, "AP": None, "PCK@0.2": score} for i, score in enumerate(scores)]
        lines = [json.dumps(entry) + "\n" for entry in [{"kind": "step", "epoch": 0, "step": 50}, *entries]]
        (folder / "log.jsonl").write_text("".join(lines) + '{"kind": "epo')  # killed while it wrote
    (row,) = results_of([variant], 4, tmp_path)
    assert row["epochs"] == [2, 2, 1, 0]
    assert row["PCK@0.2"]["runs"] == pytest.approx([10.0, 13.0, 30.0, None])
    assert row["PCK@0.2"]["mean"] == pytest.approx((10 + 13 + 30) / 3)
    assert row["PCK@0.2"]["sd"] == pytest.approx(statistics.stdev([10, 13, 30]))
    assert row["AP"]["mean"] is None
    *head, line = markdown([row]).splitlines()
    assert head == ["| variant | runs | epochs | PCK@0.2 | paper: AP on COCO val2017 |", "|---|---|---|---|---|"]
    assert line == "| dpn1_32 dilation=4 | 3 | 1 to 2 | 17.7 ± 10.8 | 48.7 |"
    row |= {"AP": {"runs": [1.0], "mean": 1.0, "sd": None}, "PCKh@0.5": {"runs": [80.0], "mean": 80.0, "sd": None}}
    assert markdown([row]).splitlines()[-1] == "| dpn1_32 dilation=4 | 3 | 1 to 2 | 1.0 | 17.7 ± 10.8 | 80.0 | 48.7 |"


def test_a_comparison_from_drawing_to_table(tmp_path, capsys):
    scenes = SceneOptions(width=96, height=96, max_people=1, difficulty=0.0)
    path = write_dataset(tmp_path, "people", 8, 0, scenes)
    out = tmp_path / "out"
    data = ["--data", str(path), "--images", str(tmp_path / "people"), "--val", str(path), "--out", str(out)]
    small = ["--width", "64", "--height", "64", "--epochs", "1", "--set", "batch_size=4", "--set", "precision=fp32"]
    command = ["ablate", "III", "--only", "dpn1_32 dilation=1", "--only", "dpn1_32 dilation=4", "--seeds", "2"]
    command += [*data, *small, "--workers", "0", "--device", "cpu", "--no-flip-test"]
    assert main(command) == 0
    said = capsys.readouterr().out
    rows = json.loads((out / "table.json").read_text())
    assert [row["variant"] for row in rows] == ["dpn1_32 dilation=1", "dpn1_32 dilation=4"]
    runs = {}
    for row, dilation in zip(rows, (1, 4), strict=True):
        for seed in (0, 1):
            last = load_checkpoint(out / f"dpn1_32-dilation-{dilation}" / f"seed{seed}" / "last.pt")
            assert last.config["options"]["dilation"] == dilation and last.training["recipe"]["seed"] == seed
            runs[dilation, seed] = last.weights["heatmap.weight"]
        assert row["epochs"] == [1, 1] and row["PCK@0.2"]["mean"] is not None
    assert not runs[1, 0].equal(runs[1, 1]) and not runs[1, 0].equal(runs[4, 0])
    assert said.endswith((out / "table.md").read_text())

    table = (out / "table.md").read_bytes()
    assert main(command) == 0  # all there: nothing is trained again
    said = capsys.readouterr().out
    assert said.count("is complete") == 4 and (out / "table.md").read_bytes() == table


def test_mistakes_are_named(tmp_path, capsys):
    files = ["--data", "a.json", "--images", "a", "--out", str(tmp_path)]
    for flags, message in (
        ([], "--val: must be given"),
        (["--val", "b.json", "--seeds", "0"], "--seeds: must be > 0, got 0"),
        (["--val", "b.json", "--model", "dpn4_32"], "--model: is that of each variant"),
    ):
        assert main(["ablate", "V", *files, *flags]) == 2
        assert message in capsys.readouterr().err
