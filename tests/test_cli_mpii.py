"""MPII on the command line, from training to the files of a submission; COCO's test-dev result file."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hrpose.cli import main
from hrpose.eval.mpii import pckh
from hrpose.eval.mpii_files import load_predictions

scipy_io = pytest.importorskip("scipy.io")
NETWORK = ["--model", "dpn1_32", "--width", "64", "--height", "64", "--device", "cpu"]


def struct(**fields):
    array = np.empty((1, 1), [(name, object) for name in fields])
    for name, value in fields.items():
        array[0, 0][name] = value
    return array


def structs(*rows):
    return np.concatenate([struct(**row) for row in rows], 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six persons as mpii.json and gt_valid.mat, and as the original file, whose last two images are its test set."""
    folder, rng = tmp_path_factory.mktemp("mpii"), np.random.default_rng(2)
    entries, annolist, heads = [], [], rng.uniform(0, 20, (6, 2, 2)) + np.array([[0, 0], [30, 30]])
    for i in range(6):
        picture = Image.new("RGB", (96, 80), (90, 90, 90))
        joints = np.round(rng.uniform(20, 60, (16, 2)), 2).tolist()
        for x, y in joints:
            ImageDraw.Draw(picture).ellipse([x - 3, y - 3, x + 1, y + 1], fill=(255, 255, 0))
        picture.save(folder / f"{i}.png")
        entries.append(
            {"image": f"{i}.png", "center": [40, 38], "scale": 0.3, "joints": joints, "joints_vis": [1] * 16}
        )
        points = structs(*({"x": x, "y": y, "id": k} for k, (x, y) in enumerate(joints)))
        (x1, y1), (x2, y2) = heads[i].tolist()
        rectangle = {"objpos": struct(x=40, y=38), "scale": 0.3}
        if i < 4:
            rectangle |= {"annopoints": struct(point=points), "x1": x1, "y1": y1, "x2": x2, "y2": y2}
        annolist.append({"image": struct(name=f"{i}.png"), "annorect": struct(**rectangle)})
    (folder / "mpii.json").write_text(json.dumps(entries))
    (folder / "test.json").write_text(json.dumps([{k: e[k] for k in ("image", "center", "scale")} for e in entries]))
    joints = np.array([entry["joints"] for entry in entries]).transpose(1, 2, 0)
    truth = {"jnt_missing": np.zeros((16, 6)), "pos_gt_src": joints, "headboxes_src": heads.transpose(1, 2, 0)}
    scipy_io.savemat(folder / "gt_valid.mat", truth)
    single = np.empty((6, 1), object)
    single[:, 0] = [np.array([[1]])] * 6
    release = struct(annolist=structs(*annolist), img_train=np.array([[1, 1, 1, 1, 0, 0]]), single_person=single)
    scipy_io.savemat(folder / "mpii_human_pose_v1_u12_1.mat", {"RELEASE": release})
    train = ["train", "--data", f"{folder}/mpii.json", "--images", str(folder), "--val", f"{folder}/mpii.json"]
    train += ["--ground-truth", f"{folder}/gt_valid.mat", "--out", f"{folder}/run", "--recipe", "hrnet_mpii", *NETWORK]
    assert main([*train, "--epochs", "2", "--set", "batch_size=3"]) == 0
    return folder


def evaluate(data, name, *more):
    given = ["--data", f"{data}/{name}", "--images", str(data), "--checkpoint", f"{data}/run/best.pt"]
    return main(["evaluate", *given, "--device", "cpu", *more])


def test_training_is_scored_by_pckh(data):
    epochs = [json.loads(line) for line in (data / "run" / "log.jsonl").read_text().splitlines()]
    assert [0 <= entry["PCKh@0.5"] <= 1 for entry in epochs] == [True, True]
    assert epochs[0]["boxes"] == "MPII's centres and scales" and (data / "run" / "best.pt").exists()


