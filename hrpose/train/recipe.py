"""What a training run is: the papers' recipes as plain values."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hrpose.data.augment import Augmentation
from hrpose.errors import InputError, check

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights besides the network and the data.

    epochs:         passes over the data.
    batch_size:     persons per step, of all processes together.
    lr:             learning rate at the start.
    optimizer:      "adam", or "sgd" with momentum 0.9; both without weight decay.
    schedule:       "step": lr is multiplied by drop_factor at the start of the epochs `drops` (counted from 0).
                    "cosine": from lr to 0 over the epochs.
                    "sgdr": the same within cycles, whose first is cycle_epochs long (T_0) and each next cycle_factor
                    times (T_mult) as long as the one before.
    warmup_steps:   steps over which lr rises linearly from 0 at the start.
    sigma:          of the target Gaussians in heatmap pixels; None: 2, and 3 for inputs of 384 rows and more, as
                    published.
    augmentation:   of the training views.
    precision:      "bf16" (mixed), "fp32", "fp16" (mixed, with scaled losses; CUDA only), or "auto": bf16 where the
                    processor computes with it.
    max_bad_steps:  give up after so many steps in a row whose loss is not finite.
    hard_keypoints: how many joints of each person, the worst ones, the last output learns from (``heatmap_ohkm``);
                    None: all.
    sync_bn:        whether batch norm normalises over the batch of all processes, not over each one's share.
    pretrained_trunk: whether the paper starts from a trunk trained on ImageNet, whose file is to be given
                    (``load_weights``, `hrpose train --weights`): nothing is downloaded.
    weighted_joints: whether elbows and knees count 1.2 times, wrists and ankles 1.5 times (``joint_weights``).
    accumulate:     parts that a batch is computed in, one after the other, for less memory. Their gradients add up to
                    the batch's; batch norm sees each part by itself.
    clip_norm:      largest norm of the gradient of all weights together, which is scaled down to it; None: any.
    ema_decay:      of the exponential moving average of the weights, which is then what is validated, kept as best and
                    left in the model; 0: none.
    compile:        whether ``torch.compile`` makes the network that is trained.
    """

    epochs: int = 140
    batch_size: int = 32
    lr: float = 1e-3
    drops: tuple[int, ...] = (90, 120)
    drop_factor: float = 0.1
    schedule: str = "step"
    warmup_steps: int = 0
    sigma: float | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    precision: str = "auto"
    seed: int = 0
    max_bad_steps: int = 10
    hard_keypoints: int | None = None
    sync_bn: bool = False
    optimizer: str = "adam"
    cycle_epochs: float = 16.0
    cycle_factor: int = 2
    pretrained_trunk: bool = False
    weighted_joints: bool = False
    accumulate: int = 1
    clip_norm: float | None = None
    ema_decay: float = 0.0
    compile: bool = False

    def __post_init__(self) -> None:
        def rule(holds: bool, name: str, what: str) -> None:
            check(holds, "recipe", f"{name} must be {what}, got {getattr(self, name)!r}")

        rule(self.epochs >= 1, "epochs", ">= 1")
        rule(self.batch_size >= 1, "batch_size", ">= 1")
        rule(math.isfinite(self.lr) and self.lr > 0, "lr", "> 0")
        rule(all(drop >= 0 for drop in self.drops), "drops", "epochs >= 0")
        rule(0 < self.drop_factor <= 1, "drop_factor", "in (0, 1]")
        rule(self.schedule in ("step", "cosine", "sgdr"), "schedule", "step, cosine or sgdr")
        rule(self.optimizer in ("adam", "sgd"), "optimizer", "adam or sgd")
        rule(0 < self.cycle_epochs < math.inf, "cycle_epochs", "> 0")
        rule(self.cycle_factor >= 1, "cycle_factor", ">= 1")
        rule(1 <= self.accumulate <= self.batch_size, "accumulate", f"1..{self.batch_size}, the batch_size")
        rule(self.clip_norm is None or 0 < self.clip_norm < math.inf, "clip_norm", "> 0 or none")
        rule(0 <= self.ema_decay < 1, "ema_decay", ">= 0 and < 1")
        rule(self.warmup_steps >= 0, "warmup_steps", ">= 0")
        rule(self.sigma is None or 0 < self.sigma < math.inf, "sigma", "> 0")
        rule(self.precision in PRECISIONS, "precision", "auto, fp32, bf16 or fp16")
        rule(0 <= self.seed < 2**63, "seed", ">= 0 and < 2^63")
        rule(self.max_bad_steps >= 1, "max_bad_steps", ">= 1")
        rule(self.hard_keypoints is None or self.hard_keypoints >= 1, "hard_keypoints", ">= 1 or none")

    def with_epochs(self, epochs: int) -> Recipe:
        """The recipe shortened or stretched to `epochs`, its drops and cycles in proportion."""
        drops = tuple(round(drop * epochs / self.epochs) for drop in self.drops)
        return replace(self, epochs=epochs, drops=drops, cycle_epochs=self.cycle_epochs * epochs / self.epochs)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step counted from the start of the run."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "cosine":
            return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / (self.epochs * steps_per_epoch)))
        if self.schedule == "sgdr":
            done, length = step / steps_per_epoch, self.cycle_epochs
            while done >= length:
                done, length = done - length, length * self.cycle_factor
            return self.lr * warm * 0.5 * (1 + math.cos(math.pi * done / length))
        passed = sum(step // steps_per_epoch >= drop for drop in self.drops)
        return self.lr * warm * self.drop_factor**passed

    def sigma_for(self, size: tuple[int, int]) -> float:
        """Width of the target Gaussians in heatmap pixels for an input of (width, height)."""
        return self.sigma if self.sigma is not None else (3.0 if size[1] >= 384 else 2.0)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def with_settings(self, settings: list[str]) -> Recipe:
        """The recipe with "name=value" settings; names are the fields of Recipe and of Augmentation.

        Raises: InputError listing the valid names, or saying what kind of value a name takes.
        """
        changed = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            check(bool(equals), "--set", f"must be NAME=VALUE, got {setting!r}")
            changed[name] = _parse("--set", name, text, _kind("--set", name))
        return self._changed(changed)

    def with_values(self, values: Mapping[str, Any], where: str) -> Recipe:
        """The recipe with the values of a file; names as in ``with_settings``, at the top or in "augmentation".

        A number may be given as an integer, None as "none". `where` is what messages start with.
        Raises: InputError as in ``with_settings``.
        """
        inner = values.get("augmentation", {})
        check(isinstance(inner, Mapping), where, f"augmentation must be a table of its values, got {inner!r}")
        unknown = sorted(inner.keys() - _fields(Augmentation).keys())
        check(not unknown, where, f"augmentation must hold {', '.join(_fields(Augmentation))}, got {unknown}")
        outer = {name: value for name, value in values.items() if name != "augmentation"}
        twice = sorted(outer.keys() & inner.keys())
        check(not twice, where, f"each name must be given once, twice: {twice}")
        return self._changed(
            {name: _typed(where, name, v, _kind(where, name)) for name, v in {**outer, **inner}.items()}
        )

    def _changed(self, values: dict[str, Any]) -> Recipe:
        inner = {name: value for name, value in values.items() if name in _fields(Augmentation)}
        outer = {name: value for name, value in values.items() if name not in inner}
        return replace(self, augmentation=replace(self.augmentation, **inner), **outer)

    def to_toml(self) -> str:
        """The recipe as a TOML file, which ``with_values`` takes back."""
        values = self.to_dict()
        inner = values.pop("augmentation")
        return "".join([*map(_line, values.items()), "\n[augmentation]\n", *map(_line, inner.items())])


def _fields(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.name != "augmentation"}


def _kind(where: str, name: str) -> Any:
    """The type of a field of Recipe or of Augmentation."""
    fields = _fields(Recipe) | _fields(Augmentation)
    check(name in fields, where, f"name must be one of {', '.join(fields)}, got {name!r}")
    return fields[name]


_WANTED = {
    int: "an integer", float: "a number", bool: "true or false", str: "a text",
    tuple[int, ...]: "integers separated by commas",
}  # fmt: skip


def _optional(kind: Any) -> tuple[Any, bool]:
    """The type without None, and whether it may be None."""
    optional = type(None) in typing.get_args(kind)
    return (typing.get_args(kind)[0] if optional else kind), optional


def _parse(where: str, name: str, text: str, kind: Any) -> Any:
    """The value of a field that is written as `text`."""
    kind, optional = _optional(kind)
    if optional and text == "none":
        return None
    try:
        if kind == tuple[int, ...]:
            return tuple(int(part) for part in text.split(",") if part)
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        rule = f"{_WANTED[kind]} or none" if optional else _WANTED[kind]
        raise InputError(f"{where}: {name} must be {rule}, got {text!r}") from None


def _typed(where: str, name: str, value: Any, kind: Any) -> Any:
    """The value of a field that a file holds as `value`."""
    kind, optional = _optional(kind)
    if optional and value == "none":
        return None
    if kind is float and type(value) is int:
        return float(value)
    if kind == tuple[int, ...]:
        valid, value = isinstance(value, list) and all(type(v) is int for v in value), value
        wanted = "a list of integers"
    else:
        valid, wanted = type(value) is kind, _WANTED[kind]
    check(valid, where, f"{name} must be {wanted}{' or none' * optional}, got {value!r}")
    return tuple(value) if kind == tuple[int, ...] else value


def _line(entry: tuple[str, Any]) -> str:
    name, value = entry
    value = "none" if value is None else list(value) if isinstance(value, tuple) else value
    return f"{name} = {json.dumps(value)}\n"


# SimpleBaseline and HRNet on MPII: scaled and turned less, always shown whole.
_MPII = Augmentation(scale=0.25, rotation_deg=30.0, half_body_probability=0.0)
_WHOLE = Augmentation(half_body_probability=0.0)
_HRNET = Augmentation(scale=0.35, rotation_deg=45.0)

# Drops are printed in the papers, but for DPN's high-resolution runs, whose 210 epochs take HRNet's.
RECIPES: dict[str, Recipe] = {
    "dpn": Recipe(),
    "dpn_high": Recipe(epochs=210, drops=(170, 200)),
    "dpn_mpii": Recipe(),  # the paper trains both data sets alike
    # Printed: SGDR, lr, T_0, T_mult, batch, scale, rotation, flip, cutout. Not printed: the size of the square; the
    # end, here that of the fourth cycle (16 + 32 + 64 + 128), the one nearest to HRNet's 210; the lowest lr, here 0;
    # what SGDR restarts: optimizer="sgd" is its paper's, "adam" that of the works whose augmentation this is.
    "ram_gpr": Recipe(
        epochs=240,
        schedule="sgdr",
        drops=(),
        augmentation=replace(_HRNET, half_body_probability=0.0, cutout=0.25),
        pretrained_trunk=True,
    ),
    "simple_baseline": Recipe(augmentation=_WHOLE, pretrained_trunk=True),
    "simple_baseline_mpii": Recipe(augmentation=_MPII, pretrained_trunk=True),
    # M = 8 is CPN's; the rest is SimpleBaseline's, so that the two differ in network and loss alone.
    "cpn": Recipe(augmentation=_WHOLE, hard_keypoints=8, pretrained_trunk=True),
    "hrnet": Recipe(epochs=210, drops=(170, 200), augmentation=_HRNET, pretrained_trunk=True),
    "hrnet_mpii": Recipe(epochs=210, drops=(170, 200), augmentation=_MPII, pretrained_trunk=True),
}


def get_recipe(name: str) -> Recipe:
    """A published recipe by name. Raises: InputError listing the names."""
    check(isinstance(name, str) and name in RECIPES, "recipe", f"must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]
