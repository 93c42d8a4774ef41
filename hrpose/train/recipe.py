"""What a training run is: the papers' recipes as plain values."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field, replace
from typing import Any

from hrpose.data.augment import Augmentation
from hrpose.errors import InputError, check
from hrpose.infer.protocol import PRECISIONS


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights besides the network and the data.

    epochs:         passes over the data.
    batch_size:     persons per step, of all processes together.
    lr:             of Adam, without weight decay.
    drops:          epochs (counted from 0) at whose start lr is multiplied by drop_factor.
    schedule:       "step" as above, or "cosine" from lr to 0 over the epochs.
    warmup_steps:   steps over which lr rises linearly from 0 at the start.
    sigma:          of the target Gaussians in heatmap pixels; None: 2, and 3 for inputs of 384 rows and more, as
                    published.
    augmentation:   of the training views.
    precision:      "bf16" (mixed), "fp32", or "auto": bf16 where the processor computes with it.
    max_bad_steps:  give up after so many steps in a row whose loss is not finite.
    hard_keypoints: how many joints of each person, the worst ones, the last output learns from (``heatmap_ohkm``);
                    None: all.
    sync_bn:        whether batch norm normalises over the batch of all processes, not over each one's share.
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

    def __post_init__(self) -> None:
        def rule(holds: bool, name: str, what: str) -> None:
            check(holds, "recipe", f"{name} must be {what}, got {getattr(self, name)!r}")

        rule(self.epochs >= 1, "epochs", ">= 1")
        rule(self.batch_size >= 1, "batch_size", ">= 1")
        rule(math.isfinite(self.lr) and self.lr > 0, "lr", "> 0")
        rule(all(drop >= 0 for drop in self.drops), "drops", "epochs >= 0")
        rule(0 < self.drop_factor <= 1, "drop_factor", "in (0, 1]")
        rule(self.schedule in ("step", "cosine"), "schedule", "step or cosine")
        rule(self.warmup_steps >= 0, "warmup_steps", ">= 0")
        rule(self.sigma is None or 0 < self.sigma < math.inf, "sigma", "> 0")
        rule(self.precision in (*PRECISIONS, "auto"), "precision", f"auto, {' or '.join(PRECISIONS)}")
        rule(0 <= self.seed < 2**63, "seed", ">= 0 and < 2^63")
        rule(self.max_bad_steps >= 1, "max_bad_steps", ">= 1")
        rule(self.hard_keypoints is None or self.hard_keypoints >= 1, "hard_keypoints", ">= 1 or none")

    def with_epochs(self, epochs: int) -> Recipe:
        """The recipe shortened or stretched to `epochs`, its drops moved in proportion."""
        drops = tuple(round(drop * epochs / self.epochs) for drop in self.drops)
        return replace(self, epochs=epochs, drops=drops)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step counted from the start of the run."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "cosine":
            return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / (self.epochs * steps_per_epoch)))
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
        own, augmentation = _fields(Recipe), _fields(Augmentation)
        own.pop("augmentation")
        changed: dict[str, Any] = {}
        changed_augmentation: dict[str, Any] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            check(bool(equals), "--set", f"must be NAME=VALUE, got {setting!r}")
            if name in own:
                changed[name] = _parse(name, text, own[name])
            elif name in augmentation:
                changed_augmentation[name] = _parse(name, text, augmentation[name])
            else:
                raise InputError(f"--set: name must be one of {', '.join([*own, *augmentation])}, got {name!r}")
        return replace(self, augmentation=replace(self.augmentation, **changed_augmentation), **changed)


def _fields(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _parse(name: str, text: str, kind: Any) -> Any:
    optional = type(None) in typing.get_args(kind)
    if optional and text == "none":
        return None
    kind = typing.get_args(kind)[0] if optional else kind
    if kind is bool:
        check(text in ("true", "false"), "--set", f"{name} must be true or false, got {text!r}")
        return text == "true"
    try:
        return tuple(int(part) for part in text.split(",") if part) if kind == tuple[int, ...] else kind(text)
    except ValueError:
        wanted = {int: "an integer", float: "a number", tuple[int, ...]: "integers separated by commas"}[kind]
        rule = f"{wanted} or none" if optional else wanted
        raise InputError(f"--set: {name} must be {rule}, got {text!r}") from None


# Drops are printed in the papers, but for DPN's high-resolution runs, whose 210 epochs take HRNet's.
RECIPES: dict[str, Recipe] = {
    "dpn": Recipe(),
    "dpn_high": Recipe(epochs=210, drops=(170, 200)),
    "simple_baseline": Recipe(augmentation=Augmentation(half_body_probability=0.0)),
    # M = 8 is CPN's; the rest is SimpleBaseline's, so that the two differ in network and loss alone.
    "cpn": Recipe(augmentation=Augmentation(half_body_probability=0.0), hard_keypoints=8),
    "hrnet": Recipe(epochs=210, drops=(170, 200), augmentation=Augmentation(scale=0.35, rotation_deg=45.0)),
    "hrnet_mpii": Recipe(
        epochs=210,
        drops=(170, 200),
        augmentation=Augmentation(scale=0.25, rotation_deg=30.0, half_body_probability=0.0),
    ),
}


def get_recipe(name: str) -> Recipe:
    """A published recipe by name. Raises: InputError listing the names."""
    check(name in RECIPES, "recipe", f"must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]
