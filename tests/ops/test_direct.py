"""Ops on tensors as C sees them: the same as the long way through Python, and nothing but the plain case."""

import gc
import sys
import threading

import numpy as np
import pytest
import torch

from hrpose.ops import (
    BottleneckWeights,
    _ext,
    basic_blocks,
    bottlenecks,
    conv,
    crop,
    decode,
    pack_basic_blocks,
    pack_bottlenecks,
    pack_conv,
    pack_stem,
    ram_sum,
    stem,
)

pytestmark = pytest.mark.skipif(_ext._direct is None, reason="no native module, or no table of DLPack")
DTYPES = (torch.float32, torch.bfloat16)
MODE = (False, 1, 0)  # gradients, threads, work above which there are more


@pytest.fixture(autouse=True)
def chosen():
    _ext.kernels()  # the direct way is open once the instruction set is settled


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    if request.param == torch.bfloat16 and not _ext.kernels().bf16():
        pytest.skip("this processor does not multiply bfloat16")
    return request.param


def drawn(rng, dtype, *shape):
    values = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def conv_call(rng, dtype, n=2, h=9, w=7, ins=32, out=48, k=3, stride=1, residual=False):
    weight, bias = drawn(rng, dtype, out, ins, k, k).contiguous() / 10, drawn(rng, dtype, out)
    packed = pack_conv(weight, bias, stride=stride, relu=True)
    x = drawn(rng, dtype, n, ins, h, w)
    shortcut = drawn(rng, dtype, n, out, -(-h // stride), -(-w // stride)) if residual else None
    return conv, "conv", (x, packed, shortcut)


def blocks_call(rng, dtype, n=2, h=9, w=7, c=32):
    pairs = [(drawn(rng, dtype, c, c, 3, 3).contiguous() / 20, drawn(rng, dtype, c)) for _ in range(4)]
    return basic_blocks, "basic_blocks", (drawn(rng, dtype, n, c, h, w), pack_basic_blocks(pairs))


def bottlenecks_call(rng, dtype, n=2, h=9, w=7, ins=64, mid=32, out=64, stride=1, dilations=(4, 1)):
    def block(into, project):
        shapes = ((mid, into), (mid,), (mid, mid, 3, 3), (mid,), (out, mid), (out,))
        weights = [drawn(rng, dtype, *shape).contiguous() / 10 for shape in shapes]
        return BottleneckWeights(*weights, drawn(rng, dtype, out, into) / 10 if project else None)

    chain = [block(ins if i == 0 else out, ins != out and i == 0) for i in range(len(dilations))]
    return bottlenecks, "bottlenecks", (drawn(rng, dtype, n, ins, h, w), pack_bottlenecks(chain, dilations, stride))


def stem_call(rng, dtype, n=2, h=18, w=13, out=32, k=7, pool=True):
    packed = pack_stem(drawn(rng, dtype, out, 3, k, k).contiguous() / 10, drawn(rng, dtype, out), pool=pool)
    return stem, "stem", (drawn(rng, dtype, n, 3, h, w), packed)


def ram_sum_call(rng, dtype, n=2, c=32, h=8, w=16, factors=(1, 2, 4), weights=True, bilinear=False):
    maps = [drawn(rng, dtype, n, c, h // f, w // f) for f in factors]
    chosen = torch.from_numpy(rng.normal(size=(n, len(factors)))).float() if weights else None
    return ram_sum, "ram_sum", (maps, chosen, "bilinear" if bilinear else "nearest")


CALLS = {
    "conv": (conv_call, {}),
    "conv with residual": (conv_call, {"residual": True, "stride": 2}),
    "conv 1x1 of one pixel": (conv_call, {"k": 1, "n": 1, "h": 1, "w": 1}),
    "basic_blocks": (blocks_call, {}),
    "basic_blocks, one column": (blocks_call, {"w": 1}),
    "bottlenecks": (bottlenecks_call, {}),
    "bottlenecks, projected and strided": (bottlenecks_call, {"ins": 96, "stride": 2, "dilations": (2,)}),
    "stem": (stem_call, {}),
    "stem without pooling": (stem_call, {"k": 3, "pool": False}),
    "ram_sum": (ram_sum_call, {}),
    "ram_sum without weights": (ram_sum_call, {"weights": False, "factors": (4, 1, 2, 1)}),
    "ram_sum of one size": (ram_sum_call, {"factors": (1, 1)}),
    "ram_sum, bilinear": (ram_sum_call, {"bilinear": True}),
    "ram_sum of one channel": (ram_sum_call, {"c": 1}),
}


# As test_{decode,crop}.py test them, most calls go the direct way; these compare both.
DECODES = {
    "one map": {"flip": False, "n": 1, "k": 1, "h": 1, "w": 1},
    "flipped": {},
    "flipped, not shifted": {"shift": False},
    "refined as DARK does": {"refine": "dark", "blur": 17},
    "not refined": {"refine": "none", "flip": False},
    "without transforms": {"transforms": False},
}


@pytest.mark.parametrize("case", DECODES)
def test_decode(rng, monkeypatch, case):
    sizes = {"n": 3, "k": 5, "h": 16, "w": 12, "flip": True, "transforms": True} | DECODES[case]
    n, k, h, w, flip, transforms = (sizes.pop(name) for name in ("n", "k", "h", "w", "flip", "transforms"))
    maps = torch.from_numpy(rng.normal(size=(2, n, k, h, w))).float()
    affine = torch.from_numpy(rng.normal(size=(n, 2, 3))) if transforms else None
    mirrored = (maps[1], ((0, 1), (2, 4))) if flip else (None, None)
    seen = spied(monkeypatch, "decode")
    got = decode(maps[0], *mirrored, transforms=affine, **sizes)
    assert seen == [True]
    monkeypatch.setattr(_ext, "_direct", None)
    want = decode(maps[0], *mirrored, transforms=affine, **sizes)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(got, want, strict=True))


def test_decode_leaves_the_rest_to_the_op(rng, monkeypatch):
    maps, affine = torch.from_numpy(rng.normal(size=(2, 3, 5, 8, 6))).float(), torch.eye(2, 3)[None]
    calls = {
        "half": lambda: decode(maps[0].bfloat16()),
        "nhwc": lambda: decode(maps[0].contiguous(memory_format=torch.channels_last)),
        "float32 transforms": lambda: decode(maps[0], transforms=affine.expand(3, 2, 3)),
        "no images": lambda: decode(maps[0, :0]),
        "pairs in a list": lambda: decode(maps[0], maps[1], [(0, 1)]),
    }
    for call in calls.values():
        seen = spied(monkeypatch, "decode")
        call()
        assert seen in ([False], [])
    for wrong in (
        {"flip_pairs": ((0, 9),)},
        {"flip_pairs": None},
        {"flip_pairs": ((0, 1),), "blur": 4, "refine": "dark"},
    ):
        with pytest.raises(ValueError, match=r"decode: (flip_pairs|blur)"):
            decode(maps[0], maps[1], **wrong)


CROPS = {
    "exact": {},
    "opencv4": {"mode": "opencv4"},
    "bfloat16, mirrored, channels_last": {
        "dtype": torch.bfloat16, "mirror": True, "memory_format": torch.channels_last,
    },
    "not normalised": {"mean": None, "std": None},
}  # fmt: skip


@pytest.mark.parametrize("given", ["array", "tensor", "part"])
@pytest.mark.parametrize("case", CROPS)
def test_crop(rng, monkeypatch, case, given):
    options = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)} | CROPS[case]
    image = rng.integers(0, 256, (40, 50, 4), dtype=np.uint8)
    image = image[..., :3] if given == "part" else np.ascontiguousarray(image[..., :3])
    image = image if given == "array" else torch.from_numpy(image)
    transforms = torch.eye(2, 3, dtype=torch.float64).expand(3, 2, 3) + torch.from_numpy(rng.normal(size=(3, 2, 3))) / 9
    seen = spied(monkeypatch, "crop")
    got = crop(image, transforms, (24, 16), **options)
    into = torch.empty_like(got)
    assert crop(image, transforms, (24, 16), out=into, **options) is into and torch.equal(into, got)
    assert seen == [True, True]
    monkeypatch.setattr(_ext, "_direct", None)
    want = crop(image, transforms, (24, 16), **options)
    assert torch.equal(got, want) and got.stride() == want.stride()


def test_crop_leaves_the_rest_to_the_op(rng, monkeypatch):
    image, affine = torch.zeros(9, 9, 3, dtype=torch.uint8), torch.eye(2, 3, dtype=torch.float64)[None]
    calls = {
        "float32 transforms": lambda: crop(image, affine.float(), (4, 4)),
        "half": lambda: crop(image, affine, (4, 4), dtype=torch.float16),
        "columns first": lambda: crop(image.transpose(0, 1), affine, (4, 4)),
        "none": lambda: crop(image, affine[:0], (4, 4)),
        "a list": lambda: crop(image, affine, [4, 4]),
    }
    for call in calls.values():
        seen = spied(monkeypatch, "crop")
        call()
        assert seen in ([False], [])
    with pytest.raises(ValueError, match=r"crop: transforms\[1\] must be finite and invertible"):
        crop(image, torch.cat((affine, 0 * affine)), (4, 4))
    for size in ((0, 4), (4, 1 << 20)):
        with pytest.raises(ValueError, match="crop: size"):
            crop(image, affine, size)
    for out in (torch.zeros(1, 3, 4, 5), torch.zeros(1, 3, 4, 4).requires_grad_(), torch.zeros(1, 3, 4, 4).double()):
        with pytest.raises(ValueError, match="crop: out must be"):
            crop(image, affine, (4, 4), out=out)


def spied(monkeypatch, name):
    """A list to which each direct call of `name` appends whether it had a result."""
    seen = []

    class Spy:
        def __getattr__(self, attribute):
            function = getattr(DIRECT, attribute)
            if attribute != name:
                return function

            def call(*arguments):
                result = function(*arguments)
                seen.append(result is not None)
                return result

            return call

    monkeypatch.setattr(_ext, "_direct", Spy())
    return seen


DIRECT = _ext._direct


def directly(name, arguments, mode=MODE):
    if name == "ram_sum":
        arguments = (*arguments[:2], arguments[2] == "bilinear")
    return getattr(_ext._direct, name)(*arguments, *mode)


@pytest.mark.parametrize("call", CALLS)
def test_equal_to_the_long_way(rng, monkeypatch, dtype, call):
    make, sizes = CALLS[call]
    op, name, arguments = make(rng, dtype, **sizes)
    got = directly(name, arguments)
    through_op = op(*arguments)
    monkeypatch.setattr(_ext, "_direct", None)
    want = op(*arguments)
    for result in (got, through_op):
        assert torch.equal(result, want) and result.stride() == want.stride() and result.dtype == want.dtype
        assert type(result) is torch.Tensor and not result.requires_grad and result.device == want.device


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "mixed"])
@pytest.mark.parametrize("c", [1, 3, 16])
def test_ram_sum_of_layouts(rng, monkeypatch, dtype, layout, c):
    _, _, (maps, weights, mode) = ram_sum_call(rng, dtype, c=c)
    forms = {"nchw": [torch.contiguous_format] * 3, "nhwc": [torch.channels_last] * 3}
    mixed = [torch.channels_last, torch.contiguous_format, torch.channels_last]
    maps = [x.contiguous(memory_format=f) for x, f in zip(maps, forms.get(layout, mixed), strict=True)]
    got = directly("ram_sum", (maps, weights, mode))
    assert (got is None) == (layout == "mixed" and c > 1)
    monkeypatch.setattr(_ext, "_direct", None)
    want = ram_sum(maps, weights, mode)
    assert got is None or (torch.equal(got, want) and got.stride() == want.stride())


