"""`prune`: remove what matters least, for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from pykd.errors import nearest
from pykd.pruning.channels import prune_channels
from pykd.pruning.layers import prune_layers
from pykd.pruning.magnitude import prune_magnitude
from pykd.pruning.outcome import Method, Request
from pykd.pruning.units import prune_heads, prune_neurons
from pykd.training.record import recorded_change, require_finite_weights

Model = TypeVar("Model", bound=nn.Module)

#: Name -> method(model, request) -> outcome.
METHODS: dict[str, Method] = {
    "magnitude": prune_magnitude,
    "channels": prune_channels,
    "heads": prune_heads,
    "neurons": prune_neurons,
    "layers": prune_layers,
}


def prune(
    model: Model,
    method: str | Method = "magnitude",
    sparsity: float = 0.5,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    example: Tensor | dict[str, Tensor] | None = None,
    rows: Sequence[int] | None = None,
) -> Model:
    """Prune ``model`` in place; returns it with a record in ``model.pykd_report``.

    method: "magnitude" removes single weights of Linear and Conv2d layers, the smallest of all layers together;
    "channels", "heads" and "neurons" remove whole units, so that the layers get smaller; "layers" removes whole layers
    of a transformer; or a function like those in METHODS. sparsity: share [0, 1) of the weights, or of the units of
    each group. include, exclude: shell patterns of layer names; by default all but embeddings, norms and output heads.
    example: one batch that the model accepts, for tracing channels (default: one 64-pixel image). rows, with
    "magnitude": how many rows of activations calls will have, as (1, 16, 128): each sparse layer then measures on this
    machine whether it is faster sparse or dense and computes that way from then on; its gain, or "no gain here:
    computed dense", is in the record, and files are sparse either way. Without it thresholds decide. The pruned model
    trains on; optimizers must be made anew.

    Raises ValueError for an unknown method, a sparsity out of range, patterns that match nothing, NaN weights, or a
    model that has no such units; the model is then unchanged.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prune(model, sparsity=0.75)[0]
    SparseLinear(in_features=8, out_features=8, bias=True, sparsity=0.750)
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share removed, at least 0 and below 1, got {sparsity!r}")
    if not callable(method) and method not in METHODS:
        raise ValueError(nearest("method", method, METHODS))
    apply = method if callable(method) else METHODS[method]
    if rows is not None and method != "magnitude" and not callable(method):
        raise ValueError(f"rows goes with method='magnitude', whose layers are sparse; {method!r} leaves them dense")
    require_finite_weights(model, "model")
    request = Request(sparsity, include, exclude, example, rows)
    name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
    parameters = {
        "sparsity": sparsity,
        "rows": None if rows is None else list(rows),
        "include": None if include is None else list(include),
        "exclude": None if exclude is None else list(exclude),
    }
    with recorded_change(model, stage="prune", method=name, parameters=parameters) as facts:
        outcome = apply(model, request)
        facts.update(changed=outcome.changed, skipped=outcome.skipped)
    return model
