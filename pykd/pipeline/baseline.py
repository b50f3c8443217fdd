"""The verb `baseline`: what a saved model's traffic will be held against, measured on data that is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykd.monitoring import measure_baseline
from pykd.pipeline.saved import data_of, load_saved
from pykd.recipe import RecipeLike


def baseline_saved(
    path: str | Path,
    output: str | Path,
    *,
    recipe: RecipeLike | None = None,
    overrides: Sequence[str] = (),
    name: str | None = None,
) -> dict[str, Any]:
    """Write the baseline of a saved classifier on the held-out data of ``recipe``, by default the one that made it.

    name: of the model in the service, by default its folder's. Returns what was measured. Raises what
    ``measure_baseline`` raises, and RecipeError where there is no recipe to take the data from.
    """
    folder = Path(path)
    found = measure_baseline(load_saved(folder), data_of(folder, recipe, overrides), name=name or folder.name)
    found.save(output)
    quantities = [f"{key} {values[0]:.4g} to {values[-1]:.4g}" for key, values in found.values.items()]
    return {"saved": str(output), "model": found.model, "rows": found.rows, "quantities": quantities}
