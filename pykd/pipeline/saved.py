"""Single steps on saved models, as the command line offers them: evaluate, prune, quantize, compress."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pykd.data import DataBundle
from pykd.errors import ArtifactError, RecipeError
from pykd.evaluation import Report, evaluate
from pykd.evaluation.counting import count_parameters, saved_bytes
from pykd.io.load import from_pretrained
from pykd.io.manifest import MANIFEST, read_manifest
from pykd.io.save import CONFIG, save_pretrained
from pykd.models.example import example_batch
from pykd.models.huggingface import TASKS, load_huggingface
from pykd.nn.linear_8bit import STATIC
from pykd.pipeline.compress import compress_to
from pykd.pipeline.sources import build_data
from pykd.pipeline.target import Target
from pykd.pruning import check_prune, looks_at_data, prune
from pykd.quantization import METHODS, check_embeddings, check_method, quantize
from pykd.recipe import RecipeLike, load_recipe

#: How architectures end that are called otherwise than the class that loads them -> their task.
OTHER_ENDS = {"ForConditionalGeneration": "seq2seq-lm", "LMHeadModel": "causal-lm"}


def load_saved(path: str | Path) -> nn.Module:
    """Load a folder that pykd saved, checksums checked, or a local Hugging Face folder.

    Raises ArtifactError or ModelLoadError.
    """
    folder = Path(path)
    if (folder / MANIFEST).exists() or not (folder / CONFIG).exists():
        return from_pretrained(folder)
    return load_huggingface(str(folder), _task(folder), local_files_only=True, trust_remote_code=False).eval()


def evaluate_saved(
    path: str | Path,
    *,
    recipe: RecipeLike | None = None,
    overrides: Sequence[str] = (),
    batch_size: int = 64,
    latency_rounds: int = 50,
) -> Report:
    """Measure a saved model on the held-out data of ``recipe``, by default the recipe that made the model.

    A tokenizer that was saved with the model is used. Raises RecipeError when there is no recipe to take the data from.
    """
    folder = Path(path)
    model = load_saved(folder)
    data = data_of(folder, recipe, overrides)
    return evaluate(model, data, name=folder.name, batch_size=batch_size, latency_rounds=latency_rounds, path=folder)


def prune_saved(
    path: str | Path,
    output: str | Path,
    *,
    recipe: RecipeLike | None = None,
    overrides: Sequence[str] = (),
    method: str = "magnitude",
    sparsity: float | None = None,
    samples: int = 256,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Load, prune (options as for :func:`pykd.prune`), save to ``output``; returns what changed.

    What looks at data is given the training split of ``recipe``, by default of the recipe that made the model. Raises
    RecipeError when there is no recipe to take the data from.
    """
    check_prune(method, sparsity, **options)

    def verb(model: nn.Module) -> None:
        looks = looks_at_data(method, options.get("importance"))
        data = data_of(Path(path), recipe, overrides) if looks else None
        given = {"samples": samples, "include": include, "exclude": exclude, **options}
        prune(model, method, sparsity, data=data, example=example_of(model, Path(path)), **given)

    return _rewrite(Path(path), Path(output), verb)


def quantize_saved(
    path: str | Path,
    output: str | Path,
    *,
    recipe: RecipeLike | None = None,
    overrides: Sequence[str] = (),
    method: str = "rtn",
    **options: Any,
) -> dict[str, Any]:
    """Load, quantize (options as for :func:`pykd.quantize`), save to ``output``; returns what changed.

    A method or scheme that looks at data is given the training split of ``recipe``, by default of the recipe that made
    the model. Raises RecipeError when there is no recipe to take the data from.
    """
    check_method(options.get("scheme", "w4a16"), method, symmetric=options.get("symmetric", True))
    check_embeddings(options.get("embeddings"))
    calibrated = METHODS[method].calibrated or options.get("scheme") == STATIC

    def verb(model: nn.Module) -> None:
        data = data_of(Path(path), recipe, overrides) if calibrated else None
        quantize(model, method=method, data=data, **options)

    return _rewrite(Path(path), Path(output), verb)