def test_threads_share_the_work(rng, dtype):
    for make, sizes in CALLS.values():
        _, name, arguments = make(rng, dtype, **sizes)
        assert torch.equal(directly(name, arguments, (False, 3, 0)), directly(name, arguments))


class Wrapped(torch.Tensor):
    pass


CHANGES = {
    "a gradient is wanted": lambda x: x.clone().requires_grad_(),
    "a parameter": torch.nn.Parameter,
    "a subclass": lambda x: x.as_subclass(Wrapped),
    "no images": lambda x: x[:0],
    "three axes": lambda x: x[0],
    "float64": torch.Tensor.double,
    "integers": torch.Tensor.int,
    "elsewhere": lambda x: x.to("meta"),
    "too many channels": lambda x: torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last),
    "not dense": lambda x: torch.cat((x, x), 3)[..., ::2],
    "sparse": torch.Tensor.to_sparse,
    "a number": lambda x: 1,
    "None": lambda x: None,
}


@pytest.mark.parametrize("call", ["conv", "basic_blocks", "bottlenecks", "stem", "ram_sum"])
@pytest.mark.parametrize("change", CHANGES)
def test_all_but_the_plain_case_is_left_to_the_op(rng, call, change):
    if call == "stem" and change == "not dense":
        pytest.skip("stem reads images of any strides")
    make, sizes = CALLS[call]
    _, name, (x, *rest) = make(rng, torch.float32, **sizes)
    x = [CHANGES[change](x[0]), *x[1:]] if call == "ram_sum" else CHANGES[change](x)
    assert directly(name, (x, *rest), (True, 1, 0)) is None


