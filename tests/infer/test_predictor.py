"""Photographs in, keypoints out: every kind of input, exact places, batches, threads, and what is refused."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import hrpose
from hrpose.checkpoint import Checkpoint, save_checkpoint
from hrpose.errors import InputError
from hrpose.infer import Predictor, Protocol
from hrpose.models import create_model
from hrpose.skeleton import COCO17, Skeleton

HANDS = Skeleton("hands", ("head", "left_hand", "right_hand"), flip_pairs=((1, 2),))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(4)
    model = create_model("dpn1_32", 3)
    nn.init.normal_(model.heatmap.weight, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def predictor(model: nn.Module) -> Predictor:
    return Predictor(model, size=(32, 48), skeleton=HANDS, batch_size=4)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def same(a: hrpose.Poses, b: hrpose.Poses) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("keypoints", "scores", "boxes"))


class PeakAt(nn.Module):
    """A network that always sees joint k at heatmap pixel peaks[k], with a slope towards right and below."""

    def __init__(self, peaks: list[tuple[int, int]], slope: float) -> None:
        super().__init__()
        self.peaks, self.slope = peaks, slope

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        n, _, height, width = images.shape
        maps = torch.zeros(n, len(self.peaks), height // 4, width // 4)
        for k, (x, y) in enumerate(self.peaks):
            maps[:, k, y, x + 1] = maps[:, k, y + 1, x] = self.slope
            maps[:, k, y, x] = 1.0
        return maps


@pytest.mark.parametrize(
    "box", [(10, 20, 30, 40), (5, 5, 70, 20), (-30, -12.5, 50, 30), (60, 40, 90, 200), (3, 4, 7, 0)]
)
@pytest.mark.parametrize(("slope", "offset"), [(0.0, 0.0), (0.5, 0.25)])
def test_a_known_peak_gives_the_exact_point_of_the_image(photo, box, slope, offset):
    """HRNet's affine by hand: scale by the region's width, heatmap centre (W/2, H/2) on the box's centre."""
    peaks = [(3, 4), (5, 7), (2, 9)]
    network = Predictor(PeakAt(peaks, slope), size=(32, 48), skeleton=HANDS, protocol=Protocol(flip=False))
    poses = network(photo, [box])
    x, y, w, h = box
    step = max(w, h * 32 / 48) * 1.25 / 8
    expected = [[x + w / 2 + (px + offset - 4) * step, y + h / 2 + (py + offset - 6) * step] for px, py in peaks]
    np.testing.assert_allclose(poses.keypoints[0], expected, atol=1e-4)
    assert poses.scores.tolist() == [[1.0, 1.0, 1.0]]


def test_a_spot_in_the_photo_is_found_where_it_is(photo):
    """The network stub answers with the brightness of its input: through crop and back a white spot keeps its place."""

    class Brightness(nn.Module):
        def forward(self, images):
            return nn.functional.avg_pool2d(images.mean(1, keepdim=True), 1, stride=4)

    picture = np.zeros((90, 120, 3), np.uint8)
    picture[40:45, 70:75] = 255  # around (72, 42)
    network = Predictor(Brightness(), size=(96, 128), skeleton=Skeleton("spot", ("spot",)))
    for box in ([[50, 20, 40, 50]], [[60, 35, 30, 10]], [[65, 30, 20, 80]]):
        poses = network(picture, box)
        region = max(box[0][2], box[0][3] * 0.75) * 1.25
        reach = 2.5 + 4 * region / 96  # the spot's half and the width of a heatmap pixel in the image
        assert np.abs(poses.keypoints[0, 0] - (72, 42)).max() <= reach