def compress_saved(
    path: str | Path,
    output: str | Path,
    target: Mapping[str, float],
    *,
    recipe: RecipeLike | None = None,
    overrides: Sequence[str] = (),
    **options: Any,
) -> tuple[bool, dict[str, Any]]:
    """Load, `compress_to` the target (its options), save to ``output``/model; whether it is met, and what came of it.

    The data are those of ``recipe``, by default of the recipe that made the model. Raises RecipeError when there is
    none, and as `compress_to` does.
    """
    goal, folder = Target.of(target), Path(output)
    data = data_of(Path(path), recipe, overrides)
    found = compress_to(load_saved(path), goal, data, output_dir=folder, **options)
    provenance = {**provenance_of(Path(path)), "made_from": str(path)}
    saved = folder / "model"
    save_pretrained(found.model, saved, tokenizer=tokenizer_of(Path(path)), provenance=provenance, overwrite=True)
    best, base = found.best.report, found.base
    return found.met, {
        "result": found.sentence,
        "saved": str(saved),
        "bytes": f"{base.size_bytes:,} -> {best.size_bytes:,} ({base.size_bytes / best.size_bytes:.2f}x smaller)",
        "quality": f"{best.headline()}, was {base.headline()}",
        "P95": f"{best.latency_p95_ms:.2f} ms, was {base.latency_p95_ms:.2f}",
        "front": [one.report.name for one in found.front],
        "report": str(folder / "report.html"),
    }


def example_of(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """An input the model accepts: token numbers for text, an image of the size it was made for."""
    made_for = provenance_of(folder).get("data", {}).get("preprocessing", {})
    return example_batch(model, image_size=made_for.get("image_size"), channels=made_for.get("channels"))


def _rewrite(path: Path, output: Path, verb: Callable[[nn.Module], None]) -> dict[str, Any]:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArtifactError(f"{output} already exists: choose a new folder to write to")
    model = load_saved(path)
    before, _ = count_parameters(model)
    verb(model)
    provenance = {**provenance_of(path), "made_from": str(path)}
    save_pretrained(model, output, tokenizer=tokenizer_of(path), provenance=provenance)
    after, nonzero = count_parameters(model)
    old, new = saved_bytes(path), saved_bytes(output)
    return {
        "saved": str(output),
        "bytes": f"{old:,} -> {new:,} ({old / new:.2f}x smaller)",
        "parameters": f"{before:,} -> {after:,}, {nonzero:,} of them not zero",
    }


def data_of(folder: Path, recipe: RecipeLike | None, overrides: Sequence[str]) -> DataBundle:
    """The data of ``recipe``, or of the recipe that made the model, read by the tokenizer saved with it."""
    recipe = provenance_of(folder).get("recipe") if recipe is None else recipe
    if recipe is None:
        raise RecipeError(f"{folder} does not say which data it was made for: name it by --recipe FILE")
    own = str(folder) if (folder / "tokenizer_config.json").exists() else None
    return build_data(load_recipe(recipe, overrides=overrides), tokenizer=own)


def provenance_of(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder says about its origin; nothing where pykd did not save it."""
    return dict(read_manifest(folder).get("provenance", {})) if (folder / MANIFEST).exists() else {}


def tokenizer_of(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _task(folder: Path) -> str:
    """The task whose auto class fits the architecture that a Hugging Face folder names."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / CONFIG} cannot be read as JSON ({error}); copy the folder again") from None
    names = (config.get("architectures") if isinstance(config, dict) else None) or ["none"]
    if not isinstance(config, dict) or not isinstance(names, list) or not isinstance(names[0], str):
        raise ArtifactError(f"{folder / CONFIG} is no configuration of a model; copy the folder again")
    ends = {auto.removeprefix("AutoModel"): task for task, auto in TASKS.items() if auto != "AutoModel"} | OTHER_ENDS
    return next((task for end, task in ends.items() if names[0].endswith(end)), "feature-extraction")