def test_the_sign_that_only_torch_knows(rng):
    maps = torch.from_numpy(rng.normal(size=(1, 4, 4, 2))).to(torch.complex64).conj().imag.permute(0, 3, 1, 2)
    assert maps.is_neg()
    assert _ext._direct.ram_sum([maps], None, False, *MODE) is None
    assert torch.equal(ram_sum([maps]), maps.resolve_neg().relu())


WRONG = {
    "no tuple": lambda packed: list(packed),
    "too short": lambda packed: tuple(packed)[:-1],
    "numbers for tensors": lambda packed: packed._replace(**{packed._fields[0]: 3}),
    "not dense": lambda packed: packed._replace(**{packed._fields[1]: packed[1].expand(2, *packed[1].shape)}),
    "a stride of 0": lambda packed: packed._replace(stride=0) if "stride" in packed._fields else (),
    "a stride that is no number": lambda packed: packed._replace(stride="two") if "stride" in packed._fields else (),
    "another dtype": lambda packed: packed._replace(**{packed._fields[0]: packed[0].double()}),
}


@pytest.mark.parametrize("call", ["conv", "basic_blocks", "bottlenecks", "stem"])
@pytest.mark.parametrize("wrong", WRONG)
def test_weights_that_nobody_packed(rng, call, wrong):
    make, sizes = CALLS[call]
    _, name, (x, packed, *rest) = make(rng, torch.float32, **sizes)
    assert directly(name, (x, packed, *rest)) is not None
    assert directly(name, (x, WRONG[wrong](packed), *rest)) is None


