"""Checkpoints: what was saved comes back, what was damaged is refused, nothing in a file is ever run."""

import collections
import dataclasses
import os
import pickle
import random
import re
import zipfile

import numpy as np
import pytest
import torch

from hrpose.checkpoint import Checkpoint, digest, load_checkpoint, save_checkpoint
from hrpose.errors import InputError
from hrpose.models import create_model
from hrpose.skeleton import LSP14, Skeleton

TOY = Skeleton("toy", ("left_eye", "right_eye", "nose"), ((0, 2), (1, 2)), ((0, 1),), (0.1, 0.1, 0.2))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model("dpn1_32", 3)


@pytest.fixture
def checkpoint(network):
    training = {
        "epoch": 3,
        "loss": 0.1 + 0.2,
        "names": ("a", "b"),
        "none": None,
        "state": {0: {"step": torch.tensor(7.0), "moment": torch.arange(6).reshape(2, 3).double()}},
        "empty": torch.zeros(0, 4),
        "flags": [True, False, torch.tensor([True, False])],
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    }
    return Checkpoint(network.hrpose_config, dict(network.state_dict()), TOY, (64, 96), training)


@pytest.fixture
def path(tmp_path, checkpoint):
    save_checkpoint(checkpoint, tmp_path / "c.pt")
    return tmp_path / "c.pt"


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# Round trip -----------------------------------------------------------------------------------------------------------


def test_round_trip(path, checkpoint):
    found = load_checkpoint(path)
    assert found.skeleton == TOY and found.size == (64, 96) and found.config == checkpoint.config
    assert same(found.weights, checkpoint.weights) and same(found.training, checkpoint.training)
    assert load_checkpoint(str(path)).size == (64, 96)


def test_build_gives_the_same_network(path, network):
    built = load_checkpoint(path).build()
    assert not built.training and built.hrpose_config == network.hrpose_config
    images = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(built(images), network.eval()(images))


def test_a_state_dict_as_it_comes_from_a_module(tmp_path, network):
    """An OrderedDict with metadata, in channels_last."""
    weights = network.to(memory_format=torch.channels_last).state_dict()
    save_checkpoint(Checkpoint(network.hrpose_config, weights, TOY, (64, 96)), tmp_path / "c.pt")
    assert same(load_checkpoint(tmp_path / "c.pt").weights, dict(weights))


