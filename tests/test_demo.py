"""`hrpose demo`, made small: all of its steps, what it leaves behind, and that it goes on where it was."""

import importlib
import json

import pytest
from PIL import Image

import hrpose
from hrpose.cli import main
from hrpose.data import load_annotations
from hrpose.eval.coco import coco_metrics
from hrpose.synth import SceneOptions


@pytest.fixture
def small(monkeypatch):
    demo = importlib.import_module("hrpose.cli.demo_train")
    monkeypatch.setattr(demo, "TRAIN_SCENES", 20)
    monkeypatch.setattr(demo, "VAL_SCENES", 5)
    monkeypatch.setattr(demo, "SCENES", SceneOptions(width=128, height=128, max_people=1, difficulty=0.0))


def test_demo_leaves_a_picture_a_report_and_a_network(small, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--train", "--out", str(out), "--epochs", "1"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    annotations = load_annotations(out / "data" / "val.json")
    by_hand = coco_metrics(annotations, json.loads((out / "results.json").read_text()))
    assert {name: metrics[name] for name in by_hand} == by_hand
    assert metrics["persons"] == len(annotations.persons) >= 5
    picture = Image.open(out / "poses.jpg")
    assert picture.height > 384  # rows of pictures 384 px high
    report = (out / "report.md").read_text()
    assert "| 1 | 0.0" in report and "20 scenes to train on" in report
    poses = hrpose.Predictor(out / "run" / "best.pt")(out / "data" / "val" / annotations.persons[0].file_name)
    assert poses.keypoints.shape == (1, 17, 2)

    capsys.readouterr()
    assert main(["demo", "--train", "--out", str(out), "--epochs", "1"]) == 0
    assert "complete" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text()) == metrics

    assert main(["demo", "--train", "--out", str(out), "--epochs", "2"]) == 2  # another run than the one that is there
    assert "epochs = 1" in capsys.readouterr().err


def test_demo_names_a_wrong_number(capsys):
    assert main(["demo", "--train", "--epochs", "0"]) == 2
    assert "--epochs: must be > 0, got 0" in capsys.readouterr().err
    assert main(["demo", "--epochs", "2"]) == 2
    assert "--epochs: goes with --train" in capsys.readouterr().err


def test_demo_shows_the_network_of_the_package(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.import_module("hrpose.cli.demo"), "COUNT", 16)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--device", "cpu"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    annotations = load_annotations(out / "data" / "people.json")
    assert annotations.skeleton == hrpose.LSP14
    by_hand = coco_metrics(annotations, json.loads((out / "results.json").read_text()))
    assert {name: metrics[name] for name in by_hand} == by_hand
    assert metrics["PCK@0.2"] > 0.5  # a third of it for a network that has learned only where joints are on average
    assert Image.open(out / "poses.jpg").height > 384
    report = (out / "report.md").read_text()
    assert f"PCK@0.2 {100 * metrics['PCK@0.2']:.1f}" in report and "dpn4_32_lsp.md" in report

    capsys.readouterr()
    data = ["--data", str(out / "data" / "people.json"), "--images", str(out / "data" / "people")]
    assert main(["evaluate", *data, "--device", "cpu", "--json"]) == 0  # as the report says
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["PCK@0.2"] == metrics["PCK@0.2"]
