"""Training networks: recipes, loss, the loop."""

from hrpose.train.fit import fit
from hrpose.train.recipe import RECIPES, Recipe, get_recipe

__all__ = ["RECIPES", "Recipe", "fit", "get_recipe"]