def test_saving_leaves_random_numbers_and_temporary_files_alone(path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    save_checkpoint(load_checkpoint(path), path)
    assert torch.equal(torch.rand(3), expected)
    assert os.listdir(path.parent) == ["c.pt"]


def test_a_failed_save_keeps_the_previous_checkpoint(path, checkpoint, monkeypatch):
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="cannot be written"):
        save_checkpoint(dataclasses.replace(checkpoint, size=(32, 32)), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["c.pt"]


# What may not be saved, because it could not be loaded ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"entry": {"AP": np.float64(0.5)}}, "training.entry.AP: must be a plain value or a tensor, got float64"),
        ({"rng": np.zeros(3)}, "training.rng: must be a plain value or a tensor, got ndarray"),
        ({"list": [1, {2, 3}]}, r"training.list\[1\]: must be a plain value or a tensor, got set"),
        ({"skeleton": TOY}, "training.skeleton: must be a plain value or a tensor, got Skeleton"),
        ({"a": {(1, 2): 3}}, r"training.a: keys must be texts or integers, got \(1, 2\)"),
        ({"a": torch.zeros(3).to_sparse()}, "training.a: must be a dense tensor"),
        ({"a": torch.zeros(3, device="meta")}, "training.a: must be a dense tensor"),
        (
            {"point": collections.namedtuple("P", "x y")(1, 2)},
            "training.point: must be a plain value or a tensor, got P",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_values_that_could_not_be_read_back_are_not_written(tmp_path, checkpoint, training, message):
    with pytest.raises(InputError, match=f"c.pt: {message}"):
        save_checkpoint(dataclasses.replace(checkpoint, training=training), tmp_path / "c.pt")
    assert not os.listdir(tmp_path)


def change(checkpoint, **weights):
    return dataclasses.replace(checkpoint, weights={**checkpoint.weights, **weights})


def test_contradictions_are_neither_written_nor_read(tmp_path, checkpoint):
    first = next(iter(checkpoint.weights))
    broken = checkpoint.weights[first].clone()
    broken[0, 1, 2, 3] = float("nan")
    cases = [
        (dataclasses.replace(checkpoint, skeleton=LSP14), "skeleton must have 3 joints, has 14"),
        (dataclasses.replace(checkpoint, size=(64, 0)), "size: must be two positive integers"),
        (dataclasses.replace(checkpoint, size=(64,)), "size: must be two positive integers"),
        (
            dataclasses.replace(checkpoint, config={"name": "dpn1_32"}),
            "config must hold name, num_keypoints and options",
        ),
        (dataclasses.replace(checkpoint, config={**checkpoint.config, "name": "hrnot"}), "name must be one of dpn1_32"),
        (dataclasses.replace(checkpoint, config={**checkpoint.config, "num_keypoints": "3"}), "num_keypoints must be"),
        (
            dataclasses.replace(checkpoint, config={**checkpoint.config, "num_keypoints": 10**30}),
            "no network can be built",
        ),
        (
            dataclasses.replace(checkpoint, config={**checkpoint.config, "options": {"x": 1}}),
            "option of dpn1_32 must be",
        ),
        (dataclasses.replace(checkpoint, weights=[1]), "model must be a state dict"),
        (dataclasses.replace(checkpoint, weights={"a": 1}), "model must be a state dict"),
        (dataclasses.replace(checkpoint, training=[1]), "training must be an object"),
        (change(checkpoint, extra=torch.zeros(1)), r"its weights must be those of dpn1_32, different: \['extra'\]"),
        (change(checkpoint, **{first: torch.zeros(2)}), f"its weights must be those of dpn1_32, different: ..{first}"),
        (change(checkpoint, **{first: checkpoint.weights[first].int()}), "its weights must be those of dpn1_32"),
        (change(checkpoint, **{first: broken}), f"its weights must be finite, NaN or infinite: ..{first}"),
    ]
    for case, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            save_checkpoint(case, tmp_path / "c.pt")
        assert str(caught.value).startswith(f"checkpoint {tmp_path / 'c.pt'}: ")
        assert not os.listdir(tmp_path)
        write_unchecked(case, tmp_path / "c.pt")  # as a foreign program might
        with pytest.raises(InputError, match=message) as caught:
            load_checkpoint(tmp_path / "c.pt")
        assert "c.pt: " in str(caught.value)
        os.remove(tmp_path / "c.pt")


def content_of(checkpoint):
    return {
        "hrpose_format": 1,
        "config": checkpoint.config,
        "model": checkpoint.weights,
        "skeleton": checkpoint.skeleton.to_dict(),
        "size": list(checkpoint.size),
        "training": checkpoint.training,
    }


def write_unchecked(checkpoint, path, **changes):
    content = {**content_of(checkpoint), **changes}
    torch.save({**content, "sha256": digest(content)}, path)


# What is refused when reading -----------------------------------------------------------------------------------------


class Planted:
    """Unpickled by a reader that trusts the file, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["alone", "in the training state", "as the weights", "old format"])
def test_planted_code_is_not_run(tmp_path, checkpoint, place):
    bait, file = Planted(tmp_path / "pwned"), tmp_path / "c.pt"
    if place == "alone":
        file.write_bytes(pickle.dumps(bait))
    elif place == "old format":
        torch.save(bait, file, _use_new_zipfile_serialization=False)
    else:
        content = content_of(checkpoint)
        content["training" if "training" in place else "model"] = {"a": bait}
        torch.save({**content, "sha256": "0" * 64}, file)
    with pytest.raises(InputError, match=r"c.pt: (holds something other than|is not a file written by torch.save)"):
        load_checkpoint(file)
    assert not (tmp_path / "pwned").exists()
    if place != "alone":  # the bait does bite a reader that trusts it
        torch.load(file, weights_only=False)
        assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hrpose_format": 2}, r"must have format 1, got 2 \(written by another version of hrpose\)"),
        ({"hrpose_format": 0}, "must have format 1, got 0"),
        ({"hrpose_format": True}, "must have format 1, got True"),
        ({"hrpose_format": "1"}, "must have format 1, got '1'"),
        ({"hrpose_format": torch.ones(2)}, "must have format 1, got tensor"),
        ({"skeleton": None}, "skeleton: must be an object with name"),
        ({"skeleton": {"name": "x"}}, "skeleton: must be an object with name"),
        ({"size": None}, "size: must be two positive integers"),
        ({"size": ["a", "b"]}, "size: must be two positive integers"),
        ({"config": None}, "config must hold name, num_keypoints and options"),
    ],
    ids=lambda v: f"{next(iter(v.items()))}" if isinstance(v, dict) else None,
)
def test_files_made_by_hand(tmp_path, checkpoint, changes, message):
    write_unchecked(checkpoint, tmp_path / "c.pt", **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(tmp_path / "c.pt")
    assert str(caught.value).startswith(f"checkpoint {tmp_path / 'c.pt'}: ")


@pytest.mark.parametrize("key", ["config", "model", "skeleton", "size", "training", "sha256"])
def test_missing_parts(tmp_path, checkpoint, key):
    content = content_of(checkpoint)
    content.pop(key, None)
    torch.save(content if key == "sha256" else {**content, "sha256": digest(content)}, tmp_path / "c.pt")
    message = "its SHA-256 check sum differs" if key == "sha256" else rf"\['{key}'\] missing"
    with pytest.raises(InputError, match=f"c.pt: .*{message}"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("content", [{}, {"model": {}}, [1, 2], torch.zeros(3), None, 7, {"state_dict": {}}], ids=str)
def test_foreign_content(tmp_path, content):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(InputError, match="is not a checkpoint of hrpose; for a bare state dict use hrpose"):
        load_checkpoint(tmp_path / "c.pt")


def test_weights_of_another_network(tmp_path, checkpoint):
    other = create_model("dpn2_32", 3).state_dict()
    write_unchecked(dataclasses.replace(checkpoint, weights=dict(other)), tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"its weights must be those of dpn1_32, different: \['dpm"):
        load_checkpoint(tmp_path / "c.pt")


def test_files_that_are_none(tmp_path):
    for name, content in (("empty", b""), ("text", b"hello"), ("zip", b"PK\x03\x04" + bytes(100))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: is (not a file written by torch.save|damaged)"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(InputError, match=r"missing\.pt: no such file"):
        load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("pickled", [b"]" * 100_000 + b"a" * 99_999, b"]q\x63h\x63a"], ids=["deep", "holds itself"])
def test_endless_nesting(tmp_path, checkpoint, pickled):
    """Lists in lists, put together by hand, because pickle itself would fail to write them; it does read them."""
    content = content_of(checkpoint)
    del content["model"], content["training"]
    training = b"X\x08\x00\x00\x00training}X\x01\x00\x00\x00a" + pickled + b"ss."
    archive(tmp_path / "c.pt", pickle.dumps(content, protocol=2)[:-1] + training)
    with pytest.raises(InputError, match=r"c\.pt: holds a value out of all proportion \(RecursionError\)"):
        load_checkpoint(tmp_path / "c.pt")


def archive(path, pickled):
    """A file as torch.save would write it around a pickle."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, content in records.items():
            new.writestr(name, pickled if name.endswith("data.pkl") else content)


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_or_identical(path, checkpoint, count):
    """One to four bits flipped, or the file cut: an error that names it, or exactly the content that was saved."""
    whole, random_source, refused = path.read_bytes(), random.Random(7), 0
    for i in range(count):
        data = bytearray(whole)
        if i % 10 == 9:
            del data[random_source.randrange(len(data)) :]
        else:
            for _ in range(random_source.randint(1, 4)):
                data[random_source.randrange(len(data))] ^= 1 << random_source.randrange(8)
        path.write_bytes(data)
        try:
            found = load_checkpoint(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert same(found.weights, checkpoint.weights) and same(found.training, checkpoint.training)
            assert (found.skeleton, found.size, found.config) == (TOY, (64, 96), checkpoint.config)
    assert refused > count * 0.9


def test_a_change_behind_the_back_of_the_zip_check_sums(path, checkpoint):
    """A rewritten archive has sound CRCs; the SHA-256 of the content still tells."""
    content = torch.load(path, weights_only=True)
    first = next(iter(content["model"]))
    content["model"][first][0, 0, 0, 0] += 1e-6
    torch.save(content, path)
    with pytest.raises(InputError, match="is damaged: its SHA-256 check sum differs"):
        load_checkpoint(path)


# Digest ---------------------------------------------------------------------------------------------------------------


def test_digest_tells_apart_what_differs():
    values = [
        None, 0, 0.0, -0.0, "0", b"0", False, [], {}, [0], [[0]], [0, 0], {0: 0}, {"0": 0}, {"a": 1, "b": 2},
        {"b": 2, "a": 1}, torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).double(), torch.zeros(0), torch.zeros(0, 2),
        torch.tensor(0.0), torch.tensor([0.0, 1e-45]), ["ab", "c"], ["a", "bc"],
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)


def test_digest_is_of_the_values_not_the_layout():
    value = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert digest(value) == digest(value.to(memory_format=torch.channels_last)) == digest(value.clone())
    assert digest(value.transpose(2, 3)) == digest(value.transpose(2, 3).contiguous())
    assert digest((1, 2)) == digest([1, 2])


def test_digest_is_the_one_files_were_written_with():
    """Another digest would refuse every checkpoint that users have; computed by hand from the bytes it stands for."""
    import hashlib

    text = b"dict 2;str 'a';list 2;int 1;float 0.5;str 'b';tensor torch.float32 (2,);"
    expected = hashlib.sha256(text + np.array([1, 2], "<f4").tobytes()).hexdigest()
    assert digest({"a": [1, 0.5], "b": torch.tensor([1.0, 2.0])}) == expected


def test_message_of_a_digest_names_the_place():
    with pytest.raises(InputError, match=re.escape("a[1].b: must be a plain value or a tensor, got set")):
        digest({"a": [0, {"b": set()}]})
    with pytest.raises(InputError, match=r"out of all proportion \(ValueError\)"):
        digest({"a": 10**5000})
