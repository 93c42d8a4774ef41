"""The table of networks: every figure of the specification, printed digits, and what the rows say of themselves."""

import json

import pytest
import torch

from hrpose.cli import main
from hrpose.cost import count_cost
from hrpose.models import create_model, list_models
from hrpose.published import COUNTINGS, PUBLISHED, format_table, markdown_table, table
from hrpose.published.row import COCO_AP, rounds_to


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return table()


def find(rows: list[dict], name: str, size: tuple[int, int], options: dict | None = None) -> dict:
    (row,) = [r for r in rows if (r["model"], r["input"], r["options"]) == (name, size, options or {})]
    return row


SMALL, LARGE, SQUARE = (192, 256), (288, 384), (256, 256)


@pytest.mark.parametrize(
    ("name", "size", "options", "params", "gflops"),
    [
        # (model, input, options, parameters in M, GFLOPs as its table counts them): the specification's "computed".
        ("dpn2_hrnet_w32", SMALL, {}, 29.525, 7.828),
        ("hrnet_w32", SMALL, {}, 28.536, 7.120),
        ("hrnet_w32", LARGE, {}, 28.536, 16.020),
        ("hrnet_w48", SMALL, {}, 63.596, 14.614),
        ("hrnet_w48", LARGE, {}, 63.596, 32.882),
        ("ram_gpr_w32", SMALL, {}, 31.402, 7.655),
        ("ram_gpr_w32", LARGE, {}, 31.402, 17.225),
        ("ram_gpr_w48", SMALL, {}, 70.032, 15.817),
        ("ram_gpr_w48", LARGE, {}, 70.032, 35.589),
        ("simple_baseline_r50", SMALL, {}, 34.000, 8.991),
        ("simple_baseline_r101", SMALL, {}, 52.992, 12.378),
        ("simple_baseline_r152", SMALL, {}, 68.635, 15.765),
        ("simple_baseline_r152", LARGE, {}, 68.635, 35.470),
        ("simple_baseline_r152", SQUARE, {}, 68.635, 21.019),
        ("hourglass8", SMALL, {}, 25.438, 19.178),
        ("hourglass8", SMALL, {"refine": "bottom"}, 25.44, 14.32),
        ("hourglass8", SMALL, {"refine": "none"}, 23.7, 14.30),
        ("cpn_r50", SMALL, {}, 27.011, None),
        ("hrnet_w18_cls", (224, 224), {}, 21.299, 3.989),
        ("hrnet_w30_cls", (224, 224), {}, 37.712, 7.549),
        ("hrnet_w40_cls", (224, 224), {}, 57.557, 11.820),
        ("hrnet_w44_cls", (224, 224), {}, 21.931, 3.901),
        ("hrnet_w76_cls", (224, 224), {}, 40.783, 7.303),
        ("hrnet_w96_cls", (224, 224), {}, 57.482, 10.246),
        ("resnet50_cls", (224, 224), {}, 25.557, 3.808),
        ("resnet101_cls", (224, 224), {}, 44.549, 7.266),
        ("resnet152_cls", (224, 224), {}, 60.193, 10.723),
        ("hrnetv2_w48_seg", (2048, 1024), {}, 65.859, 747.5),
        ("hrnetv2_w40_seg", (2048, 1024), {}, 45.894, 535.4),
    ],
)
def test_every_row_of_the_specification(rows, name, size, options, params, gflops):
    row = find(rows, name, size, options)
    # The specification counts the 256 x 256 networks' parameters with 17 keypoints.
    extra = 257 / 1e6 if row["num_keypoints"] == 16 else 0
    assert rounds_to(row["params"] / 1e6 + extra, params)
    assert gflops is None or rounds_to(row["gmacs_as_paper"], gflops)


def test_exact_count_of_simple_baseline(rows):
    """Transposed convolutions counted for what they compute."""
    found = [find(rows, f"simple_baseline_r{depth}", SMALL)["macs"] / 2**30 for depth in (50, 101, 152)]
    found.append(find(rows, "simple_baseline_r152", LARGE)["macs"] / 2**30)
    assert [round(g, 2) for g in found] == [5.05, 8.44, 11.83, 26.61]


def test_readings_of_cpn(rows):
    """6.734 and 6.339 contain the heads of the global maps; without them the default gives the printed 6.2."""
    assert rounds_to(find(rows, "cpn_r50", SMALL, {"merge": "upsample_first"})["macs_training"] / 2**30, 6.734)
    assert rounds_to(find(rows, "cpn_r50", SMALL, {"layout": "caffe"})["macs_training"] / 2**30, 6.339)
    assert find(rows, "cpn_r50", SMALL)["reproduced"]


def test_ram_gpr_in_the_other_counting(rows):
    found = [find(rows, f"ram_gpr_w{w}", SMALL)["macs_deconv_output_grid"] / 2**30 for w in (32, 48)]
    assert [round(g, 3) for g in found] == [8.675, 18.111]


def test_printed_digits(rows):
    """What the papers print is what comes out, rounded; where it does not, the row says why."""
    wrong = set()
    for row in rows:
        config = (row["model"], *row["options"].values(), row["input"])
        agree = [
            round(ours, len(str(printed).split(".")[1])) == printed
            for printed, ours in (
                (row["paper_params_m"], row["params"] / 1e6),
                (row["paper_gmacs"], row["gmacs_as_paper"]),
            )
            if printed is not None
        ]
        assert row["reproduced"] == (all(agree) if agree else None), config
        if agree and not all(agree):
            assert row["note"], config
            wrong.add(config)
    assert wrong == {
        ("hourglass8", SMALL),
        ("hourglass8", "bottom", SMALL),
        ("hourglass8", "none", SMALL),
        ("cpn_r50", "upsample_first", SMALL),
        ("cpn_r50", "caffe", SMALL),
        ("simple_baseline_r50", SMALL),
        ("simple_baseline_r152", SMALL),
        ("simple_baseline_r152", LARGE),
        ("simple_baseline_r152", SQUARE),
        ("resnet50_cls", (224, 224)),
        ("resnet101_cls", (224, 224)),
        ("hrnetv2_w40_seg", (2048, 1024)),
        ("hrnetv2_w48_seg", (2048, 1024)),
    }