def test_every_kind_of_image(predictor, photo, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    expected = predictor(photo)
    assert expected.keypoints.shape == (1, 3, 2) and expected.scores.shape == (1, 3)
    assert expected.boxes.tolist() == [[0, 0, 79, 59]]
    for image in (path, str(path), Image.fromarray(photo), torch.from_numpy(photo), np.asfortranarray(photo)):
        assert same(predictor(image), expected)
    several = predictor([path, photo])
    assert isinstance(several, list) and all(same(poses, expected) for poses in several)
    assert predictor([]) == []


def test_boxes_of_one_image_and_of_several(predictor, photo):
    other = np.ascontiguousarray(photo[:, ::-1])
    boxes = np.array([[5, 6, 30, 40], [20, 10, 50, 45.5]])
    alone = predictor(photo, boxes)
    assert alone.boxes.tolist() == boxes.tolist() and alone.keypoints.dtype == alone.scores.dtype == np.float32
    found = predictor([photo, other, photo, other], [boxes, None, [], boxes[1:].tolist()])
    assert [len(poses.keypoints) for poses in found] == [2, 1, 0, 1]
    assert same(found[0], alone) and same(found[1], predictor(other)) and same(found[3], predictor(other, boxes[1:]))
    assert found[2].keypoints.shape == (0, 3, 2) and found[2].boxes.shape == (0, 4)
    assert same(predictor(photo, []), found[2])


def test_batches_change_nothing(model, photo):
    boxes = [[x, y, 30, 40] for x in (0, 10, 25) for y in (-3, 5, 12)]
    many = [photo, photo[::2], photo[:, ::3]]
    results = [
        Predictor(model, size=(32, 48), skeleton=HANDS, batch_size=size)(many, [boxes, boxes[:4], None])
        for size in (1, 4, 32)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(a.keypoints, b.keypoints, atol=1e-4)


def test_rotated_file_is_turned_upright(predictor, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn by 90 degrees clockwise to see it upright
    Image.fromarray(np.ascontiguousarray(np.rot90(photo))).save(tmp_path / "turned.png", exif=exif)
    assert same(predictor(tmp_path / "turned.png"), predictor(photo))
    with Image.open(tmp_path / "turned.png") as image:
        assert same(predictor(image, [[5, 6, 30, 40]]), predictor(photo, [[5, 6, 30, 40]]))


def test_from_a_checkpoint(model, predictor, photo, tmp_path):
    path = tmp_path / "hands.pt"
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_checkpoint(Checkpoint(model.hrpose_config, weights, HANDS, (32, 48)), path)
    loaded = Predictor(path, device="cpu")
    assert loaded.size == (32, 48) and loaded.skeleton == HANDS and not loaded.model.training
    poses, expected = loaded(photo), predictor(photo)
    np.testing.assert_allclose(poses.scores, expected.scores, rtol=1e-5)
    np.testing.assert_allclose(poses.keypoints, expected.keypoints, atol=1e-4)
    assert Predictor(str(path), size=(48, 64), device="cpu").size == (48, 64)


def test_network_of_ours_is_optimized_or_comes_so(photo):
    torch.manual_seed(0)
    network = hrpose.create_model("dpn1_32").eval()
    own, given = hrpose.Predictor(network), hrpose.Predictor(hrpose.optimize(network))
    assert own.model is network and any(p.requires_grad for p in network.parameters())
    with torch.inference_mode():
        crop = torch.randn(1, 3, 256, 192)
        want = network(crop)
        for predictor in (own, given):
            assert torch.allclose(predictor.network(crop), want, atol=1e-4 * float(want.abs().max()))
    assert np.allclose(own(photo).scores, given(photo).scores)
    half = hrpose.Predictor(network, protocol=hrpose.Protocol(precision="bf16"))
    assert half.network(crop).dtype == torch.float32 and not torch.equal(half.network(crop), own.network(crop))


def test_defaults_of_a_network():
    assert Predictor(create_model("dpn1_32")).skeleton == COCO17
    five = Predictor(create_model("dpn1_32", 5))
    assert five.size == (192, 256) and five.skeleton.num_joints == 5 and five.skeleton.flip_pairs is None
    assert Predictor(PeakAt([(1, 1)] * 4, 0.0), size=(32, 32)).skeleton.num_joints == 4


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.jpg", r"^image missing.jpg: .*(n|N)o such file"),
        (np.zeros((4, 4), np.uint8), r"image: must be \(H, W, 3\) uint8 RGB, got \(4, 4\) uint8"),
        (np.zeros((4, 4, 3)), r"image: must be \(H, W, 3\) uint8 RGB, got \(4, 4, 3\) float64"),
        (np.zeros((0, 4, 3), np.uint8), r"image: must be \(H, W, 3\) uint8 RGB"),
        (None, "image: must be a path, a Pillow image or an array, got NoneType"),
        (["missing.jpg"], r"^image missing.jpg: .*(n|N)o such file"),
        ([np.zeros((4, 4, 3), np.uint8), 3], "image 1: must be a path, a Pillow image or an array, got int"),
    ],
)
def test_broken_images(predictor, image, message):
    with pytest.raises(InputError, match=message):
        predictor(image)


def test_broken_files(predictor, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"text.jpg: is not an image that Pillow can read"):
        predictor(tmp_path / "text.jpg")
    with pytest.raises(InputError, match=r"^image .*(folder|directory)"):
        predictor(tmp_path)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([1, 2, 3, 4], r"boxes of image 0: must be \(N, 4\) x, y, width, height, got \(4,\)"),
        ([[1, 2, 3]], r"boxes of image 0: must be \(N, 4\) x, y, width, height, got \(1, 3\)"),
        ([[1, 2, 3, 4], [1, 2, 0, 0]], "boxes of image 0: box 1 must be finite with width, height >= 0"),
        ([[1, 2, float("nan"), 4]], "boxes of image 0: box 0 must be finite"),
        ([[1, 2, -3, 4]], "boxes of image 0: box 0 must be finite with width, height >= 0"),
        ("box", "boxes of image 0: must be"),
    ],
)
def test_broken_boxes(predictor, photo, boxes, message):
    with pytest.raises(InputError, match=message):
        predictor(photo, boxes)
    with pytest.raises(InputError, match=message.replace("image 0", "image 1")):
        predictor([photo, photo], [None, boxes])


