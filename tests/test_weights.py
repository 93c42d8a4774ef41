"""Weight files: what fits is loaded exactly, anything else is refused without touching the model."""

import pickle
import random
import re

import pytest
import torch
from torch import nn

from hrpose.errors import InputError
from hrpose.models import create_model
from hrpose.models.ram_gpr import RamGpr
from hrpose.models.weights import LoadReport, load_weights, read_torch_file


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))
    net[1].running_mean.normal_()
    return net


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def copy_state(module: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(small_net(1).state_dict(), path)
    return path


def loaded(net: nn.Module, path, **options) -> nn.Module:
    load_weights(net, path, **options)
    return net


def refuse(path, message: str, net: nn.Module | None = None) -> None:
    """The error is one sentence that starts with the file's name, and the model keeps its weights."""
    net = net or small_net()
    before = copy_state(net)
    with pytest.raises(InputError, match=message) as caught:
        load_weights(net, path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert same_state(net.state_dict(), before)


# What loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zip_format", [True, False])
def test_accepted_layouts(tmp_path, wrap, prefix, zip_format):
    want = small_net(1).state_dict()
    state = {prefix + name: tensor for name, tensor in want.items()}
    torch.save(wrap(state), tmp_path / "w.pt", _use_new_zipfile_serialization=zip_format)
    net = small_net(2)
    assert load_weights(net, tmp_path / "w.pt") == LoadReport(tuple(want), (), ())
    assert same_state(net.state_dict(), want)
    assert same_state(loaded(small_net(2), str(tmp_path / "w.pt")).state_dict(), want)


def test_prefix_in_the_middle_is_kept(tmp_path):
    """Only a prefix of every name is DataParallel's; a submodule called "module" is not."""
    net = nn.Module()
    net.module, net.head = nn.Linear(2, 2), nn.Linear(2, 1)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    want = copy_state(net)
    nn.init.zeros_(net.module.weight)
    assert same_state(loaded(net, tmp_path / "w.pt").state_dict(), want)


def test_half_precision_file_is_converted(tmp_path):
    torch.save(small_net(1).half().state_dict(), tmp_path / "w.pt")
    net = loaded(small_net(), tmp_path / "w.pt")
    assert net[0].weight.dtype == torch.float32
    assert torch.equal(net[0].weight, small_net(1)[0].weight.half().float())


def test_real_model(tmp_path):
    source = create_model("dpn1_32")
    torch.save({"model": source.state_dict(), "config": source.hrpose_config}, tmp_path / "w.pt")
    assert same_state(loaded(create_model("dpn1_32"), tmp_path / "w.pt").state_dict(), source.state_dict())
    assert read_torch_file(tmp_path / "w.pt")["config"] == source.hrpose_config


def test_counters_of_batches_may_be_missing(tmp_path):
    """Files of torch < 0.4.1, such as torchvision's first ResNets, have none."""
    source = small_net(1)
    source[1].num_batches_tracked.fill_(7)
    state = {name: t for name, t in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt")
    net = small_net(2)
    net[1].num_batches_tracked.fill_(5)
    report = load_weights(net, tmp_path / "w.pt", part="all")
    assert report == LoadReport(tuple(state), (), ())
    assert net[1].num_batches_tracked == 0 and torch.equal(net[0].weight, source[0].weight)


# Trunks under other heads ---------------------------------------------------------------------------------------------


def saved_state(tmp_path, name: str, change=lambda state: state, **options):
    """A checkpoint of a fresh network, and its state dict."""
    torch.manual_seed(1)
    state = change(create_model(name, **options).state_dict())
    torch.save(state, tmp_path / f"{name}.pth")
    return tmp_path / f"{name}.pth", state


def check_trunk(model: nn.Module, path, state: dict, missing: int, unexpected: int, **options) -> LoadReport:
    before = copy_state(model)
    report = load_weights(model, path, **options)
    after = model.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in report.taken)
    assert all(torch.equal(after[name], before[name]) for name in report.missing)
    assert (len(report.missing), len(report.unexpected)) == (missing, unexpected)
    assert {*report.taken, *report.missing} == set(after) and {*report.taken, *report.unexpected} >= set(state)
    assert {*report.missing} & set(state) == set()
    return report


@pytest.mark.parametrize(
    ("source", "target", "missing", "unexpected"),
    [
        # Of an ImageNet HRNet's 1956 entries the pose network shares the 1752 before its head.
        ("hrnet_w18_cls", "hrnet_w18", 2, 1956 - 1752),
        ("hrnet_w18", "hrnet_w18_cls", 1956 - 1752, 2),
        # Three transposed convolutions with 6 entries each and the head against the classifier.
        ("resnet50_cls", "simple_baseline_r50", 3 * 6 + 2, 2),
    ],
)
def test_another_head_on_the_same_trunk(tmp_path, source, target, missing, unexpected):
    path, state = saved_state(tmp_path, source)
    torch.manual_seed(2)
    model = create_model(target)
    with pytest.warns(UserWarning, match=r"entries taken.*part='trunk' says that this is meant"):
        report = check_trunk(model, path, state, missing, unexpected)
    assert all(name.startswith(model.trunk) for name in report.taken)
    before = copy_state(model)
    with pytest.raises(InputError, match=r"the state dict must fit the model, got .* missing .* unexpected"):
        load_weights(model, path, part="all")
    assert same_state(model.state_dict(), before)


@pytest.mark.parametrize("refinement", [True, False])
def test_hrnet_pose_checkpoint_in_ram_gpr(tmp_path, refinement):
    """The attention and, for the refinement, three outputs of the last exchange unit start fresh."""
    path, state = saved_state(tmp_path, "hrnet_w18")
    model = RamGpr(width=18, refinement=refinement)
    with pytest.warns(UserWarning, match="entries taken"):
        report = load_weights(model, path)
    assert len(report.taken) == (1752 if refinement else 1754)
    assert report.unexpected == (("final_layer.weight", "final_layer.bias") if refinement else ())
    after = model.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in report.taken)
    fresh = (".attention.", "stage4.2.fuse_layers.", "refinement.", "heatmap.")
    assert all(any(part in name for part in fresh) for name in report.missing)
    # Back again the attention's weights have no place: without them the features are others.
    torch.save(model.state_dict(), path)
    refuse(path, r"\d+ unexpected \(stage2.0.attention.0.omega", create_model("hrnet_w18"))


def test_trunk_alone_when_asked(tmp_path, recwarn):
    """With another number of outputs the head does not fit; part="trunk" leaves it out, without a warning."""
    path, state = saved_state(tmp_path, "hrnet_w18", num_keypoints=16)
    refuse(path, r"2 of another shape \(final_layer.weight: \(16, 18, 1, 1\) in the file", create_model("hrnet_w18"))
    model = create_model("hrnet_w18")
    report = check_trunk(model, path, {n: t for n, t in state.items() if "final" not in n}, 2, 0, part="trunk")
    assert report.missing == ("final_layer.weight", "final_layer.bias")
    assert str(report) == (
        "1752 entries taken, 2 of the model missing and left as they were (final_layer.weight, final_layer.bias)"
    )
    assert not recwarn.list
    with pytest.raises(InputError, match="part must be 'all', DPN has no trunk"):
        load_weights(create_model("dpn1_32"), path, part="trunk")
    with pytest.raises(InputError, match="part must be 'auto' or 'all' or 'trunk', got 'head'"):
        load_weights(model, path, part="head")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("hrnet_w18", "hrnet_w30", r"of another shape \(transition1.0.0.weight: \(18, 256, 3, 3\) in the file"),
        ("hrnet_w18", "simple_baseline_r50", r"\d+ missing \(layer2.0"),
        ("simple_baseline_r50", "hrnet_w18", r"\d+ missing \(conv2.weight"),
        ("resnet50_cls", "simple_baseline_r101", r"\d+ missing \(layer3.6.conv1.weight"),
        ("hrnet_w18", "dpn1_32", r"\d+ missing \(conv0.0.weight.*\d+ unexpected \(conv1.weight"),
    ],
)
def test_another_network_is_refused(tmp_path, source, target, message):
    path, _ = saved_state(tmp_path, source)
    refuse(path, message, create_model(target))