def test_printed_figures_of_the_dilation_pyramid_nets(rows):
    """Thirteen figures, which exclude the decimal unit."""
    own = [row for row in rows if row["model"].startswith("dpn") and "hrnet" not in row["model"]]
    printed = [row for row in own if row["paper_gmacs"] is not None]
    assert len(printed) + len({row["model"] for row in own if row["paper_params_m"] is not None}) == 13
    assert all(row["reproduced"] for row in printed)
    assert sum(round(row["macs"] / 1e9, 1) != row["paper_gmacs"] for row in printed) >= 8


def test_ratios_in_the_text():
    """Section IV-C: 12.7 % of PIL's parameters (26.0 M), 6.3 % of its computation (63.0 G), 95.8 % of its PCKh (92.4);
    Table I: at most a twentieth of HRNet-W32's 28.5 M."""
    with torch.device("meta"):
        large = count_cost(create_model("dpn4_64", 16), (256, 256))
        small = count_cost(create_model("dpn4_32"), (192, 256))
    assert round(round(large.params / 1e6, 1) / 26.0 * 100, 1) == 12.7
    assert round(round(large.gmacs(), 1) / 63.0 * 100, 1) == 6.3
    score = next(p.score for p in PUBLISHED if (p.model, p.table) == ("dpn4_64", "VII"))
    assert abs(score / 92.4 * 100 - 95.8) < 0.1
    assert small.params / 1e6 < 28.5 / 20


def test_published_scores():
    """The gains printed as arrows: Table II, DPM over normal; Table V, DPM over RDPM.

    Table V prints the gains of DPN2_32 and DPN3_32 as 0.4 and 0.3, which its own scores contradict.
    """
    scores = {(p.table, p.model, str(p.options.get("dilation"))): p.score for p in PUBLISHED if p.table in ("II", "V")}
    table_2 = [scores["II", f"dpn{n}_64", "None"] - scores["II", f"dpn{n}_64", "1"] for n in (1, 2, 3, 4)]
    table_5 = [scores["V", f"dpn{n}_32", "None"] - scores["V", f"dpn{n}_32", "reversed"] for n in (1, 2, 3, 4)]
    assert [round(x, 1) for x in table_2] == [4.8, 4.0, 4.9, 5.3]
    assert [round(x, 1) for x in table_5] == [1.6, 0.3, 0.4, 0.4]
    ablations = {tuple(p.options): p.score for p in PUBLISHED if p.model == "ram_gpr_w32" and p.size == SMALL}
    assert ablations == {(): 76.0, ("attention",): 75.7, ("refinement",): 75.2}  # section 4.4


def test_published_rows_can_be_built_and_agree():
    figures: dict[tuple, set] = {}
    with torch.device("meta"):
        for name, options in {(p.model, tuple(p.options.items())) for p in PUBLISHED}:
            create_model(name, **dict(options))
    for p in PUBLISHED:
        assert (p.score is None) == (p.score_meaning is None)
        assert p.counting in COUNTINGS
        assert p.score_meaning != COCO_AP or (p.num_keypoints == 17 and p.size in (SMALL, LARGE))
        for field in ("params_m", "gflops"):
            if getattr(p, field) is not None:
                figures.setdefault((p.model, str(p.options), p.size, field), set()).add(getattr(p, field))
    assert all(len(values) == 1 for values in figures.values())


def test_table_covers_every_model(rows):
    assert list(dict.fromkeys(row["model"] for row in rows)) == list_models()
    assert [row["model"] for row in rows if row["source"] is None][:2] == ["hrnet_w18", "hrnet_w30"]
    score = {"of": COCO_AP, "remark": None}
    assert find(rows, "dpn4_64", SMALL) == {
        "model": "dpn4_64",
        "options": {},
        "input": (192, 256),
        "num_keypoints": 17,
        "params": 3_336_529,
        "macs": 3_224_371_200,
        "macs_deconv_output_grid": 3_224_371_200,
        "macs_training": 3_224_371_200,
        "params_m": 3.336529,
        "gmacs": 3_224_371_200 / 2**30,
        "paper_params_m": 3.3,
        "paper_gmacs": 3.0,
        "counting": "exact",
        "gmacs_as_paper": 3_224_371_200 / 2**30,
        "reproduced": True,
        "note": None,
        "scores": [{"score": 69.9, "source": f"DPN paper, Table {t}"} | score for t in ("II", "IV", "VI")],
        "source": "DPN paper, Table I, II, IV, VI",
    }


def test_table_as_text(rows):
    table, notes = format_table(rows).split("\n\n")
    lines = table.splitlines()
    assert len(lines) == len(rows) + 1
    line = next(line for line in lines if "3,224,371,200" in line)
    assert line.split()[:9] == ["dpn4_64", "-", "192x256", "17", "3,336,529", "3.337", "3.3", "3,224,371,200", "3.003"]
    line = next(line for line in lines if line.startswith("hourglass8") and "none" in line)
    assert "25.1*" in line and "14.3 " in line and "14.3*" not in line
    assert "* hourglass8: no placement of the residual" in notes


def test_commands(capsys, rows):
    main(["models", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["macs"] for row in found] == [row["macs"] for row in rows]
    main(["models", "--markdown"])
    assert capsys.readouterr().out.strip() == markdown_table(rows)
