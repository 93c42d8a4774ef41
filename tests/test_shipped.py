"""The network that comes with the package: there, small, what its card says, and taken where none is named."""

import re

import numpy as np
import pytest
import torch

import hrpose
from hrpose.checkpoint import compact, load_checkpoint, save_checkpoint
from hrpose.cli import main
from hrpose.data import load_annotations
from hrpose.infer.evaluate import evaluate
from hrpose.synth import SceneOptions, render_scene, write_dataset

PATH = hrpose.shipped_checkpoint()
CARD = PATH.with_suffix(".md")


def test_it_is_there_and_small():
    checkpoint = load_checkpoint(PATH)
    assert checkpoint.config["name"] == "dpn4_32" and checkpoint.skeleton == hrpose.LSP14
    assert PATH.stat().st_size + CARD.stat().st_size < 4e6
    dtypes = {tensor.dtype for tensor in checkpoint.weights.values() if tensor.ndim > 1}
    assert dtypes == {torch.float16}
    assert {p.dtype for p in checkpoint.build().parameters()} == {torch.float32}


def test_the_card_states_what_the_file_holds():
    checkpoint, card = load_checkpoint(PATH), CARD.read_text(encoding="utf-8")
    width, height = checkpoint.size
    assert f"{width}x{height}" in card
    scores = checkpoint.training["scores"]
    for name in ("PCK@0.2", "AP"):
        assert re.search(rf"\| {re.escape(name)}[^|]*\| {100 * scores[name]:.1f} \|", card), name


def test_weights_in_half_precision_change_little(tmp_path):
    torch.manual_seed(0)
    model = hrpose.create_model("dpn1_32", 14).eval()
    checkpoint = hrpose.checkpoint.Checkpoint(model.hrpose_config, model.state_dict(), hrpose.LSP14, (96, 128), {})
    save_checkpoint(compact(checkpoint, {"note": "small"}), tmp_path / "half.pt")
    save_checkpoint(checkpoint, tmp_path / "whole.pt")
    half = load_checkpoint(tmp_path / "half.pt")
    assert half.training == {"note": "small"}
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (tmp_path / "whole.pt").stat().st_size
    images = torch.randn(2, 3, 128, 96)
    with torch.inference_mode():
        want, got = model(images), half.build()(images)
    assert 0 < (got - want).norm() / want.norm() < 2e-3  # float16 keeps 11 bits
    for name, tensor in half.weights.items():
        if tensor.ndim <= 1:
            assert torch.equal(tensor, checkpoint.weights[name])

    checkpoint.weights["heatmap.weight"][0, 0] = 1e5
    with pytest.raises(hrpose.InputError, match=r"within float16's .*heatmap.weight"):
        compact(checkpoint, {})


def test_it_is_taken_where_none_is_named(tmp_path, capsys):
    scenes = SceneOptions(width=160, height=160, max_people=1, difficulty=0.0, size_range=(0.7, 0.95))
    image, (person,) = render_scene(3, 0, scenes, hrpose.LSP14)
    found = hrpose.Predictor(device="cpu")(image, [person["bbox"]])
    named = hrpose.Predictor(PATH, device="cpu")(image, [person["bbox"]])
    assert np.array_equal(found.keypoints, named.keypoints) and found.keypoints.shape == (1, 14, 2)

    path = write_dataset(tmp_path, "people", 2, 3, scenes)  # COCO's joints, which it does not know
    assert main(["evaluate", "--data", str(path), "--images", str(tmp_path / "people"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "dpn4_32_lsp.pt of the package (no --checkpoint): was trained for the joints of LSP-14" in said
    assert main(["predict", str(tmp_path / "people"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2


@pytest.mark.slow
def test_its_scores_are_those_of_the_card(data_root):
    """On the 1000 photographs that it was not trained on."""
    checkpoint, folder = load_checkpoint(PATH), data_root / "lspet"
    found = evaluate(checkpoint.build(), load_annotations(folder / "val.json"), folder / "val", checkpoint.size).metrics
    for name in ("PCK@0.2", "AP"):
        assert found[name] == pytest.approx(checkpoint.training["scores"][name], abs=1e-3)