def test_trunk_with_gaps_or_surplus_is_refused(tmp_path):
    """Without a head a file may be a trunk; still every entry of the trunk must be there, and none besides."""
    for change, message in (
        (
            lambda s: {n: t for n, t in s.items() if n != "bn2.weight"},
            r"got 1 missing \(bn2.weight\)$",
        ),
        (lambda s: s | {"stage3.9.x": torch.zeros(1)}, r"got 1 unexpected \(stage3.9.x\)$"),
    ):
        path, _ = saved_state(tmp_path, "hrnet_w18_cls", change)
        refuse(path, message, create_model("hrnet_w18"))


# What does not --------------------------------------------------------------------------------------------------------


def test_wrong_model_is_refused_with_a_list(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(create_model("dpn1_32", num_keypoints=16).state_dict(), path)
    message = (
        r"the state dict must fit the model, got 2 of another shape \(heatmap.weight: \(16, 128, 1, 1\) in the file, "
        r"\(17, 128, 1, 1\) in the model, heatmap.bias: \(16,\) in the file, \(17,\) in the model\)$"
    )
    refuse(path, message, create_model("dpn1_32"))
    torch.save(create_model("dpn2_32").state_dict(), path)
    refuse(path, r"got 108 unexpected \(dpm.1.0.conv1.weight, .*, \.\.\.\)$", create_model("dpn1_32"))
    state = small_net().state_dict()
    state["0.extra"] = state.pop("0.bias")
    torch.save(state, path)
    refuse(path, r"got 1 missing \(0.bias\), 1 unexpected \(0.extra\)$")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights(tmp_path, value):
    state = small_net().state_dict()
    state["1.running_var"][1] = value
    torch.save(state, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", r"weights must be finite, got NaN or infinity in 1 tensors \(1.running_var\)")


@pytest.mark.parametrize(
    "change",
    [lambda t: t.to(torch.int32), lambda t: t.to(torch.complex64), lambda t: t.to_sparse(), lambda t: t.to("meta")],
)
def test_tensors_of_another_type(tmp_path, change):
    state = small_net().state_dict()
    state["0.weight"] = change(state["0.weight"])
    torch.save(state, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", r"1 of another type \(0.weight")


@pytest.mark.parametrize("content", [[1], {}, {"epoch": 3}, {"model": {"a": 1}}, {1: torch.zeros(1)}, torch.zeros(2)])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", "must hold a state dict")


def test_files_that_are_no_checkpoints(tmp_path, saved):
    refuse(tmp_path / "none.pt", "no such file")
    refuse(tmp_path, "cannot be read")
    for name, data in {"empty": b"", "text": b"hello", "png": b"\x89PNG\r\n", "zip": b"PK\x03\x04 and no more"}.items():
        (tmp_path / name).write_bytes(data)
        refuse(tmp_path / name, "not a file written by torch.save|damaged")
    data = saved.read_bytes()
    for length in (5, 100, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:length])
        refuse(saved, "damaged")


class Planted:
    """Pickles as a call that leaves a trace when it is run."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def test_code_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "ran"
    planted = {"model": small_net().state_dict(), "extra": Planted(trace)}
    for zip_format in (True, False):
        torch.save(planted, tmp_path / "w.pt", _use_new_zipfile_serialization=zip_format)
        refuse(tmp_path / "w.pt", "holds something other than tensors and plain values")
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Planted(trace)))
    refuse(tmp_path / "w.pt", "not a file written by torch.save")
    assert not trace.exists()


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_random_bit_flips(saved):
    """A flipped bit is an error, or lies where it changes nothing that is read."""
    data = saved.read_bytes()
    want = small_net(1).state_dict()
    refused = 0
    draw = random.Random(0)
    for _ in range(400):
        saved.write_bytes(flipped(data, draw.randrange(8 * len(data))))
        try:
            assert same_state(loaded(small_net(), saved).state_dict(), want)
        except InputError as error:
            assert re.match(re.escape(str(saved)), str(error))
            refused += 1
    assert refused > 100


def test_every_bit_of_a_directory_entry(saved):
    """What the archive's directory says of a tensor: its size, place, method, and whether it is a folder."""
    data = saved.read_bytes()
    want = small_net(1).state_dict()
    start = data.rindex(b"PK\x01\x02", 0, data.rindex(b"net/data/0"))
    folder = 8 * (start + 38) + 4
    for bit in range(8 * start, 8 * (start + 46 + len("net/data/0"))):
        saved.write_bytes(flipped(data, bit))
        if bit == folder:
            refuse(saved, "a record is marked as a folder")
            continue
        try:
            assert same_state(loaded(small_net(), saved).state_dict(), want)
        except InputError:
            pass


def test_bit_flips_inside_the_weights(saved):
    """Finite, right shape, wrong value: only the check sum can tell."""
    data = saved.read_bytes()
    start = data.index(small_net(1)[0].weight.detach().numpy().tobytes())
    for bit in range(8 * start, 8 * (start + 54 * 4), 37):
        saved.write_bytes(flipped(data, bit))
        refuse(saved, r"is damaged: check sum of record '.*' differs")
