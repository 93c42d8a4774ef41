"""Crops to keypoints, against HRNet's post-processing restated in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from hrpose.errors import InputError
from hrpose.geometry import crop_transforms, heatmap_to_image
from hrpose.infer.protocol import Protocol, check_model, device_of, estimate
from hrpose.models import create_model
from hrpose.ops import decode
from hrpose.skeleton import COCO17, Skeleton

PAIRED = Skeleton("paired", ("nose", "left_hand", "right_hand", "tail"), flip_pairs=((1, 2),))
SINGLE = Skeleton("single", ("a", "b", "c", "d"), flip_pairs=())
UNKNOWN = Skeleton("unknown", ("a", "b", "c", "d"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    model = create_model("dpn1_32", 4)
    nn.init.normal_(model.heatmap.weight, std=0.5)  # heatmaps that differ from joint to joint
    return model.eval()


def hrnet_keypoints(
    model: nn.Module, crops: torch.Tensor, boxes: np.ndarray, pairs, flip: bool, shift: bool, refine: str
):
    """validate() and get_final_preds() of HRNet, a joint at a time. (w, h) of the region decide the way back."""
    with torch.no_grad():
        maps = model(crops).numpy()
        if flip:
            mirrored = model(torch.flip(crops, [3])).numpy()[:, :, :, ::-1].copy()
            for left, right in pairs:
                mirrored[:, [left, right]] = mirrored[:, [right, left]]
            if shift:
                mirrored[:, :, :, 1:] = mirrored.copy()[:, :, :, 0:-1]
            maps = (maps + mirrored) * np.float32(0.5)
    n, joints, height, width = maps.shape
    points, scores = np.zeros((n, joints, 2)), np.zeros((n, joints))
    for i in range(n):
        x, y, w, h = boxes[i]
        side = max(w, h * width / height) * 1.25  # the width of the region, which alone sets the scale
        for k in range(joints):
            index = int(maps[i, k].argmax())
            scores[i, k] = maps[i, k].max()
            px, py = (index % width, index // width) if scores[i, k] > 0 else (0, 0)
            dx = dy = 0.0
            if refine == "quarter" and 1 < px < width - 1 and 1 < py < height - 1:
                dx = 0.25 * np.sign(maps[i, k, py, px + 1] - maps[i, k, py, px - 1])
                dy = 0.25 * np.sign(maps[i, k, py + 1, px] - maps[i, k, py - 1, px])
            step = side / width
            points[i, k] = x + w / 2 + (px + dx - width / 2) * step, y + h / 2 + (py + dy - height / 2) * step
    return points, scores


BOXES = np.array([[10.0, 20.0, 60.0, 30.0], [-5.0, 3.0, 20.5, 90.0], [100.0, 50.0, 41.0, 64.0]])


@pytest.mark.parametrize("refine", ["quarter", "none"])
@pytest.mark.parametrize(
    ("skeleton", "flip", "shift"),
    [(PAIRED, True, True), (PAIRED, True, False), (PAIRED, False, True), (SINGLE, True, True), (UNKNOWN, True, True)],
)
def test_like_hrnet(model, skeleton, flip, shift, refine):
    crops = torch.randn(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    protocol = Protocol(flip=flip, shift=shift, refine=refine)
    keypoints, scores = estimate(model, crops, crop_transforms(BOXES, (48, 64)), skeleton, protocol)
    flips = flip and skeleton.flip_pairs is not None
    expected, expected_scores = hrnet_keypoints(model, crops, BOXES, skeleton.flip_pairs, flips, shift, refine)
    assert keypoints.dtype == scores.dtype == torch.float32 and not keypoints.requires_grad
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(keypoints, expected, atol=1e-4)


def test_dark_and_its_blur_reach_the_decoder(model):
    crops = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    transforms = crop_transforms(BOXES[:2], (48, 64))
    with torch.no_grad():
        arguments = model(crops), model(crops.flip(3)), PAIRED.flip_pairs
    back = heatmap_to_image(transforms, 4)
    results = {}
    for blur in (11, 17):
        found = estimate(model, crops, transforms, PAIRED, Protocol(refine="dark", blur=blur))
        results[blur] = decode(*arguments, refine="dark", transforms=back, blur=blur)[0]
        torch.testing.assert_close(found[0], results[blur], rtol=1e-4, atol=1e-3)
    assert not torch.allclose(results[11], results[17], rtol=1e-3)


def test_mirrored_copies_may_come_along_and_batches_may_be_small(model):
    crops = torch.randn(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    transforms, seen = crop_transforms(BOXES, (48, 64)), []

    def watched(images):
        seen.append(len(images))
        return model(images)

    want = estimate(watched, crops, transforms, PAIRED, Protocol())
    both = torch.cat((crops, crops.flip(3)))
    for images, batch_size in ((both, None), (crops, 4), (both, 1)):
        for a, b in zip(estimate(watched, images, transforms, PAIRED, Protocol(), batch_size), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert seen == [6, 6, 4, 2, *[1] * 6]


def test_the_flip_test_changes_the_result(model):
    crops = torch.randn(4, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    transforms = crop_transforms([[0, 0, 48, 64]] * 4, (48, 64))
    with_flip = estimate(model, crops, transforms, PAIRED, Protocol())[1]
    assert not torch.allclose(with_flip, estimate(model, crops, transforms, PAIRED, Protocol(flip=False))[1])
    assert not torch.allclose(with_flip, estimate(model, crops, transforms, SINGLE, Protocol())[1])


def test_bf16_stays_close(model):
    crops = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(2))
    transforms = crop_transforms([[0, 0, 48, 64]] * 2, (48, 64))
    exact = estimate(model, crops, transforms, PAIRED, Protocol())[1]
    rounded = estimate(model, crops, transforms, PAIRED, Protocol(precision="bf16"))[1]
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_label_says_what_takes_effect():
    label = Protocol(crop="opencv4", refine="none", padding=1.1).label(PAIRED)
    assert label == {
        "flip": True,
        "shift": True,
        "decoder": "none",
        "crop": "opencv4",
        "padding": 1.1,
        "precision": "fp32",
    }
    assert Protocol().label(UNKNOWN)["flip"] is False and Protocol().label(UNKNOWN)["shift"] is False
    assert Protocol(flip=False).label(COCO17)["shift"] is False
    assert Protocol(refine="dark", blur=17).label(PAIRED)["decoder"] == "dark, blur 17"
    assert Protocol(blur=17).label(PAIRED)["decoder"] == "quarter"
    assert Protocol(shift=False).label(COCO17) == {**Protocol().label(COCO17), "shift": False}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("refine", "half", "protocol: refine must be one of quarter, dark, none, got 'half'"),
        ("blur", 12, "protocol: blur must be an odd integer, 3..27, got 12"),
        ("crop", "cv2", "protocol: crop must be one of exact, opencv4, got 'cv2'"),
        ("precision", "fp16", "protocol: precision must be one of fp32, bf16, got 'fp16'"),
        ("padding", 0.0, "protocol: padding must be finite and > 0, got 0.0"),
        ("padding", float("inf"), "protocol: padding must be finite and > 0, got inf"),
        ("padding", float("nan"), "protocol: padding must be finite and > 0, got nan"),
    ],
)
def test_values_that_are_refused(field, value, message):
    with pytest.raises(InputError, match=message):
        Protocol(**{field: value})


def test_models_that_do_not_fit(model):
    with pytest.raises(InputError, match="model: must have 17 heatmaps for COCO-17, has 4"):
        check_model(model, (48, 64), COCO17)
    with pytest.raises(InputError, match="width and height are multiples of 8, got 48x60"):
        check_model(model, (48, 60), PAIRED)
    check_model(nn.Identity(), (47, 61), PAIRED)  # says nothing about itself
    with pytest.raises(InputError, match="model: must have 4 heatmaps for paired, has 3"):
        estimate(nn.Identity(), torch.zeros(1, 3, 8, 8), torch.eye(2, 3)[None], PAIRED, Protocol())
    assert device_of(nn.Identity()) == device_of(model) == torch.device("cpu")