def test_lists_that_are_no_sum(rng):
    _, _, (maps, weights, _) = ram_sum_call(rng, torch.float32)
    call = _ext._direct.ram_sum
    assert call(maps, weights, False, *MODE) is not None
    wrong = [[], tuple(maps), maps[1:], [maps[0]] * 9, [*maps[:2], maps[2][:1]], [*maps[:2], maps[2][:, :, :1]]]
    wrong += [[*maps[:2], maps[2].bfloat16()], [*maps[:2], maps[2][:, :8].contiguous()]]
    assert [call(some, weights, False, *MODE) for some in wrong] == [None] * len(wrong)
    for some in (weights.double(), weights[:1], weights.T.contiguous().T, weights[0], 2):
        assert call(maps, some, False, *MODE) is None


def test_nothing_leaks(rng, dtype):
    _, name, (maps, weights, mode) = ram_sum_call(rng, dtype)
    before = [sys.getrefcount(t) for t in (*maps, weights)]
    for _ in range(100):
        result = directly(name, (maps, weights, mode))
    assert [sys.getrefcount(t) for t in (*maps, weights)] == before and sys.getrefcount(result) == 2
    storage = result.untyped_storage()
    del result
    gc.collect()
    assert storage.nbytes() == maps[0].nbytes


def test_results_outlive_their_inputs(rng):
    _, name, arguments = blocks_call(rng, torch.float32)
    result, again = directly(name, arguments), directly(name, arguments)
    del arguments
    gc.collect()
    noise = [torch.full_like(result, torch.nan) for _ in range(8)]
    assert torch.equal(result, again) and len(noise) == 8


