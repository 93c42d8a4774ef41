"""How many samples a second the loader gives one core, and how many images a second training takes, loader included.

    python benchmarks/train_throughput.py loader
    OMP_NUM_THREADS=2 python benchmarks/train_throughput.py training

The pictures are drawn people, JPEG files of 640x480 and about 80 KB; with --coco DIR photographs of a COCO folder
(DIR/annotations/person_keypoints_val2017.json, DIR/val2017). Rounds of all contenders alternate; the table gives the
median round and the slowest and fastest one. Needs OpenCV, for the loop in hrnet_style.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from hrnet_style import HRNetStyleDataset, images_per_second
from torch.utils.data import DataLoader

from hrpose.bench.machine import commit, cpu_name
from hrpose.data import PoseDataset, cache_pixels, load_annotations
from hrpose.data.augment import Augmentation
from hrpose.data.coco import Annotations
from hrpose.data.dataset import EpochBatches
from hrpose.data.feed import feed
from hrpose.models import create_model
from hrpose.synth.dataset import write_dataset
from hrpose.train import Recipe, fit

SIZE, BATCH = (192, 256), 32
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("loader", "training"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--persons", type=int, default=160, help="of each round, a multiple of 32")
    parser.add_argument("--coco", metavar="DIR", type=Path, help="photographs to use instead of drawn people")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        annotations, folder = pictures(Path(scratch), options.coco)
        given = annotations, folder, options.persons, Path(scratch)
        contenders = loaders(*given) if options.part == "loader" else trainers(*given)
        measured = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, run in contenders.items():
                measured[name].append(run())
                print(f"{name}: {measured[name][-1]:.0f}", file=sys.stderr, flush=True)
        report(options.part, measured, mean_kilobytes(annotations, folder))


def pictures(scratch: Path, coco: Path | None) -> tuple[Annotations, Path]:
    if coco:
        return load_annotations(coco / "annotations" / "person_keypoints_val2017.json"), coco / "val2017"
    return load_annotations(write_dataset(scratch, "drawn", 96, seed=1)), scratch / "drawn"


def make_data(annotations: Annotations, folder: Path, count: int) -> PoseDataset:
    persons = (annotations.persons * count)[:count]
    return PoseDataset(persons, folder, SIZE, annotations.skeleton, Augmentation())


def loaders(annotations: Annotations, folder: Path, count: int, scratch: Path) -> dict[str, Callable[[], float]]:
    """Samples a second of one core: this process, one thread, no workers."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    plain, cached = (make_data(annotations, folder, count) for _ in range(2))
    cache_pixels(cached, scratch / "cache")
    theirs = DataLoader(HRNetStyleDataset(plain.persons, folder, SIZE, annotations.skeleton), BATCH, drop_last=True)

    def speed(data: PoseDataset | None) -> float:
        started, samples = time.perf_counter(), 0
        for batch in theirs if data is None else feed(data, EpochBatches(count, BATCH, 0, 0), 0, CPU):
            samples += len(batch[0])
        return samples / (time.perf_counter() - started)

    return {
        "hrpose": lambda: speed(plain),
        "hrpose, from a cache": lambda: speed(cached),
        "HRNet-style, with targets": lambda: speed(None),
    }


def trainers(annotations: Annotations, folder: Path, count: int, scratch: Path) -> dict[str, Callable[[], float]]:
    """Images a second of the second epoch of DPN4_32."""
    plain, cached = (make_data(annotations, folder, count) for _ in range(2))
    cache_pixels(cached, scratch / "cache")
    theirs = HRNetStyleDataset(plain.persons, folder, SIZE, annotations.skeleton)
    joints = annotations.skeleton.num_joints

    def ours(data: PoseDataset, precision: str) -> float:
        recipe = Recipe(epochs=2, batch_size=BATCH, precision=precision)
        entries = fit(create_model("dpn4_32", joints), data, recipe, scratch / "run", report=lambda line: None)
        return entries[-1]["images_per_s"]

    def style(workers: int) -> float:
        return images_per_second(create_model("dpn4_32", joints), theirs, BATCH, workers, epochs=2)

    return {
        "hrpose, bf16": lambda: ours(plain, "bf16"),
        "hrpose, bf16, from a cache": lambda: ours(cached, "bf16"),
        "hrpose, fp32": lambda: ours(plain, "fp32"),
        "HRNet-style, fp32, no workers": lambda: style(0),
        "HRNet-style, fp32, 2 workers": lambda: style(2),
    }


def report(part: str, measured: dict[str, list[float]], kilobytes: float) -> None:
    """A table in Markdown; ratios are to the fastest HRNet-style row."""
    medians = {name: statistics.median(speeds) for name, speeds in measured.items()}
    base = max(value for name, value in medians.items() if name.startswith("HRNet"))
    what = "loader, one core" if part == "loader" else f"training of dpn4_32, {torch.get_num_threads()} threads"
    print(f"{what}: {SIZE[0]}x{SIZE[1]}, batches of {BATCH}, JPEG files of {kilobytes:.0f} KB on average")
    print(f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, OpenCV {cv2.__version__}, {commit()}\n")
    unit = "samples/s" if part == "loader" else "images/s"
    print(f"| | {unit} | slowest, fastest round | ratio |\n|---|---:|---:|---:|")
    for name, speeds in measured.items():
        print(f"| {name} | {medians[name]:.0f} | {min(speeds):.0f}, {max(speeds):.0f} | {medians[name] / base:.2f} |")


def mean_kilobytes(annotations: Annotations, folder: Path) -> float:
    names = {person.file_name for person in annotations.persons}
    return statistics.mean((folder / name).stat().st_size for name in names) / 1000


if __name__ == "__main__":
    main()
