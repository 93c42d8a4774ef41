"""What every row times is right, and a contender that is wrong is found out."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from hrpose import ops
from hrpose.bench import basic_blocks, bottlenecks, conv, crop, decode, engines, networks, pipeline, ram_sum, stem
from hrpose.bench.case import LIBRARY, OURS, PYTORCH, REFERENCE, Case, Settings, WrongResult, check_results, difference
from hrpose.models.fused import FusedBottlenecks

SETTINGS = Settings()
BUILDERS = {
    "decode": lambda: decode.decode_case(2, SETTINGS),
    "crop": lambda: crop.crop_case(2, (320, 240), "exact", SETTINGS),
    "crop opencv4": lambda: crop.crop_case(2, (320, 240), "opencv4", SETTINGS),
    "ram_sum": lambda: ram_sum.ram_sum_case(1, "bilinear", "NHWC", False, "fp32", SETTINGS),
    "ram_sum bf16 + grad": lambda: ram_sum.ram_sum_case(2, "nearest", "NCHW", True, "bf16", SETTINGS),
    "bottlenecks": lambda: bottlenecks.bottlenecks_case(None, 32, 2, (12, 8), "fp32", SETTINGS),
    "bottlenecks bf16": lambda: bottlenecks.bottlenecks_case("conv2", 64, 1, (16, 12), "bf16", SETTINGS),
    "basic_blocks": lambda: basic_blocks.basic_blocks_case(32, 2, (12, 9), "fp32", SETTINGS),
    "conv": lambda: conv.conv_case(3, 2, 32, 64, 2, (11, 9), "fp32", SETTINGS),
    "conv bf16": lambda: conv.conv_case(1, 1, 64, 32, 1, (8, 6), "bf16", SETTINGS),
    "stem": lambda: stem.stem_case(7, 1, "fp32", SETTINGS),
    "pipeline": lambda: pipeline.pipeline_case(1, SETTINGS),
}
WHERE = {
    "decode": (ops, "decode"),
    "crop": (ops, "crop"),
    "crop opencv4": (ops, "crop"),
    "ram_sum": (ops, "ram_sum"),
    "ram_sum bf16 + grad": (ops, "ram_sum"),
    "bottlenecks": (FusedBottlenecks, "forward"),
    "bottlenecks bf16": (FusedBottlenecks, "forward"),
    "basic_blocks": (ops, "basic_blocks"),
    "conv": (ops, "conv"),
    "conv bf16": (ops, "conv"),
    "stem": (ops, "stem"),
    "pipeline": (pipeline.ops, "decode"),
}


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_contenders_agree_and_each_kind_is_there(name, not_compiled):
    if name in ("crop", "crop opencv4", "pipeline"):
        pytest.importorskip("cv2")
    case = BUILDERS[name]()
    check_results(case)
    assert {OURS, PYTORCH, REFERENCE} <= {c.kind for c in case.contenders}
    assert len({c.name for c in case.contenders}) == len(case.contenders)
    assert (case.flops is None) != (case.nbytes is None)
    assert not case.absent


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_a_kernel_that_is_off_in_one_place_is_found_out(name, not_compiled, monkeypatch):
    """By a quarter of a pixel; by a factor of four at one pixel."""
    owner, attribute = WHERE[name]
    right = getattr(owner, attribute)

    def wrong(*arguments, **settings):
        out = right(*arguments, **settings)
        if attribute == "decode":
            keypoints, scores = out
            keypoints[-1, -1, 1] += 0.25
            return keypoints, scores
        factor = torch.ones(out.numel())
        factor[out.detach().argmax()] = 4
        return out * factor.view(out.shape).to(out.dtype)

    monkeypatch.setattr(owner, attribute, wrong)
    case = BUILDERS[name]()
    with pytest.raises(WrongResult, match=r"^hrpose.* is off by \d\.\de.0\d of the largest .* limit is \d\.\de-0\d$"):
        check_results(case)


def test_difference_by_hand():
    assert difference(torch.tensor([1.0, -4.0]), np.array([1.0, -5.0])) == pytest.approx(0.2)
    assert difference([np.ones(2), np.array([2.0])], (torch.ones(2), torch.tensor([4.0]))) == pytest.approx(0.5)
    assert difference(torch.ones(2, dtype=torch.bfloat16), torch.ones(2)) == 0
    assert difference(torch.ones(3), torch.ones(2)) == difference(torch.ones(2), [torch.ones(2)] * 2) == float("inf")
    assert difference(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert difference(torch.empty(0), torch.empty(0)) == 0


def test_limits_are_the_contenders_own_or_the_cases():
    case = Case(torch.ones(1), 1e-3)
    case.enter("hrpose", OURS, lambda: torch.ones(1) * 1.0005)
    case.enter("rounded", LIBRARY, lambda: torch.ones(1) * 1.05, 0.1)
    check_results(case)
    case.enter("wrong", LIBRARY, lambda: torch.ones(1) * 1.05)
    with pytest.raises(WrongResult, match=r"^wrong is off by 5.0e-02 of .*, the limit is 1.0e-03$"):
        check_results(case)


def test_who_cannot_come_is_named():
    case = Case(torch.ones(1), 0.1)

    def refuse():
        raise RuntimeError("no such\n  operator")

    def missing():
        import a_package_that_does_not_exist  # noqa: F401 - that is the point

    case.invite("A", LIBRARY, missing)
    case.invite("B", LIBRARY, lambda: refuse)
    case.invite("C", LIBRARY, lambda: lambda: torch.ones(1))
    assert case.absent == {
        "A": "not installed: pip install 'hrpose[bench]'", "B": "RuntimeError: no such operator"
    }  # fmt: skip
    assert [c.name for c in case.contenders] == ["C"]


def test_without_the_extra_everything_else_is_timed(not_compiled, monkeypatch):
    for name in ("cv2", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(engines, "export_onnx", lambda model, images, file: None)
    with torch.no_grad():
        network = networks.network_case("dpn1_32", "fp32", 1, SETTINGS)
        image = crop.crop_case(1, (160, 120), "exact", SETTINGS)
    hint = "not installed: pip install 'hrpose[bench]'"
    assert network.absent == {"ONNX Runtime": hint, "OpenVINO": hint} and image.absent == {"OpenCV + torch": hint}
    check_results(network)
    assert [c.name for c in network.contenders] == ["hrpose.optimize", "torch.compile", "eager"]


@torch.no_grad()
def test_kernels_for_warpgroups_compete_where_they_run(not_compiled, monkeypatch):
    """A stand-in says that they do, and another stands in for them: right, then wrong, which leaves the others."""
    from_blocks, asked = FusedBottlenecks.from_blocks, []

    def stand_in(blocks, dtype, layout=None):
        asked.append(layout)
        ours = from_blocks(blocks, dtype)
        return (lambda x: ours(x) + wrong) if layout else ours

    monkeypatch.delenv("HRPOSE_CUDA_BOTTLENECKS", raising=False)
    monkeypatch.setattr(FusedBottlenecks, "from_blocks", stand_in)
    monkeypatch.setattr(bottlenecks, "warpgroups", lambda x: True)
    monkeypatch.setattr(bottlenecks, "captured", lambda call: call)
    name, wrong = bottlenecks.WARPGROUPS, 0
    case = bottlenecks.bottlenecks_case(None, 32, 1, (12, 8), "bf16", SETTINGS)
    check_results(case)
    assert [c.name for c in case.contenders if c.kind == OURS] == ["hrpose", name] and asked == [None, "core_matrices"]
    wrong = 1
    case = bottlenecks.bottlenecks_case(None, 32, 1, (12, 8), "bf16", SETTINGS)
    assert [c.name for c in case.contenders if c.kind == OURS] == ["hrpose"] and "is off by" in case.absent[name]
    for other in ("mma", "wgmma"):  # what was asked for is "hrpose"
        monkeypatch.setenv("HRPOSE_CUDA_BOTTLENECKS", other)
        case = bottlenecks.bottlenecks_case(None, 32, 1, (12, 8), "bf16", SETTINGS)
        assert name not in case.absent and name not in [c.name for c in case.contenders]


def test_work_is_counted_as_written_out(not_compiled):
    """The dilation pyramid of 32 channels: six times 1x1, 3x3 and 1x1; decode reads two maps per joint."""
    with torch.no_grad():
        case = bottlenecks.bottlenecks_case(None, 32, 2, (12, 8), "fp32", SETTINGS)
    assert case.flops == 2 * 2 * 96 * 6 * (128 * 32 + 9 * 32 * 32 + 32 * 128)
    assert conv.conv_case(3, 2, 32, 64, 3, (10, 8), "fp32", SETTINGS).flops == 2 * 3 * 5 * 4 * 9 * 32 * 64
    assert stem.stem_case(7, 1, "fp32", SETTINGS).flops == 2 * 128 * 96 * 49 * 3 * 64
    assert decode.decode_case(3, SETTINGS).nbytes == 2 * 3 * 17 * 64 * 48 * 4
    maps = 2 * 32 * (64 * 48 + 32 * 24 + 16 * 12 + 8 * 6) * 4
    assert ram_sum.ram_sum_case(2, "nearest", "NHWC", False, "fp32", SETTINGS).nbytes == maps + 2 * 32 * 64 * 48 * 4


def test_networks_to_time_have_batch_norms_that_matter():
    state = torch.get_rng_state()
    model = networks.trained("dpn1_32")
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.weight.min() >= 0.5 and m.bias.abs().max() > 0 and m.running_var.std() > 0 for m in norms)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_engines_compute_a_small_network(dtype, not_compiled):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    networks.randomise_batch_norms(model)
    images = torch.randn(2, 3, 16, 12)
    with torch.no_grad():
        case = Case(model(images), 1e-5 if dtype == torch.float32 else 0.02)
        engines.invite_engines(case, model, images, dtype, threads=1)
        check_results(case)
        images.mul_(2)  # they look at the images, not at a copy made once
        assert not any(difference(c.call(), model(images)) > 0.05 for c in case.contenders if c.kind == LIBRARY)
    engine = [engines.ONNX_RUNTIME] * (dtype == torch.float32)
    assert [c.name for c in case.contenders] == [engines.COMPILE, *engine, engines.OPENVINO]
    assert isinstance(model[1], nn.BatchNorm2d)  # the one given was not folded


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpn4_64", "hrnet_w32", "hourglass1", "cpn_r50", "hrnet_w18_cls", "hrnetv2p_w18"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_networks_by_everybody(name, dtype, not_compiled):
    for module in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(module)
    case = networks.network_case(name, dtype, 1, SETTINGS)
    check_results(case)
    assert not set(case.absent) - ({engines.ONNX_RUNTIME} if dtype == "bf16" else set())
