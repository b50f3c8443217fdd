"""The configuration of the dual-branch router, and its place in transformers' AutoConfig.

Importing this module registers it; pykd.io.import_hook does so once transformers' table of configurations is there.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from pykd.errors import nearest

#: Who decides which branch a row takes: the router, or nobody.
ROUTINGS = ("learned", "fast", "deep")


class RouterConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes and losses of a :class:`pykd.models.router.RouterForSequenceClassification`.

    Args:
        encoder: configuration (or a dict with its ``model_type``) of the shared encoder: BERT, RoBERTa, ELECTRA,
            DistilBERT and their like. The branches take its width, heads and activation.
        deep_layers: transformer layers of the deep branch. experts: feed-forward networks in each of them; 0 makes it
            one dense network. experts_per_token: how many of them each token goes through. expert_size: neurons of an
            expert, by default those of the encoder's layers.
        router_size: hidden neurons of the router.
        routing: "learned"; "fast" or "deep" builds that branch alone, without a router.
        deep_share: share of the rows, 0..1, that the deep branch is meant for.
        load_weight, balance_weight: weights of the load loss over the rows and of the balance loss over the experts.
        threshold: rows whose score is above it go deep; see :func:`pykd.models.router.calibrate`.
        activation, dropout: of the heads. initializer_range: spread of new weights.

    Raises ValueError for numbers out of range and an unknown routing.

    >>> RouterConfig(encoder={"model_type": "bert", "hidden_size": 32}, experts=2).encoder.hidden_size
    32
    """

    model_type = "pykd-router"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "scores", "deep", "branch_logits", "auxiliary", "expert_tokens", "expert_choices", "hidden_states",
    ]  # fmt: skip

    def __init__(
        self,
        encoder: Any = None,
        *,
        deep_layers: int = 2,
        experts: int = 4,
        experts_per_token: int = 2,
        expert_size: int | None = None,
        router_size: int = 64,
        routing: str = "learned",
        deep_share: float = 0.3,
        load_weight: float = 0.3,
        balance_weight: float = 0.01,
        threshold: float = 0.0,
        activation: str = "tanh",
        dropout: float = 0.1,
        initializer_range: float = 0.02,
        **options: Any,
    ) -> None:
        if encoder is None or isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**{"model_type": "bert", **(encoder or {})})
        self.encoder = encoder
        self.deep_layers, self.experts, self.experts_per_token, self.expert_size = (
            deep_layers,
            experts,
            experts_per_token,
            expert_size,
        )
        self.router_size, self.routing, self.deep_share = router_size, routing, deep_share
        self.load_weight, self.balance_weight, self.threshold = load_weight, balance_weight, threshold
        self.activation, self.dropout, self.initializer_range = activation, dropout, initializer_range
        self._check()
        super().__init__(**options)

    def _check(self) -> None:
        if self.routing not in ROUTINGS:
            raise ValueError(nearest("routing", self.routing, ROUTINGS))
        counts = {"deep_layers": self.deep_layers, "router_size": self.router_size}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if self.experts < 0 or (self.experts and not 1 <= self.experts_per_token <= self.experts):
            raise ValueError(
                f"a token goes through one to all of the experts, got experts={self.experts!r} and "
                f"experts_per_token={self.experts_per_token!r}; experts=0 makes the deep branch dense"
            )
        if not 0 < self.deep_share < 1:
            raise ValueError(f"deep_share must be above 0 and below 1, got {self.deep_share!r}: see routing for all")
        if self.load_weight < 0 or self.balance_weight < 0:
            raise ValueError(
                f"weights of losses are not negative, got load_weight={self.load_weight!r} and "
                f"balance_weight={self.balance_weight!r}"
            )

    def get_text_config(self, *args: Any, **options: Any) -> Any:
        """The encoder's: what knows the vocabulary."""
        return self.encoder


AutoConfig.register(RouterConfig.model_type, RouterConfig, exist_ok=True)
