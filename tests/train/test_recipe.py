"""Recipes: the published values, the learning rate of a step, and settings given as text."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hrpose.data.augment import Augmentation
from hrpose.errors import InputError
from hrpose.train import RECIPES, Recipe, get_recipe


@pytest.mark.parametrize(
    ("name", "scale", "rotation", "half_body", "epochs", "drops"),
    [
        ("dpn", 0.30, 40, 0.3, 140, (90, 120)),
        ("dpn_high", 0.30, 40, 0.3, 210, (170, 200)),
        ("dpn_mpii", 0.30, 40, 0.3, 140, (90, 120)),
        ("simple_baseline", 0.30, 40, 0.0, 140, (90, 120)),
        ("simple_baseline_mpii", 0.25, 30, 0.0, 140, (90, 120)),
        ("cpn", 0.30, 40, 0.0, 140, (90, 120)),
        ("hrnet", 0.35, 45, 0.3, 210, (170, 200)),
        ("hrnet_mpii", 0.25, 30, 0.0, 210, (170, 200)),
    ],
)
def test_published_values(name, scale, rotation, half_body, epochs, drops):
    recipe = get_recipe(name)
    augmentation = recipe.augmentation
    assert (recipe.epochs, recipe.drops, recipe.lr, recipe.drop_factor) == (epochs, drops, 1e-3, 0.1)
    assert (augmentation.scale, augmentation.rotation_deg) == (scale, rotation)
    assert augmentation.half_body_probability == half_body and augmentation.half_body_min_joints == 8
    assert (augmentation.rotation_probability, augmentation.flip_probability) == (0.6, 0.5)
    assert (recipe.schedule, recipe.warmup_steps) == ("step", 0)
    assert recipe.hard_keypoints == (8 if name == "cpn" else None)
    assert recipe.optimizer == "adam" and augmentation.cutout == 0
    assert recipe.pretrained_trunk == (not name.startswith("dpn"))


def test_published_values_of_ram_gpr():
    recipe = get_recipe("ram_gpr")
    augmentation = recipe.augmentation
    assert (recipe.schedule, recipe.lr, recipe.cycle_epochs, recipe.cycle_factor) == ("sgdr", 1e-3, 16, 2)
    assert (recipe.batch_size, recipe.epochs, recipe.optimizer, recipe.pretrained_trunk) == (32, 240, "adam", True)
    assert (augmentation.scale, augmentation.rotation_deg, augmentation.cutout) == (0.35, 45, 0.25)
    assert (augmentation.flip_probability, augmentation.half_body_probability) == (0.5, 0)


def test_unknown_recipe():
    with pytest.raises(InputError, match=r"recipe: must be one of dpn, .*hrnet_mpii, got 'dnp'"):
        get_recipe("dnp")


def test_every_recipe_is_tested():
    tested = {"dpn", "dpn_high", "dpn_mpii", "simple_baseline", "simple_baseline_mpii", "cpn", "hrnet", "hrnet_mpii"}
    assert set(RECIPES) == tested | {"ram_gpr"}


def test_steps_of_the_learning_rate():
    """DPN: 1e-3, from epoch 90 on 1e-4, from 120 on 1e-5, counted from 0."""
    recipe = Recipe()
    rates = [recipe.lr_at(epoch * 100 + last, 100) for epoch in (0, 89, 90, 119, 120, 139) for last in (0, 99)]
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 4 + [1e-5] * 4)


def test_cosine_and_warm_up():
    recipe = Recipe(epochs=10, lr=2.0, schedule="cosine", warmup_steps=4)
    assert [recipe.lr_at(step, 50) for step in range(4)] == pytest.approx(
        [2 * (step + 1) / 4 * (1 + math.cos(math.pi * step / 500)) / 2 for step in range(4)]
    )
    assert recipe.lr_at(250, 50) == pytest.approx(1.0)
    assert 0 < recipe.lr_at(499, 50) < 2e-4
    stepped = Recipe(warmup_steps=10)
    assert stepped.lr_at(4, 100) == pytest.approx(5e-4) and stepped.lr_at(9, 100) == stepped.lr_at(10, 100) == 1e-3


def test_warm_restarts():
    """Cycles of 16, 32, 64 and 128 epochs, each from lr down a half cosine; torch's scheduler says the same."""
    recipe, steps = get_recipe("ram_gpr"), 5
    rates = [recipe.lr_at(step, steps) for step in range(240 * steps)]
    restarts = [step / steps for step in range(1, len(rates)) if rates[step] > rates[step - 1]]
    assert restarts == [16, 48, 112] and all(rates[int(e) * steps] == 1e-3 for e in (0, *restarts))
    assert rates[8 * steps] == rates[32 * steps] == rates[80 * steps] == rates[176 * steps] == pytest.approx(5e-4)
    assert 0 < rates[-1] < 1e-8
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 16, 2)
    for epoch in range(240):
        assert recipe.lr_at(epoch * steps, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_a_shortened_recipe_ends_with_its_last_cycle():
    recipe = get_recipe("ram_gpr").with_epochs(50)
    rates = [recipe.lr_at(step, 30) for step in range(50 * 30)]
    assert sum(a < b for a, b in pairwise(rates)) == 3 and rates[-1] < 1e-7


def test_other_number_of_epochs_moves_the_drops():
    assert Recipe().with_epochs(14).drops == (9, 12)
    assert get_recipe("hrnet").with_epochs(420).drops == (340, 400)
    assert Recipe().with_epochs(1).epochs == 1


def test_width_of_the_targets():
    assert Recipe().sigma_for((192, 256)) == Recipe().sigma_for((256, 256)) == 2.0
    assert Recipe().sigma_for((288, 384)) == 3.0
    assert Recipe(sigma=1.5).sigma_for((288, 384)) == 1.5


def test_settings():
    changed = Recipe().with_settings(
        ["lr=5e-4", "drops=3,7", "batch_size=8", "sigma=2.5", "schedule=cosine", "rotation_deg=0", "seed=3"]
    )
    expected = Recipe(
        lr=5e-4, drops=(3, 7), batch_size=8, sigma=2.5, schedule="cosine", seed=3,
        augmentation=Augmentation(rotation_deg=0.0),
    )  # fmt: skip
    assert changed == expected
    assert Recipe(sigma=1.0).with_settings(["sigma=none", "drops="]) == Recipe(drops=())
    assert Recipe().with_settings(["hard_keypoints=8"]) == Recipe(hard_keypoints=8)
    assert get_recipe("cpn").with_settings(["hard_keypoints=none"]) == get_recipe("simple_baseline")
    assert Recipe().with_settings([]) == Recipe()
    assert Recipe().with_settings(["lr=1", "lr=2"]).lr == 2  # the last one counts


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "--set: must be NAME=VALUE, got 'lr'"),
        ("learning_rate=1", "--set: name must be one of epochs, batch_size, lr, drops,"),
        ("=1", "--set: name must be one of epochs"),
        ("augmentation=1", "--set: name must be one of epochs"),
        ("epochs=3.5", "--set: epochs must be an integer, got '3.5'"),
        ("lr=fast", "--set: lr must be a number, got 'fast'"),
        ("drops=3;7", "--set: drops must be integers separated by commas, got '3;7'"),
        ("sigma=wide", "--set: sigma must be a number or none, got 'wide'"),
        ("hard_keypoints=2.5", "--set: hard_keypoints must be an integer or none, got '2.5'"),
        ("lr=none", "--set: lr must be a number, got 'none'"),
        ("epochs=0", "recipe: epochs must be >= 1, got 0"),
        ("batch_size=-4", "recipe: batch_size must be >= 1, got -4"),
        ("lr=0", "recipe: lr must be > 0, got 0.0"),
        ("lr=nan", "recipe: lr must be > 0, got nan"),
        ("lr=inf", "recipe: lr must be > 0, got inf"),
        ("drops=-1", "recipe: drops must be epochs >= 0, got (-1,)"),
        ("drop_factor=2", "recipe: drop_factor must be in (0, 1], got 2.0"),
        ("schedule=linear", "recipe: schedule must be step, cosine or sgdr, got 'linear'"),
        ("optimizer=lion", "recipe: optimizer must be adam or sgd, got 'lion'"),
        ("cycle_epochs=0", "recipe: cycle_epochs must be > 0, got 0.0"),
        ("cycle_factor=0", "recipe: cycle_factor must be >= 1, got 0"),
        ("pretrained_trunk=1", "--set: pretrained_trunk must be true or false, got '1'"),
        ("accumulate=0", "recipe: accumulate must be 1..32, the batch_size, got 0"),
        ("accumulate=33", "recipe: accumulate must be 1..32, the batch_size, got 33"),
        ("clip_norm=0", "recipe: clip_norm must be > 0 or none, got 0.0"),
        ("ema_decay=1", "recipe: ema_decay must be >= 0 and < 1, got 1.0"),
        ("compile=yes", "--set: compile must be true or false, got 'yes'"),
        ("cutout=2", "augmentation: cutout must be 0..1, got 2.0"),
        ("warmup_steps=-1", "recipe: warmup_steps must be >= 0, got -1"),
        ("sigma=0", "recipe: sigma must be > 0, got 0.0"),
        ("sigma=inf", "recipe: sigma must be > 0, got inf"),
        ("precision=fp8", "recipe: precision must be auto, fp32, bf16 or fp16, got 'fp8'"),
        ("seed=-1", "recipe: seed must be >= 0 and < 2^63, got -1"),
        ("max_bad_steps=0", "recipe: max_bad_steps must be >= 1, got 0"),
        ("hard_keypoints=0", "recipe: hard_keypoints must be >= 1 or none, got 0"),
        ("flip_probability=1.5", "augmentation: flip_probability must be"),
        ("rotation_deg=nan", "augmentation: rotation_deg must be"),
    ],
)
def test_settings_that_are_refused(setting, message):
    with pytest.raises(InputError, match="^" + re.escape(message)):
        Recipe().with_settings([setting])


