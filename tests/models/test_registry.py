"""Every listed model: shapes, gradients, state dict, compile, export, memory format, precision, and how it is named."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from hrpose.cost import count_cost
from hrpose.errors import InputError
from hrpose.models import MODELS, create_model, is_pose_model, list_models, model_options

# One of each family runs by default; the others, alike but for their numbers, and the heavy ones are slow tests.
LIGHT = "dpn1_32 ram_gpr_w32 hrnet_w18 simple_baseline_r50 hourglass1 cpn_r50".split()
# Tracing takes a deep network ten seconds and more: by default one with each kind of layer.
TRACED = "dpn1_32 simple_baseline_r50 hourglass1 cpn_r50".split()


def each(default: list[str]) -> list:
    """Every listed model, those not in `default` as slow tests."""
    return [pytest.param(name, marks=[] if name in default else [pytest.mark.slow]) for name in list_models()]


def images_for(model: nn.Module, n: int = 2, seed: int = 0) -> Tensor:
    """Not square; classifiers are left with more than one pixel at the end."""
    multiple = model.size_multiple
    size = (64, 48) if multiple <= 16 else (64, 2 * multiple)
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def active_model(name: str) -> nn.Module:
    """A model in which every layer matters: fresh residual blocks end in a zero weight and pass their input on."""
    torch.manual_seed(0)
    model = create_model(name, 5 if is_pose_model(name) else None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d) and module.weight.abs().max() == 0:
            noise = 0.02 * torch.randn_like(module.weight)
            nn.init.constant_(module.weight, 0.2) if module.weight.ndim == 1 else module.weight.data.copy_(noise)
    return model


def settled_model(name: str) -> nn.Module:
    """An active model in eval mode whose batch norms know the statistics of its activations, as after training."""
    model = active_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images_for(model, 4, seed=1))
    return model.eval()


@pytest.fixture(scope="module", params=each(LIGHT))
def settled(request) -> nn.Module:
    return settled_model(request.param)


@pytest.fixture(scope="module", params=each(TRACED))
def traced(request) -> nn.Module:
    torch.compiler.reset()  # or the variants of one class add up to its limit of recompilations
    return settled_model(request.param)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def relative_error(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...]) -> float:
    """The largest of all outputs."""
    return max(
        ((g.double() - w.double()).norm() / w.double().norm()).item()
        for g, w in zip(outputs(got), outputs(want), strict=True)
    )


@pytest.mark.parametrize("name", each(LIGHT))
def test_output_and_gradients(name):
    model = active_model(name)
    images = images_for(model)
    out = outputs(model(images))
    height, width = images.shape[2:]
    for maps in out:
        assert maps.dtype == torch.float32
        assert not is_pose_model(name) or maps.shape == (2, 5, height // 4, width // 4)
    sum((maps - 1).pow(2).mean() for maps in out).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


def test_eval_mode_emits_one_map_per_keypoint(settled):
    if not is_pose_model(settled.hrpose_config["name"]):
        pytest.skip("emits no heatmaps")
    images = images_for(settled)
    with torch.no_grad():
        assert settled(images).shape == (2, 5, images.shape[2] // 4, images.shape[3] // 4)


def test_output_depends_on_its_own_image_only(settled):
    images = images_for(settled, 3)
    with torch.no_grad():
        alone, together = outputs(settled(images[1:2])), outputs(settled(images))
    assert relative_error(tuple(maps[1:2] for maps in together), alone) < 1e-5


def test_state_dict_round_trip(settled):
    file = io.BytesIO()
    torch.save(settled.state_dict(), file)
    file.seek(0)
    config = settled.hrpose_config
    again = create_model(config["name"], config["num_keypoints"], **config["options"]).eval()
    again.load_state_dict(torch.load(file, weights_only=True))
    images = images_for(settled)
    with torch.no_grad():
        assert relative_error(again(images), settled(images)) == 0


def test_compile_without_graph_break(traced):
    images = images_for(traced)
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_error(compiled(images), traced(images)) < 1e-5


def test_export_with_dynamic_batch(traced):
    dynamic = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(traced, (images_for(traced),), dynamic_shapes=dynamic)
    own = {str(node.target) for node in exported.graph.nodes if "hrpose" in str(node.target)}
    assert not own  # plain ATen, for ONNX and for machines without hrpose
    images = images_for(traced, 5)
    with torch.no_grad():
        assert relative_error(exported.module()(images), traced(images)) < 1e-5


def test_channels_last(settled):
    images = images_for(settled)
    model = copy.deepcopy(settled).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert relative_error(model(images.to(memory_format=torch.channels_last)), settled(images)) < 1e-4


def test_bf16(settled):
    """bf16 rounds by up to 0.4 % per layer, and the deepest nets multiply that; a wrong layer gives 100 %."""
    images = images_for(settled)
    with torch.no_grad():
        got = copy.deepcopy(settled).bfloat16()(images.bfloat16())
        assert all(maps.dtype == torch.bfloat16 for maps in outputs(got))
        assert relative_error(got, settled(images)) < 0.2


@pytest.mark.parametrize("name", list_models())
def test_counts_are_those_of_the_layers(name):
    """What hooks see in a run on the meta device: each output value of a convolution costs one filter."""
    with torch.device("meta"):
        model = create_model(name).eval()
        images = torch.empty(1, 3, 128, 64)
    seen = 0

    def add(module, args, out):
        nonlocal seen
        if isinstance(module, nn.Linear):
            seen += out.numel() * module.in_features
        elif isinstance(module, nn.ConvTranspose2d):
            seen += args[0].numel() * module.out_channels * module.kernel_size[0] * module.kernel_size[1]
        else:
            seen += out.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(images)
    assert count_cost(model, (64, 128)).macs == seen


# Making models by name ------------------------------------------------------------------------------------------------


def test_table():
    assert list(MODELS) == list_models() == [build.__name__ for build in MODELS.values()]
    pose, others = list_models(pose=True), list_models(pose=False)
    assert sorted(pose + others) == sorted(list_models()) and len(set(pose) & set(others)) == 0
    assert {f"dpn{n}_{c}" for c in (32, 64) for n in (1, 2, 3, 4)} < set(pose)
    assert all(("_cls" in name) + ("_seg" in name) + ("v2p_" in name) == 1 for name in others)
    assert model_options("dpn1_32") == {
        "dilation": "pyramid",
        "resolution": "medium",
        "upsample": "conv1x1",
        "interpolation": "bilinear",
        "final_upsample": 2,
    }


def test_config_spells_out_every_option():
    model = create_model("dpn1_32", 16, dilation=2)
    options = {"dilation": 2, "resolution": "medium", "upsample": "conv1x1", "interpolation": "bilinear"}
    options["final_upsample"] = 2
    assert model.hrpose_config == {"name": "dpn1_32", "num_keypoints": 16, "options": options}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpn5_32", {}, r"create_model: name must be one of dpn1_32, .*, got 'dpn5_32'; did you mean 'dpn"),
        (None, {}, r"create_model: name must be one of .*, got None"),
        ("dpn1_32", {"modules": 2}, r"option of dpn1_32 must be one of dilation, .*, got 'modules'"),
        ("dpn1_32", {"dilation": "pyramidal"}, r"dilation must be 'pyramid', 'reversed' or an integer >= 1, got 'pyr"),
        ("dpn1_32", {"dilation": 0}, r"dilation must be .* got 0"),
        ("dpn1_32", {"dilation": True}, r"dilation must be .* got True"),
        ("dpn1_32", {"resolution": "low"}, r"resolution must be 'medium' or 'high', got 'low'"),
        ("dpn1_32", {"upsample": "nearest"}, r"upsample must be 'conv1x1' or 'plain', got 'nearest'"),
        ("dpn1_32", {"interpolation": "bicubic"}, r"interpolation must be 'bilinear' or 'nearest', got 'bicubic'"),
        ("dpn1_32", {"final_upsample": 4}, r"final_upsample must be 2 or 1, got 4"),
        ("dpn1_32", {"final_upsample": 1}, r"final_upsample must be 2 with resolution='medium', got 1"),
        ("dpn1_32", {"num_keypoints": 0}, r"num_keypoints must be an integer >= 1, got 0"),
    ],
)
def test_wrong_arguments(name, options, message):
    with pytest.raises(InputError, match=message):
        create_model(name, **options)
