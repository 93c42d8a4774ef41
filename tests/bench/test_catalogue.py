"""Which rows a command line means."""

import re

import pytest

from hrpose import ops
from hrpose.bench.catalogue import GROUPS, OPS, every_plan, left_out, select
from hrpose.errors import InputError
from hrpose.models import list_models

KERNELS = {
    name for name in ops.__all__ if name.islower() and not name.startswith("pack_") and not name.endswith("_reference")
}


def ops_of(plans):
    return {plan.op for plan in plans}


def test_every_op_every_network_and_the_pipeline_have_rows():
    assert ops_of(every_plan()) == {*KERNELS, "pipeline", *list_models()}
    names = [(plan.op, plan.shape, plan.dtype) for plan in every_plan()]
    assert len(names) == len(set(names))
    assert {plan.dtype for plan in every_plan()} == {"fp32", "bf16"}


def test_names_and_groups():
    assert ops_of(select(["decode"])) == {"decode"} and len(select(["decode"])) == 4
    assert ops_of(select(["ops"])) == set(OPS)
    assert ops_of(select(["models"])) == set(list_models())
    assert ops_of(select(["dpn4_64", "pipeline", "crop"])) == {"dpn4_64", "pipeline", "crop"}
    assert len(select(["all"])) == len(every_plan())


def test_the_quick_rows_are_of_each_kind():
    quick = select()
    assert ops_of(quick) == {*OPS, "dpn4_32", "pipeline"} and {plan.dtype for plan in quick} == {"fp32"}
    assert len(quick) <= 12
    assert {plan.dtype for plan in select(dtypes=["bf16"])} == {"bf16"}


def test_batches_and_dtypes():
    assert [plan.shape for plan in select(["dpn4_64"], [3, 5], ["bf16"])] == ["3x3x256x192", "5x3x256x192"]
    assert [(plan.dtype, plan.shape) for plan in select(["hrnet_w32"])] == [
        ("fp32", "1x3x256x192"), ("fp32", "16x3x256x192"), ("bf16", "1x3x256x192"), ("bf16", "16x3x256x192")
    ]  # fmt: skip
    assert [plan.shape for plan in select(["decode"], [7])] == ["7x17x64x48, flip"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["decod"],), "ROWS must be among ops, models, all, decode, .*, got 'decod'; did you mean 'decode'"),
        ((["dpn4_64", "x"],), "got 'x'$"),
        ((["decode"], None, ["fp8"]), "dtype must be 'fp32' or 'bf16', got 'fp8'"),
        ((["decode"], [0]), "batch must be an integer >= 1, got 0"),
        ((["decode"], None, ["bf16"]), "dtype must be one that decode has rows in, got bf16"),
        ((["decode"], [1], None, ["32x24"]), r"--only must be part of a shape \(1x17x64x48, .*\), got 32x24"),
    ],
)  # fmt: skip
def test_mistakes(arguments, message):
    with pytest.raises(InputError, match=f"^bench: .*{message}"):
        select(*arguments)


def test_shapes_are_chosen_by_a_part_of_them():
    plans = select(["bottlenecks"], [1, 32], ["bf16"], ["x32x24"])
    assert [plan.shape for plan in plans] == [f"DPM C={c}, {n}x32x24" for c in (64, 32) for n in (1, 32)]
    both = ["conv1", "C=32, 8x64"]
    assert [plan.shape for plan in select(["bottlenecks"], [8], ["bf16"], both)] == [
        "DPM C=32, 8x64x48",
        "DPN conv1, 8x64x48",
    ]


def test_what_is_left_out_is_counted():
    missing = left_out(select(["decode"]))
    total = int(re.match(r"left out: (\d+) rows", missing)[1])
    assert total == len(every_plan()) - 4 and "decode" not in missing
    assert f"{4 * len(list_models())} of models" in missing
    assert left_out(select(["all"])) == "" and set(GROUPS) == {"ops", "models", "all"}
