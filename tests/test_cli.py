"""The command line: every command on tiny data, every mistake as one sentence that leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import hrpose
from hrpose.checkpoint import digest, load_checkpoint
from hrpose.cli import main
from hrpose.cli.arguments import default_workers, model_options_from, read_toml
from hrpose.cli.predict import image_files, picture_paths
from hrpose.errors import InputError

JOINTS = ["tip", "base", "wing a", "wing b", "tail"]  # a newcomer's own: no sides in the names, no sigmas
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
NETWORK = ["--model", "dpn1_32", "--width", "32", "--height", "32"]


def write_data(folder: Path, name: str, count: int, first: int = 0, **category) -> Path:
    """Pictures of 48 x 48 with five coloured dots, and their COCO file."""
    rng = np.random.default_rng(first)
    (folder / name).mkdir()
    images, annotations = [], []
    for i in range(first + 1, first + count + 1):
        picture = Image.new("RGB", (48, 48), (90, 90, 90))
        keypoints = []
        for color in COLORS:
            x, y = rng.uniform(8, 40, 2).round(1).tolist()
            ImageDraw.Draw(picture).ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
            keypoints += [x, y, 2]
        picture.save(folder / name / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 48, "height": 48})
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1, "bbox": [2, 3, 40, 41], "keypoints": keypoints, "area": 1600}
        )
    category = {"id": 1, "name": "marker", "keypoints": JOINTS} | category
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [category]}))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train (10 persons), val (4), and val with sigmas and flip pairs as measured.json; a trained run."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, "train", 10)
    measured = json.loads(write_data(folder, "val", 4, first=50).read_text())
    measured["categories"][0] |= {"sigmas": [0.1] * 5, "flip_pairs": [["wing a", "wing b"]]}
    (folder / "measured.json").write_text(json.dumps(measured))
    assert (
        main(train_command(folder, folder / "run", "--val", f"{folder}/val.json", "--val-images", f"{folder}/val")) == 0
    )
    return folder


def train_command(data: Path, out: Path, *more: str) -> list[str]:
    """Two epochs of two batches."""
    given = ["--data", f"{data}/train.json", "--images", f"{data}/train", "--out", str(out), *NETWORK]
    return ["train", *given, "--epochs", "2", "--set", "batch_size=5", "--device", "cpu", *more]


@pytest.fixture
def command(data, tmp_path):
    """Complete commands by name, for tests to add a mistake to."""
    checkpoint = ["--checkpoint", f"{data}/run/best.pt", "--device", "cpu"]
    return {
        "train": train_command(data, tmp_path / "out"),
        "evaluate": ["evaluate", "--data", f"{data}/val.json", "--images", f"{data}/val", *checkpoint],
        "predict": ["predict", *checkpoint, "--out", f"{tmp_path}/out", f"{data}/val/51.png"],
    }


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_newcomers_own_joints_from_training_to_pictures(data, tmp_path, capsys):
    out = tmp_path / "run"
    val = ["--val", f"{data}/val.json", "--val-images", f"{data}/val"]
    assert main(train_command(data, out, *val)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("no left/right pairs in the joint names") and said[0].endswith("mirroring is off")
    assert said[1].startswith("10 persons, marker-5, ")
    assert [line.split(",")[0] for line in said[2:4]] == ["epoch 1/2", "epoch 2/2"]
    assert all("PCK@0.2" in line and "AP" not in line for line in said[2:4])
    assert said[4].startswith("best: epoch ") and said[4].endswith(f"in {out}/best.pt")
    assert {path.name for path in out.iterdir()} == {"run.json", "log.jsonl", "last.pt", "best.pt"}
    run = json.loads((out / "run.json").read_text())
    assert run["model"]["num_keypoints"] == 5 and run["recipe"]["epochs"] == 2 and run["size"] == [32, 32]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["AP"] for entry in log] == [None, None]
    best = load_checkpoint(out / "best.pt")
    assert best.skeleton.joints == tuple(JOINTS) and best.size == (32, 32)
    assert best.training["entry"]["PCK@0.2"] == max(entry["PCK@0.2"] for entry in log)

    evaluate = ["evaluate", "--data", f"{data}/val.json", "--images", f"{data}/val", "--checkpoint", f"{out}/best.pt"]
    assert main(evaluate) == 0
    said = capsys.readouterr().out
    assert "PCK@0.2" in said and "no AP: it needs a sigma per joint" in said and "flip test: no" in said

    predict = ["predict", f"{data}/val", "--boxes", f"{data}/val.json", "--checkpoint", f"{out}/best.pt"]
    assert main([*predict, "--out", f"{tmp_path}/pictures"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("4 persons in 4 images: ") and "of 20 joints are drawn" in said
    assert files_below(tmp_path / "pictures") == ["51.jpg", "52.jpg", "53.jpg", "54.jpg", "keypoints.json"]
    found = json.loads((tmp_path / "pictures" / "keypoints.json").read_text())
    assert found["joints"] == JOINTS and found["flip"] is False and found["decoder"] == "quarter"
    predictor = hrpose.Predictor(out / "best.pt", device="cpu")
    for entry in found["images"]:
        [person] = entry["persons"]
        poses = predictor(entry["image"], [person["box"]])
        expected = np.concatenate([poses.keypoints[0], poses.scores[0, :, None]], 1)
        np.testing.assert_allclose(person["keypoints"], expected, atol=1e-4)
        with Image.open(tmp_path / "pictures" / entry["picture"]) as picture:
            assert picture.size == (entry["width"], entry["height"]) == (48, 48)


def test_training_from_a_cache_changes_nothing_but_speed(data, tmp_path, capsys):
    for name, more in (("plain", []), ("cached", ["--cache", f"{tmp_path}/cache"])):
        assert main(train_command(data, tmp_path / name, *more)) == 0
    said = capsys.readouterr().out
    assert f"cache: decoding 10 persons into {tmp_path}/cache\ncache: 10 of 10 persons, 0.00 GB, made in" in said
    plain, cached = (load_checkpoint(tmp_path / name / "last.pt") for name in ("plain", "cached"))
    assert digest([plain.weights, plain.training]) == digest([cached.weights, cached.training])


def test_training_on_two_data_sets(data, tmp_path, capsys):
    other = write_data(tmp_path, "other", 5, keypoints=["tail", "beak", "tip", "eye", "foot"])
    more = ["--data", str(other), "--images", f"{tmp_path}/other"]
    assert main(train_command(data, tmp_path / "run", *more)) == 0
    said = capsys.readouterr().out.splitlines()[1]
    parts = f"10 of {data}/train.json (5 of 5 joints), 5 of {other} (2 of 5 joints)"
    assert said.startswith(f"15 persons: {parts}, marker-5, ")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"] == [f"{data}/train.json", str(other)]

    stranger = write_data(tmp_path, "stranger", 1, keypoints=["1", "2", "3", "4", "5"])
    more = ["--data", str(stranger), "--images", f"{tmp_path}/stranger"]
    assert main(train_command(data, tmp_path / "none", *more)) == 2
    rule = f"must have a joint of {data}/train.json (tip, base, wing a, wing b, tail), has 1, 2, 3, 4, 5"
    assert f"annotations {stranger}: {rule}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_train_without_validation_and_from_weights(data, tmp_path, capsys, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert main(train_command(data, tmp_path / "run", "--weights", f"{data}/run/last.pt", "--threads", "3")) == 0
    assert f"the network is in {tmp_path}/run/last.pt; with --val" in capsys.readouterr().out
    assert not (tmp_path / "run" / "best.pt").exists()
    assert threads == [3]
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    scratch = json.loads((data / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] < scratch["loss"]


def test_train_resumes_to_the_same_end(data, tmp_path, capsys, monkeypatch):
    loop = sys.modules["hrpose.train.fit"]
    step, count = loop.train_step, 0

    def stopped(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    out = tmp_path / "run"
    val = ["--val", f"{data}/val.json", "--val-images", f"{data}/val"]
    monkeypatch.setattr(loop, "train_step", stopped)
    assert main(train_command(data, out, *val)) == 143
    said = capsys.readouterr().err.splitlines()
    assert (
        said[-1] == "hrpose: stopped in epoch 2 after 1 of 2 batches; the same command with --resume goes on from here"
    )
    assert main(train_command(data, out, *val, "--resume")) == 0
    for name in ("last.pt", "best.pt"):
        ended, expected = load_checkpoint(out / name), load_checkpoint(data / "run" / name)
        assert digest([ended.weights, ended.training]) == digest([expected.weights, expected.training])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert main(train_command(data, out, *val, "--resume")) == 0
    assert f"the run in {out} is complete: all 2 epochs are done" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_evaluate_json_is_the_last_line(data, tmp_path, capsys):
    arguments = ["--data", f"{data}/measured.json", "--images", f"{data}/val", "--checkpoint", f"{data}/run/last.pt"]
    assert main(["evaluate", *arguments, "--json", "--output", f"{tmp_path}/results/val.json"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= metrics["AP"] <= 1 and 0 <= metrics["AR"] <= 1 and 0 <= metrics["PCK@0.2"] <= 1
    assert metrics["boxes"] == "ground-truth" and metrics["decoder"] == "quarter"
    assert metrics["flip"] is True and metrics["shift"] is True and metrics["input"] == [32, 32]
    results = json.loads((tmp_path / "results" / "val.json").read_text())
    assert len(results) == 4 and all(len(entry["keypoints"]) == 15 for entry in results)

    assert main(["evaluate", *arguments, "--json", "--no-shift", "--refine", "none", "--crop", "opencv4"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (metrics["flip"], metrics["shift"]) == (True, False)
    assert (metrics["decoder"], metrics["crop"]) == ("none", "opencv4")
    assert main(["evaluate", *arguments, "--no-flip"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("AP ") and "flip test: no" in said and "no AP" not in said


def test_evaluate_detections_and_random_weights(data, tmp_path, capsys):
    boxes = [{"image_id": i, "category_id": 1, "bbox": [2, 3, 40, 41], "score": 0.5} for i in (51, 52, 99)]
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(boxes))
    arguments = [
        "evaluate",
        "--data",
        f"{data}/measured.json",
        "--images",
        f"{data}/val",
        "--boxes",
        str(path),
        "--json",
    ]
    for min_score, persons in (("0.5", 2), ("0.6", 0)):
        assert main([*arguments, *NETWORK, "--min-box-score", min_score]) == 0
        said = capsys.readouterr()
        metrics = json.loads(said.out.splitlines()[-1])
        assert metrics["persons"] == persons and metrics["boxes"] == "detections.json"
        assert metrics["PCK@0.2"] is None and metrics["AP"] is not None
        assert "no --checkpoint: dpn1_32 with random weights" in said.err
    assert "1 boxes left out" not in said.err  # below the score anyway
    weights = load_checkpoint(data / "run" / "best.pt").weights
    torch.save(weights, tmp_path / "bare.pt")
    assert main([*arguments, *NETWORK, "--checkpoint", f"{tmp_path}/bare.pt"]) == 0
    bare = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*arguments, "--checkpoint", f"{data}/run/best.pt"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == bare


def test_predict_boxes(data, tmp_path, capsys):
    arguments = ["predict", "--checkpoint", f"{data}/run/best.pt", "--out", f"{tmp_path}/out"]
    image = f"{data}/val/51.png"

    def persons(*more: str) -> list[list[list[float]]]:
        assert main([*arguments, *more]) == 0
        found = json.loads((tmp_path / "out" / "keypoints.json").read_text())
        return [[person["box"] for person in entry["persons"]] for entry in found["images"]]

    assert persons(image) == [[[0, 0, 47, 47]]]
    assert persons(image, "--box", "1,2,30,40", "--box=-5,2.5,30,40") == [[[1, 2, 30, 40], [-5, 2.5, 30, 40]]]
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"51.png": [[1, 2, 30, 40]], "52.png": [], "other.png": [[1, 1, 1, 1]]}))
    assert persons(f"{data}/val", "--boxes", str(boxes)) == [[[1, 2, 30, 40]], [], [[0, 0, 47, 47]], [[0, 0, 47, 47]]]
    boxes.write_text(json.dumps({"val/51.png": [[1, 2, 30, 40]], "51.png": [[9, 9, 9, 9]]}))
    assert persons(image, "--boxes", str(boxes)) == [[[1, 2, 30, 40]]]


def test_predict_draws_nothing_when_one_image_is_broken(data, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "c.png"):
        (images / name).write_bytes((data / "val" / "51.png").read_bytes())
    (images / "b.png").write_bytes((data / "val" / "51.png").read_bytes()[:80])
    assert main(["predict", str(images), "--checkpoint", f"{data}/run/best.pt", "--out", f"{tmp_path}/out"]) == 2
    assert "b.png" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_files_of_a_folder_and_names_of_pictures(tmp_path):
    for name in ("b.JPG", "a.png", "a.jpeg", ".hidden.png", "notes.txt", "paper.pdf"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    paths = image_files([str(tmp_path), str(tmp_path / "a.png"), "elsewhere/a_2.jpg"])
    assert [path.name for path in paths] == ["a.jpeg", "a.png", "b.JPG", "a_2.jpg"]
    pictures = picture_paths(paths, tmp_path / "out")
    assert [path.name for path in pictures.values()] == ["a.jpg", "a_2.jpg", "b.jpg", "a_2_2.jpg"]


def test_predict_never_replaces_an_image_that_was_given(data, tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    with Image.open(data / "val" / "51.png") as image:
        image.save(photo)
    before = photo.read_bytes()
    for out in (tmp_path, tmp_path / "x" / ".."):
        assert main(["predict", str(photo), "--checkpoint", f"{data}/run/best.pt", "--out", str(out)]) == 2
        assert "photo.jpg is one of the images given" in capsys.readouterr().err
    assert photo.read_bytes() == before and files_below(tmp_path) == ["photo.jpg"]


def broken_json(**changes) -> dict:
    """A COCO file of one person, with changes to its annotation; None removes the key."""
    annotation = {
        "id": 7,
        "image_id": 51,
        "category_id": 1,
        "bbox": [2, 3, 40, 41],
        "keypoints": [9.0, 9.0, 2] * 5,
        "area": 9,
    }
    annotation = {key: value for key, value in (annotation | changes).items() if value is not None}
    image = {"id": 51, "file_name": "51.png", "width": 48, "height": 48}
    return {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "m", "keypoints": JOINTS}]}


@pytest.mark.parametrize("name", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (broken_json(keypoints=[1, 2, 2] * 4), "annotation 7"),
        (broken_json(keypoints=[float("nan"), 2, 2] * 5), "annotation 7"),
        (broken_json(bbox=None), "bbox is missing"),
        (broken_json(bbox=[1, 2, -3, 4]), "annotation 7"),
        (broken_json(image_id=52), "annotation 7"),
        (broken_json(keypoints=[0, 0, 0] * 5), "at least one person"),
        ({"images": [], "annotations": []}, "categories is missing"),
        ([], "must be an object"),
        ("not JSON", "is not valid JSON"),
        (None, "no such file"),
    ],
)
def test_broken_annotations(data, tmp_path, command, capsys, name, content, said):
    path = tmp_path / "annotations.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    refused(command[name], ["--data", str(path), "--images", f"{data}/val"], said, tmp_path, capsys)


def refused(command: list[str], mistake: list[str], said: str, folder: Path, capsys) -> None:
    """Exit code 2, one line on stderr that says it, nothing on stdout, and no file made."""
    before = files_below(folder)
    capsys.readouterr()
    assert main([*command, *mistake]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "random weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("hrpose: error: ") and said in lines[0], lines
    assert captured.out == "" and files_below(folder) == before


MISTAKES = [
    ("train", "--images x", "--data, --images: must be given equally often, each file with its folder, got 1 and 2"),
    ("train", "--data nowhere.json --images x", "annotations nowhere.json: no such file"),
    ("train", "--val nowhere.json", "nowhere.json"),
    ("train", "--model dpn9_32", "dpn9_32"),
    ("train", "--option depth=3", "'depth'"),
    ("train", "--option dilation", "--option: must be NAME=VALUE, got 'dilation'"),
    ("train", "--option dilation=0", "dilation must be"),
    ("train", "--option dilation=--5", "dilation must be"),
    ("train", "--recipe none", "recipe: must be one of dpn"),
    ("train", "--set lr=fast", "--set: lr must be a number, got 'fast'"),
    ("train", "--config nowhere.toml", "--config nowhere.toml: cannot be read"),
    ("train", "--set precision=fp16", "precision: fp16 needs a CUDA device, cpu computes in bf16 or fp32"),
    ("train", "--set weighted_joints=true", "weighted_joints: is for skeletons with elbows, knees, wrists or ankles"),
    ("train", "--set speed=3", "--set: name must be one of"),
    ("train", "--epochs 0", "--epochs: must be > 0, got 0"),
    ("train", "--epochs -3", "--epochs: must be > 0, got -3"),
    ("train", "--workers -1", "--workers: must be >= 0, got -1"),
    ("train", "--cache-gb 0 --cache x", "--cache-gb: must be finite and > 0, got 0.0"),
    ("train", "--cache-gb 5", "--cache-gb: goes with --cache"),
    ("train", "--cache /dev/null", "--cache: must be a folder, but /dev/null is a file"),
    ("train", "--threads -1", "--threads: must be > 0, got -1"),
    ("train", "--keep -1", "--keep: must be >= 0, got -1"),
    ("train", "--threads 0", "--threads: must be > 0, got 0"),
    ("train", "--checkpoint-seconds -1", "--checkpoint-seconds: must be"),
    ("train", "--checkpoint-seconds nan", "--checkpoint-seconds: must be"),
    ("train", "--width 0", "--width, --height: must be > 0, got 0, 32"),
    ("train", "--height -8", "--width, --height: must be > 0, got 32, -8"),
    ("train", "--width 36", "multiples of 8, got 36x32"),
    ("train", "--device nonsense", "--device: must be cpu"),
    ("train", "--device meta", "--device: must be cpu"),
    ("train", "--weights nowhere.pt", "nowhere.pt"),
    ("train", "--resume", "holds no run"),
    ("train", "--out /dev/null", "--out: must be a folder, but /dev/null is a file"),
    ("train", "--out /dev/null/run", "--out: must be a folder, but /dev/null is a file"),
    ("evaluate", "--images nowhere", "images nowhere"),
    ("evaluate", "--checkpoint nowhere.pt", "nowhere.pt"),
    ("evaluate", "--model dpn2_32", "must fit the model"),
    ("evaluate", "--option dilation=reversed", "--option: goes with --model"),
    ("evaluate", "--boxes nowhere.json", "nowhere.json"),
    ("evaluate", "--min-box-score nan", "--min-box-score: must be finite"),
    ("evaluate", "--batch-size 0", "--batch-size: must be > 0, got 0"),
    ("evaluate", "--workers -1", "--workers: must be >= 0, got -1"),
    ("evaluate", "--seed -1", "--seed: must be >= 0"),
    ("evaluate", "--width 20", "multiples of 8, got 20x32"),
    ("evaluate", "--device cuda:nonsense", "--device: must be cpu"),
    ("evaluate", "--output /dev/null/results.json", "--output: must be a folder, but /dev/null is a file"),
    ("evaluate", "--output /", "--output: must be a file, but / is a folder"),
    ("predict", "nowhere.jpg", "image nowhere.jpg"),
    ("predict", "--checkpoint nowhere.pt", "nowhere.pt"),
    ("predict", "--box 1,2,3", "--box: must be X,Y,W,H in image pixels, got '1,2,3'"),
    ("predict", "--box 1,2,three,4", "--box: must be X,Y,W,H"),
    ("predict", "--box 1,2,-3,4", "--box: box 0"),
    ("predict", "--box 1,2,0,0", "--box: box 0"),
    ("predict", "--box 1,2,nan,4", "--box: box 0"),
    ("predict", "--box 1,2,3,4 --boxes boxes.json", "cannot be given together"),
    ("predict", "--boxes nowhere.json", "nowhere.json"),
    ("predict", "--min-score -1", "--min-score: must be finite and >= 0"),
    ("predict", "--min-score nan", "--min-score: must be finite and >= 0"),
    ("predict", "--batch-size -2", "--batch-size: must be > 0, got -2"),
    ("predict", "--device nonsense", "--device: must be cpu"),
    ("predict", "--out /dev/null/pictures", "--out: must be a folder, but /dev/null is a file"),
]  # fmt: skip


def test_recipe_is_printed_and_read_back(data, tmp_path, capsys):
    pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    assert main(["recipe", "ram_gpr", "--set", "batch_size=5", "--set", "precision=fp32"]) == 0
    printed = capsys.readouterr().out
    assert 'schedule = "sgdr"\n' in printed and "cycle_epochs = 16.0\n" in printed and "cutout = 0.25\n" in printed
    path = tmp_path / "mine.toml"
    path.write_text(printed)
    assert main(["recipe", "--config", str(path)]) == 0 and capsys.readouterr().out == printed
    path.write_text('recipe = "ram_gpr"\nlr = 2\n[augmentation]\nscale = 0\n')
    assert main(train_command(data, tmp_path / "run", "--config", str(path))) == 0
    assert "the paper of this recipe starts from a trunk trained on ImageNet" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert (recipe["lr"], recipe["epochs"], recipe["batch_size"], recipe["schedule"]) == (2.0, 2, 5, "sgdr")
    assert (recipe["augmentation"]["scale"], recipe["augmentation"]["cutout"]) == (0.0, 0.25)
    assert main(["recipe", "hrnet", "--config", str(path)]) == 0  # what is asked for by name comes before the file's
    assert "lr = 2.0\ndrops = [170, 200]" in capsys.readouterr().out


def test_toml_on_an_older_python_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    with pytest.raises(InputError, match=r"TOML is read from Python 3\.11 on, this is .* --set takes the same values"):
        read_toml(tmp_path / "recipe.toml")


@pytest.mark.parametrize(("name", "mistake", "said"), MISTAKES, ids=[" ".join(m[:2]) for m in MISTAKES])
def test_mistakes(tmp_path, command, capsys, monkeypatch, name, mistake, said):
    monkeypatch.chdir(tmp_path)
    refused(command[name], mistake.split(" "), said, tmp_path, capsys)


def test_mistakes_in_files(data, tmp_path, command, capsys):
    bad = tmp_path / "bad"
    (tmp_path / "images").mkdir()
    other = broken_json() | {"categories": [{"id": 1, "name": "m", "keypoints": list("abcde")}]}
    other = json.dumps(other).encode()
    cases = [
        ("predict", [str(bad)], b"no image", "bad"),
        ("predict", ["--checkpoint", str(bad)], b"PK\x03\x04 no checkpoint", "bad"),
        ("predict", ["--checkpoint", f"{data}/train.json"], b"", "train.json"),
        ("predict", ["--boxes", str(bad)], b'{"51.png": [[1, 2, 3]]}', "51.png"),
        ("predict", ["--boxes", str(bad)], b'{"other.png": [[1, 2, 3, 4]]}', "names none of the images given"),
        ("predict", ["--boxes", str(bad)], b'{"51.png": [[1, 2, 0, 0]]}', "51.png"),
        ("predict", [f"{data}/val/52.png", "--box", "1,2,3,4"], b"", "--box: goes with one image, got 2"),
        ("predict", [f"{tmp_path}/images"], b"", "holds no image files"),
        ("evaluate", ["--data", str(bad)], other, "was trained for the joints of"),
        ("evaluate", ["--boxes", str(bad)], b'[{"image_id": 51}]', "entry 0"),
        ("train", ["--val", str(bad), "--val-images", f"{data}/val"], other, "--val"),
        ("train", ["--weights", str(bad)], b"PK\x03\x04", "bad"),
        ("train", ["--config", str(bad)], b"lr = ", "bad: must be TOML"),
        ("train", ["--config", str(bad)], b"lr = \xff", "bad: must be TOML"),
        ("train", ["--config", str(bad)], b"speed = 3", "bad: name must be one of epochs"),
        ("train", ["--config", str(bad)], b"epochs = 2.5", "bad: epochs must be an integer, got 2.5"),
        ("train", ["--config", str(bad)], b"recipe = []", "recipe: must be one of dpn"),
    ]  # fmt: skip
    for name, mistake, content, said in cases:
        bad.write_bytes(content)
        refused(command[name], mistake, said, tmp_path, capsys)


def test_train_leaves_a_run_alone(data, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in (data / "run").iterdir()}
    val = ["--val", f"{data}/val.json", "--val-images", f"{data}/val"]
    again = train_command(data, data / "run", *val)
    refused(again, [], "holds a run already (last.pt best.pt); --resume goes on with it", tmp_path, capsys)
    for other, said in (
        (["--resume", "--epochs", "3"], "is a run with epochs = 2, asked to go on with epochs = 3"),
        (["--resume", "--set", "lr=1e-4"], "is a run with lr = 0.001, asked to go on with lr = 0.0001"),
        (["--resume", "--model", "dpn2_32"], "is a run with network = "),
        (["--resume", "--data", f"{data}/val.json", "--images", f"{data}/val"], "is a run with persons = 10"),
    ):
        capsys.readouterr()
        assert main([*again, *other]) == 2
        error = capsys.readouterr().err
        assert error.startswith("hrpose: error: resume ") and said in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (data / "run").iterdir()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["models", "--speed"],
        ["train", "--data", "x.json"],
        ["evaluate", "--data", "x.json", "--images", "x", "--workers", "many"],
        ["evaluate", "--data", "x.json", "--images", "x", "--refine", "half"],
        ["predict", "x.jpg", "--checkpoint", "x.pt"],
    ],
    ids=" ".join,
)
def test_flags_that_argparse_refuses(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_models(capsys):
    assert main(["models"]) == 0
    assert "dpn4_32" in capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["model"] for row in rows} <= set(hrpose.list_models())


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"hrpose {hrpose.__version__}, Python ") and "ops on CPU" in said
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["threads"] == torch.get_num_threads() and found["precision"] in ("fp32", "bf16")


def test_out_of_memory_is_one_sentence(command, capsys, monkeypatch):
    def exhausted(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nand a page more")

    monkeypatch.setattr("hrpose.cli.evaluate.evaluate", exhausted)
    assert main(command["evaluate"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hrpose: error: out of memory on the device; a smaller batch") and error.count("\n") == 1


def test_options_and_workers(monkeypatch):
    assert model_options_from(["dilation=2", "resolution=high", "x=a=b"]) == {
        "dilation": 2,
        "resolution": "high",
        "x": "a=b",
    }
    for cores, workers in ((1, 0), (2, 0), (4, 0), (8, 4), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert default_workers() == workers


PACKAGE = Path(hrpose.__file__).resolve().parents[1]  # a fresh interpreter shall find the package that is tested
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE)}


def test_as_a_program_and_into_a_closed_pipe():
    program = [sys.executable, "-m", "hrpose", "models", "--json"]
    done = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT, cwd=PACKAGE, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and len(json.loads(done.stdout)) > 8
    program[3:] = ["doctor"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        program, stdout=writing, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=PACKAGE, timeout=120
    )
    os.close(writing)
    assert done.returncode == 0 and done.stderr == ""


def test_sigterm_and_kill_9_of_a_training_program(data, tmp_path):
    """Stopped, killed and resumed, the program ends with what a run in one go has."""
    out = tmp_path / "run"
    many = ["--epochs", "16"]
    program = [sys.executable, "-m", "hrpose", *train_command(data, out, *many)]

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*program, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path
        )

    def wait_for_epoch(process: subprocess.Popen[str]) -> None:
        assert any(line.startswith("epoch ") for line in process.stdout)  # reads until it comes

    process = start()
    wait_for_epoch(process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert error.splitlines()[-1].endswith("; the same command with --resume goes on from here")

    process = start("--resume")
    wait_for_epoch(process)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    epoch = load_checkpoint(out / "last.pt").training["progress"]["epoch"]
    assert 0 < epoch < 16

    assert main([*train_command(data, out, *many), "--resume", "--threads", "1"]) == 0
    assert main([*train_command(data, tmp_path / "whole", *many), "--threads", "1"]) == 0
    ended, expected = load_checkpoint(out / "last.pt"), load_checkpoint(tmp_path / "whole" / "last.pt")
    assert digest([ended.weights, ended.training]) == digest([expected.weights, expected.training])
