"""Weight files: what fits is loaded exactly, anything else is refused without touching the model."""

import pickle
import random
import re

import pytest
import torch
from torch import nn

from hrpose.errors import InputError
from hrpose.models import create_model
from hrpose.models.weights import load_weights, read_torch_file


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
    assert load_weights(net, tmp_path / "w.pt") is net
    assert same_state(net.state_dict(), want)
    assert same_state(load_weights(small_net(2), str(tmp_path / "w.pt")).state_dict(), want)


def test_prefix_in_the_middle_is_kept(tmp_path):
    """Only a prefix of every name is DataParallel's; a submodule called "module" is not."""
    net = nn.Module()
    net.module, net.head = nn.Linear(2, 2), nn.Linear(2, 1)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    want = copy_state(net)
    nn.init.zeros_(net.module.weight)
    assert same_state(load_weights(net, tmp_path / "w.pt").state_dict(), want)


def test_half_precision_file_is_converted(tmp_path):
    torch.save(small_net(1).half().state_dict(), tmp_path / "w.pt")
    net = load_weights(small_net(), tmp_path / "w.pt")
    assert net[0].weight.dtype == torch.float32
    assert torch.equal(net[0].weight, small_net(1)[0].weight.half().float())


def test_real_model(tmp_path):
    source = create_model("dpn1_32")
    torch.save({"model": source.state_dict(), "config": source.hrpose_config}, tmp_path / "w.pt")
    assert same_state(load_weights(create_model("dpn1_32"), tmp_path / "w.pt").state_dict(), source.state_dict())
    assert read_torch_file(tmp_path / "w.pt")["config"] == source.hrpose_config


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
            assert same_state(load_weights(small_net(), saved).state_dict(), want)
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
            assert same_state(load_weights(small_net(), saved).state_dict(), want)
        except InputError:
            pass


def test_bit_flips_inside_the_weights(saved):
    """Finite, right shape, wrong value: only the check sum can tell."""
    data = saved.read_bytes()
    start = data.index(small_net(1)[0].weight.detach().numpy().tobytes())
    for bit in range(8 * start, 8 * (start + 54 * 4), 37):
        saved.write_bytes(flipped(data, bit))
        refuse(saved, r"is damaged: check sum of record '.*' differs")