def test_to_dict_is_plain_and_complete():
    values = Recipe(sigma=2.5).to_dict()
    augmentation = values.pop("augmentation")
    assert Recipe(**values, augmentation=Augmentation(**augmentation)) == Recipe(sigma=2.5)


@pytest.mark.parametrize("name", RECIPES)
def test_toml_is_read_back(name):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    recipe = replace(get_recipe(name), sigma=2.5, warmup_steps=7)
    assert Recipe(seed=3).with_values(tomllib.loads(recipe.to_toml()), "file") == recipe


def test_values_of_a_file():
    values = {"lr": 1, "drops": [3, 7], "sigma": "none", "rotation_deg": 5, "augmentation": {"cutout": 0.5}}
    augmentation = Augmentation(rotation_deg=5.0, cutout=0.5)
    found = Recipe(sigma=1.0, seed=2).with_values(values, "file")
    assert found == Recipe(lr=1.0, drops=(3, 7), seed=2, augmentation=augmentation) and type(found.lr) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "file: name must be one of epochs, batch_size, lr, drops,"),
        ({"augmentation": {"lr": 1}}, "file: augmentation must hold scale, rotation_deg,"),
        ({"augmentation": 3}, "file: augmentation must be a table of its values, got 3"),
        ({"scale": 0.1, "augmentation": {"scale": 0.1}}, "file: each name must be given once, twice: ['scale']"),
        ({"epochs": 3.0}, "file: epochs must be an integer, got 3.0"),
        ({"epochs": True}, "file: epochs must be an integer, got True"),
        ({"lr": "1e-3"}, "file: lr must be a number, got '1e-3'"),
        ({"drops": 3}, "file: drops must be a list of integers, got 3"),
        ({"drops": [3, 4.5]}, "file: drops must be a list of integers, got [3, 4.5]"),
        ({"hard_keypoints": "all"}, "file: hard_keypoints must be an integer or none, got 'all'"),
        ({"lr": "none"}, "file: lr must be a number, got 'none'"),
        ({"pretrained_trunk": 1}, "file: pretrained_trunk must be true or false, got 1"),
        ({"schedule": 1}, "file: schedule must be a text, got 1"),
        ({"schedule": {"name": "step"}}, "file: schedule must be a text, got {'name': 'step'}"),
        ({"lr": float("nan")}, "recipe: lr must be > 0, got nan"),
    ],
)
def test_values_that_are_refused(values, message):
    with pytest.raises(InputError, match="^" + re.escape(message)):
        Recipe().with_values(values, "file")