def test_threads_of_python_have_workspaces_of_their_own(rng):
    calls = [make(rng, torch.float32, **sizes)[1:] for make, sizes in CALLS.values()]
    want = [directly(name, arguments) for name, arguments in calls]
    wrong = []

    def work(seed):
        for i in np.random.default_rng(seed).integers(len(calls), size=60):
            if not torch.equal(directly(*calls[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_whoever_watches_sees_the_op(rng):
    _, _, (x, packed, _) = conv_call(rng, torch.float32)
    assert _ext.direct() is not None
    with torch.profiler.profile() as profile:
        conv(x, packed)
    assert any("hrpose::conv" in event.name for event in profile.events())
    with torch.autograd.forward_ad.dual_level():
        assert _ext.direct() is None
    with torch.device("meta"):
        assert _ext.direct() is None


@pytest.mark.slow
def test_fuzz(rng):
    """10,000 calls of shapes and layouts at random: the result of the long way, or None."""
    taken = 0
    for index in range(10_000):
        dtype = DTYPES[int(rng.integers(2))] if _ext.kernels().bf16() else torch.float32
        n, h, w = (int(v) for v in rng.integers(1, 12, 3))
        widths = 16 * rng.integers(1, 5, 3)
        make, sizes = [
            (conv_call, {"ins": widths[0], "out": widths[1], "k": int(rng.choice([1, 3])), "stride": h % 3 + 1}),
            (blocks_call, {"c": widths[0]}),
            (bottlenecks_call, {"ins": widths[0], "mid": widths[1], "out": widths[2], "dilations": (w,), "stride": 2}),
            (stem_call, {"out": widths[0], "k": int(rng.choice([1, 3, 5, 7])), "pool": bool(h % 2)}),
            (ram_sum_call, {"c": int(rng.integers(1, 40)), "factors": [1, *rng.choice([1, 2, 4], 2)]}),
        ][index % 5]
        size = {"h": 4 * h, "w": 4 * w} if make is ram_sum_call else {"h": h, "w": w}
        op, name, (x, *rest) = make(rng, dtype, n=n, **size, **{k: v for k, v in sizes.items()})
        if make is not ram_sum_call and rng.integers(4) == 0:
            x = [x.contiguous(), x[..., ::2], x.double(), x.permute(0, 1, 3, 2)][int(rng.integers(4))]
        got = directly(name, (x, *rest))
        if got is not None:
            taken += 1
            before, _ext._direct = _ext._direct, None
            try:
                want = op(x, *rest)
            finally:
                _ext._direct = before
            assert torch.equal(got, want) and got.stride() == want.stride(), (name, index)
    assert taken > 7000
