"""`prune`: remove what matters least, for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from pykd.calibration import Data
from pykd.pruning.channels import prune_channels
from pykd.pruning.layers import prune_layers
from pykd.pruning.magnitude import prune_magnitude
from pykd.pruning.options import check_prune
from pykd.pruning.outcome import Method, Request
from pykd.pruning.random_weights import prune_random
from pykd.pruning.sparsegpt import prune_sparsegpt
from pykd.pruning.units import prune_heads, prune_neurons
from pykd.pruning.wanda import prune_wanda
from pykd.training.record import recorded_change, require_finite_weights

Model = TypeVar("Model", bound=nn.Module)

#: Name -> method(model, request) -> outcome.
METHODS: dict[str, Method] = {
    "magnitude": prune_magnitude,
    "random": prune_random,
    "wanda": prune_wanda,
    "sparsegpt": prune_sparsegpt,
    "channels": prune_channels,
    "heads": prune_heads,
    "neurons": prune_neurons,
    "layers": prune_layers,
}


def prune(
    model: Model,
    method: str | Method = "magnitude",
    sparsity: float | None = None,
    *,
    scope: str | None = None,
    pattern: str | None = None,
    importance: str | None = None,
    data: Data | None = None,
    samples: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    example: Tensor | dict[str, Tensor] | None = None,
    rows: Sequence[int] | None = None,
) -> Model:
    """Prune ``model`` in place; returns it with a record in ``model.pykd_report``.

    Args:
        method: single weights of Linear and Conv2d layers: "magnitude", the smallest (Han et al. 2015); "random", the
            control; by the inputs on ``data``, layer after layer behind the pruned ones: "wanda" (Sun et al. 2023),
            "sparsegpt" (Frantar and Alistarh 2023), which also corrects the kept weights. Whole units, so that layers
            get smaller: "channels", "heads", "neurons", "layers". Or a function like those in METHODS.
        sparsity: share [0, 1) of the weights, or of the units of each group; 0.5 unless ``pattern`` says it.
        scope: the weights over which the share is met: "global", all layers together, "layer", or "row", each output.
            By default "global" for "magnitude" and "random", "row" for "wanda", "layer" for "sparsegpt".
        pattern: for methods of single weights: "2:4", "1:4" ..., so many kept of so many neighbouring inputs; "4x1",
            "16x16" ..., blocks of outputs and inputs that go together.
        importance: how units are scored: "l2" (default), "l1", "taylor" (Molchanov et al. 2019) or "activation", the
            last two on ``data``.
        data: examples for what looks at some, a DataBundle (its training split) or batches. Labels are read by "taylor"
            alone. samples: how many; batch_size: how many at once, from a DataBundle; seed: which, and any other draw.
        include, exclude: shell patterns of layer names; by default attention and feed-forward layers of a transformer,
            and of other networks all but the output head; never embeddings or norms.
        example: one batch that the model accepts, for tracing channels (default: one 64-pixel image).
        rows: how many rows of activations calls will have, as (1, 16, 128): each sparse layer then measures on this
            machine whether it is faster sparse or dense and computes that way from then on; its gain, or "no gain here:
            computed dense", is in the record, and files are sparse either way. Without it thresholds decide.

    The pruned model trains on; optimizers must be made anew. Movement pruning, and sparsity that rises during training,
    are `Gradual`.

    Raises ValueError for an unknown method, an option that the method does not read, a sparsity out of range, patterns
    that match nothing, NaN weights, or a model that has no such units; DataError for a method without the data that it
    looks at. The model is then unchanged, but for NaN that calibration meets half way.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prune(model, sparsity=0.75)[0]
    SparseLinear(in_features=8, out_features=8, bias=True, sparsity=0.750)
    """
    options = {"scope": scope, "pattern": pattern, "importance": importance, "rows": rows}
    share, groups = check_prune(method, sparsity, **options)
    apply = method if callable(method) else METHODS[method]
    require_finite_weights(model, "model")
    request = Request(
        share,
        include=include,
        exclude=exclude,
        example=example,
        rows=rows,
        scope=scope,
        pattern=groups,
        importance=importance or "l2",
        data=data,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
    )
    name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
    given = {"include": include, "exclude": exclude, "rows": rows}
    lists = {key: None if value is None else list(value) for key, value in given.items()}
    parameters = {"sparsity": share, "scope": scope, "pattern": pattern, "importance": importance, **lists}
    with recorded_change(model, stage="prune", method=name, parameters=parameters) as facts:
        outcome = apply(model, request)
        facts.update(changed=outcome.changed, skipped=outcome.skipped)
        if any(len(unit) > 1 for unit in outcome.units):
            facts["units"] = outcome.units
    return model
