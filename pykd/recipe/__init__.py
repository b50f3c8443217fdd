"""Recipes: a YAML file that says what to compress, how, and how to prove it (see recipes/ for ready ones)."""

from __future__ import annotations

from pykd.recipe.load import RecipeLike, load_recipe, recipe_hash, recipe_yaml
from pykd.recipe.schema import Recipe

__all__ = ["Recipe", "RecipeLike", "load_recipe", "recipe_hash", "recipe_yaml"]