def test_the_table_is_of_the_predictions_written(data, tmp_path, capsys):
    truth = ["--ground-truth", f"{data}/gt_valid.mat"]
    assert evaluate(data, "mpii.json", *truth, "--output", f"{tmp_path}/p.mat") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "percent Head Sho Elb Wri Hip Knee Ank Mean unweighted".split()
    for line, threshold in zip(lines[1:4], (0.5, 0.1, 0.11), strict=True):
        found = pckh(load_predictions(tmp_path / "p.mat"), data / "gt_valid.mat", threshold)
        columns = ("head", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        values = [*(found.joints[name] for name in columns), found.mean_weighted, found.mean_unweighted]
        name, *cells = line.partition("  (")[0].split()
        assert name == f"PCKh@{threshold:g}" and cells == [f"{value:.2f}" for value in values]
    assert lines[3].endswith("(what HRNet's code prints as Mean@0.1)") and lines[4].startswith("PCK@0.2 ")
    assert "boxes: MPII's centres and scales" in lines[5] and "flip test: yes" in lines[5]
    assert evaluate(data, "mpii.json", *truth, "--json") == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics["PCKh@0.11"] == pytest.approx(found.mean_weighted / 100)


def test_the_original_file_has_its_own_ground_truth(data, capsys):
    name = "mpii_human_pose_v1_u12_1.mat"
    assert evaluate(data, name, "--split", "train", "--json") == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics["persons"] == 4 and metrics["PCKh@0.5"] is not None


def test_files_of_the_test_set(data, tmp_path, capsys):
    assert evaluate(data, "mpii_human_pose_v1_u12_1.mat", "--output", f"{tmp_path}/pred_keypoints_mpii.mat") == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("no PCKh: it needs") and "2 persons" in said
    pred = scipy_io.loadmat(tmp_path / "pred_keypoints_mpii.mat", struct_as_record=False)["pred"]
    names = [image.image[0, 0].name[0] for image in pred[0]]
    assert names == ["4.png", "5.png"] and pred[0, 1].annorect[0, 0].annopoints[0, 0].point.shape == (1, 16)
    for output in ("p.json", "p.mat"):
        assert evaluate(data, "test.json", "--output", f"{tmp_path}/{output}") == 0
        found = load_predictions(tmp_path / output)
        np.testing.assert_array_equal(found[4:], load_predictions(tmp_path / "pred_keypoints_mpii.mat"))


def test_the_default_input_is_a_square(data, tmp_path, capsys):
    given = ["--data", f"{data}/test.json", "--images", str(data), "--output", f"{tmp_path}/p.json"]
    assert main(["evaluate", *given, "--model", "dpn1_32", "--device", "cpu", "--no-flip"]) == 0
    assert "input 256x256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["test.json"], "--output: must be given: "),
        (["test.json", "--output", "p.txt"], "predictions p.txt: must be a file ending in .mat or .json"),
        (
            ["mpii.json", "--boxes", "b.json"],
            "--boxes: goes with COCO files; MPII's protocol looks at its file's centr",
        ),
        (["mpii.json", "--ground-truth", "nowhere.mat"], "ground truth nowhere.mat: no such file"),
        (
            ["coco.json", "--boxes", "b.json", "--ground-truth", "gt_valid.mat"],
            "--ground-truth: goes with the joints of MPII-16, ",
        ),
    ],
)
def test_mistakes(data, tmp_path, capsys, arguments, said):
    (data / "coco.json").write_text(json.dumps(coco()))
    assert evaluate(data, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hrpose: error: {said}")


def test_a_missing_scipy_is_said_before_the_work(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    monkeypatch.setattr("hrpose.cli.evaluate.evaluate", lambda *arguments: pytest.fail("the network was run"))
    assert evaluate(data, "mpii.json", "--output", f"{tmp_path}/p.mat") == 2
    assert "p.mat: .mat files need scipy: pip install 'hrpose[mpii]'" in capsys.readouterr().err


def test_mistakes_in_training(data, tmp_path, capsys):
    base = ["train", "--images", str(data), "--out", f"{tmp_path}/run", *NETWORK, "--data"]
    truth = ["--ground-truth", f"{data}/gt_valid.mat"]
    for more, said in (
        ([f"{data}/test.json"], "must hold joints for all persons to train on, is that of a test set"),
        ([f"{data}/mpii.json", "--val", f"{data}/test.json"], "must hold joints, is the file of a test set"),
        ([f"{data}/mpii.json", *truth], "--ground-truth: goes with --val, which it is of"),
        (
            [f"{data}/mpii.json", "--val", f"{data}/mpii_human_pose_v1_u12_1.mat", *truth],
            "must be of the 4 persons annot",
        ),
    ):
        assert main([*base, *more]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


# COCO's test-dev ------------------------------------------------------------------------------------------------------


def coco():
    """image_info_test-dev2017.json: images and the names of categories, nothing else."""
    images = [{"id": i + 7, "file_name": f"{i}.png", "width": 96, "height": 80} for i in range(6)]
    return {"images": images, "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}]}


@pytest.fixture(scope="module")
def test_dev(data):
    (data / "image_info_test-dev2017.json").write_text(json.dumps(coco()))
    boxes = [(7, 1, 0.9), (7, 1, 0.3), (9, 1, 0.8), (9, 2, 0.99), (99, 1, 0.9)]
    entries = [{"image_id": i, "category_id": c, "bbox": [5 + 40 * s, 6, 50, 60], "score": s} for i, c, s in boxes]
    (data / "det.json").write_text(json.dumps(entries))
    return ["--boxes", f"{data}/det.json", "--data", f"{data}/image_info_test-dev2017.json"]


def test_the_result_file_of_test_dev(data, test_dev, tmp_path, capsys):
    command = ["evaluate", *test_dev, "--images", str(data), *NETWORK, "--no-flip"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    (path,) = tmp_path.iterdir()
    assert path.name == "person_keypoints_test-dev2017_dpn1-32_results.json" and str(path) in captured.err
    entries = json.loads(path.read_text())
    assert sorted(entry["image_id"] for entry in entries) == [7, 7, 9]
    for entry in entries:
        assert set(entry) == {"image_id", "category_id", "keypoints", "score"} and len(entry["keypoints"]) == 51
    assert "3 persons (COCO-17), boxes: det.json" in captured.out and "AP " not in captured.out.replace("no AP", "")
    assert main([*command, "--output", f"{tmp_path}/new/"]) == 0 and (tmp_path / "new" / path.name).is_file()
    assert main([*command, "--output", f"{tmp_path}/mine.json"]) == 0
    assert json.loads((tmp_path / "mine.json").read_text()) == entries
    assert main(command) == 2
    assert "--output: must be given" in capsys.readouterr().err


def test_predict_takes_detections(data, test_dev, tmp_path, capsys):
    model = data / "coco.pt"
    from hrpose.checkpoint import Checkpoint, save_checkpoint
    from hrpose.models import create_model
    from hrpose.skeleton import COCO17

    network = create_model("dpn1_32")
    save_checkpoint(Checkpoint(network.hrpose_config, network.state_dict(), COCO17, (64, 64), {}), model)
    command = ["predict", f"{data}/0.png", f"{data}/2.png", "--checkpoint", str(model), "--out", str(tmp_path)]
    assert main([*command, *test_dev, "--min-box-score", "0.5", "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "keypoints.json").read_text())["images"]
    assert [[p["box"] for p in image["persons"]] for image in found] == [[[41, 6, 50, 60]], [[37, 6, 50, 60]]]
    assert main([*command, *test_dev[:2]]) == 2
    assert "got a list; detections need a file that names their images" in capsys.readouterr().err
    assert main([*command, *test_dev[2:]]) == 2
    assert "--data: goes with --boxes" in capsys.readouterr().err