def test_wrong_arguments(model, photo):
    with pytest.raises(InputError, match="Predictor: boxes must be a list of 2, one per image, got 1"):
        Predictor(model, size=(32, 48), skeleton=HANDS)([photo, photo], [[[1, 2, 3, 4]]])
    with pytest.raises(InputError, match="Predictor: model must be a network or the path of a checkpoint, got int"):
        Predictor(3)
    with pytest.raises(InputError, match="Predictor: batch_size must be > 0, got 0"):
        Predictor(model, skeleton=HANDS, batch_size=0)
    with pytest.raises(InputError, match=r"^Predictor: size.* must be two positive integers"):
        Predictor(model, skeleton=HANDS, size=(0, 48))
    with pytest.raises(InputError, match="multiples of 8, got 30x48"):
        Predictor(model, skeleton=HANDS, size=(30, 48))
    with pytest.raises(InputError, match="must have 17 heatmaps for COCO-17, has 3"):
        Predictor(model, skeleton=COCO17)
    with pytest.raises(InputError, match="model: must emit heatmaps of keypoints, resnet50_cls does not"):
        Predictor(create_model("resnet50_cls"))
    with pytest.raises(InputError, match=r"nowhere.pt: no such file"):
        Predictor(Path("nowhere.pt"))


def test_nan_weights_are_refused_with_the_image_and_the_box(photo):
    network = PeakAt([(1, 1)] * 3, 0.0)
    seen = iter(range(9))
    network.register_forward_hook(
        lambda module, given, maps: maps.index_fill(0, torch.tensor([1]), torch.nan) if next(seen) else maps
    )
    predictor = Predictor(network, size=(32, 48), skeleton=HANDS, batch_size=2, protocol=Protocol(flip=False))
    with pytest.raises(
        InputError, match="heatmaps that are not finite, first for box 2 of image 1; its weights are broken"
    ):
        predictor([photo, photo], [None, [[1, 2, 3, 4]] * 3])


def hammer(predictor: Predictor, photo: np.ndarray, calls: int) -> None:
    boxes = [[[float(i % 50), 3.0, 30.0, 10.0 + i], [10.0, float(i % 40), 50.0, 20.0]] for i in range(calls)]
    serial = [predictor(photo, some) for some in boxes]
    wrong: list[int] = []

    def work(start: int) -> None:
        for i in range(calls):
            j = (i + start) % calls
            if not same(predictor(photo, boxes[j]), serial[j]):
                wrong.append(j)

    threads = [threading.Thread(target=work, args=(7 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_eight_threads(model, photo):
    hammer(Predictor(model, size=(32, 32), skeleton=HANDS, batch_size=2), photo, 25)


@pytest.mark.slow
def test_eight_threads_for_long(predictor, photo):
    hammer(predictor, photo, 1000)
