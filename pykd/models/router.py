"""The dual-branch router: a shared encoder, and behind it a fast branch for most rows, a deep one for difficult rows.

A Hugging Face family of pykd's own (`model_type` "pykd-router"). Importing this module registers it with
AutoModelForSequenceClassification; pykd.io.import_hook does so once transformers has that class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForSequenceClassification
from transformers.utils import ModelOutput

from pykd.models.router_config import RouterConfig
from pykd.models.router_layers import Body, exporting, tokens_by_expert
from pykd.models.router_teacher import from_teacher
from pykd.models.router_threshold import calibrate, routed

__all__ = ["RouterConfig", "RouterForSequenceClassification", "RouterOutput", "calibrate", "from_teacher", "routed"]


@dataclass
class RouterOutput(ModelOutput):  # type: ignore[misc]
    """What a pass gives.

    logits (rows, classes). scores (rows,): difficulty, None without a router. deep (rows,): True where a row went
    deep. branch_logits (rows, 2, classes): of both branches, fast first, where both ran on every row. auxiliary: the
    model's own losses, weighted, in training. expert_tokens (deep layers, experts): tokens that each expert computed.
    expert_choices (deep layers, tokens, experts per token): which ones computed each token of the deep rows; in a graph
    that is exported the padding counts as tokens here.
    loss: cross entropy of the labels and the auxiliary losses, where labels were given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None
    deep: Tensor | None = None
    branch_logits: Tensor | None = None
    auxiliary: dict[str, Tensor] | None = None
    expert_tokens: Tensor | None = None
    expert_choices: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class RouterForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """A classifier of texts that spends more on difficult ones.

    The shared encoder reads a text; from the state of its first token the router scores how difficult it is. Rows with
    a score above ``config.threshold`` go through the deep branch, transformer layers whose feed-forward half is a
    mixture of experts; all others are answered by the fast branch, a small head. Each branch computes its rows only.

    In training both branches compute every row, and the answer is the mixture (Jacobs et al. 1991)
    (1 - p) softmax(fast) + p softmax(deep) with p = sigmoid(score - threshold), as log probabilities: the router learns
    where the deep branch is worth it. Two losses of its own come with it: "load", the squared distance of the share of
    rows sent deep from ``config.deep_share``, and "balance" over the experts. `pykd.distill` and `pykd.finetune` add
    them to theirs; with ``labels`` they are part of ``loss``.
    """

    config_class = RouterConfig
    config: RouterConfig
    base_model_prefix = "body"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    one_stream = True  # for pykd.models.layers: the deep layers go on where the shared ones end
    _supports_sdpa = True

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        encoder: Any = AutoModel.from_config(config.encoder)
        encoder.pooler = None  # BERT's, which the heads replace; others have none
        config.encoder = encoder.config
        branches = {"fast": ("fast",), "deep": ("deep",)}.get(config.routing, ("fast", "deep"))
        self.body = Body(encoder, config, branches)
        width = config.encoder.hidden_size
        self.router = (
            nn.Sequential(nn.Linear(width, config.router_size), nn.GELU(), nn.Linear(config.router_size, 1))
            if len(branches) == 2
            else None
        )
        self.classifiers = nn.ModuleDict({branch: nn.Linear(width, config.num_labels) for branch in branches})
        self.activation, self.dropout = ACT2FN[config.activation], nn.Dropout(config.dropout)
        self.routing = config.routing  # what `routed` changes for a while
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As transformers does; the router so that its scores spread from the beginning."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and self.router is not None and module in list(self.router):
            init.normal_(module.weight, std=module.in_features**-0.5)

    def get_input_embeddings(self) -> Any:
        """The shared encoder's."""
        encoder: Any = self.body.encoder
        return encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The shared encoder's."""
        encoder: Any = self.body.encoder
        encoder.set_input_embeddings(value)

    def parts(self) -> dict[str, list[nn.Module]]:
        """The model's parts by name: shared encoder, router, fast branch, deep branch without its experts, experts."""
        experts: list[nn.Module] = [m for layer in self.body.deep for m in getattr(layer.feed_forward, "experts", ())]
        inside = {id(module) for expert in experts for module in expert.modules()}
        deep = [
            m for layer in self.body.deep for m in layer.modules() if not list(m.children()) and id(m) not in inside
        ]
        heads = {name: [self.body.dense[name], self.classifiers[name]] for name in self.classifiers}
        found: dict[str, list[nn.Module]] = {
            "shared encoder": [self.body.encoder],
            "router": [self.router] if self.router is not None else [],
            "fast branch": heads.get("fast", []),
            "deep branch": [*deep, *heads.get("deep", [])],
            "experts": experts,
        }
        return {name: modules for name, modules in found.items() if modules}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_branches: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """See :class:`RouterOutput`. output_branches, output_hidden_states: both branches compute every row, whoever
        answers it; hidden states are the embeddings, then the shared layers', then the deep layers'."""
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "inputs_embeds": inputs_embeds}
        given = {name: value for name, value in given.items() if value is not None}
        encoded = self.body.encoder(input_ids, **given, output_hidden_states=output_hidden_states)
        states = encoded.last_hidden_state
        seen = attention_mask.bool() if attention_mask is not None else states.new_ones(states.shape[:2]).bool()
        first = states[:, 0]
        out: dict[str, Any] = {"auxiliary": {}, "hidden_states": encoded.hidden_states}
        if self.router is not None:
            out["scores"] = self.router(first).squeeze(-1).float()
        if self.router is None or self.routing != "learned":
            self._one(out, first, states, seen)
        elif self.training or output_branches or output_hidden_states:
            self._both(out, first, states, seen)
        else:
            self._split(out, first, states, seen)
        if labels is not None:
            out["loss"] = F.cross_entropy(out["logits"].float(), labels) + sum(out["auxiliary"].values())
        made = RouterOutput(**{**out, "auxiliary": out["auxiliary"] or None})
        return made if return_dict else made.to_tuple()

    def _one(self, out: dict[str, Any], first: Tensor, states: Tensor, seen: Tensor) -> None:
        """Every row through the only branch, or the one that was asked for."""
        deep = self.routing == "deep"
        out["logits"] = self._deep(out, states, seen) if deep else self._head("fast", first)
        out["deep"] = torch.full_like(seen[:, 0], deep)

    def _both(self, out: dict[str, Any], first: Tensor, states: Tensor, seen: Tensor) -> None:
        """Every row through both branches: mixed in training, else each row's own."""
        branches = torch.stack([self._head("fast", first), self._deep(out, states, seen)], dim=1).float()
        margin = out["scores"] - self.config.threshold
        deep = margin > 0
        out |= {"branch_logits": branches, "deep": deep}
        if not self.training:
            out["logits"] = torch.where(deep[:, None], branches[:, 1], branches[:, 0])
            return
        shares = torch.stack([F.logsigmoid(-margin), F.logsigmoid(margin)], dim=1)
        out["logits"] = torch.logsumexp(branches.log_softmax(-1) + shares[..., None], dim=1)
        if self.config.load_weight:
            # The share that really goes deep, with a gradient that never vanishes: that of the mean score.
            share = deep.float().mean() + (margin - margin.detach()).mean()
            out["auxiliary"]["load"] = self.config.load_weight * (share - self.config.deep_share).square()

    def _split(self, out: dict[str, Any], first: Tensor, states: Tensor, seen: Tensor) -> None:
        """Each row through its own branch."""
        out["deep"] = out["scores"] - self.config.threshold > 0
        deep, fast = (rows.nonzero().squeeze(1) for rows in (out["deep"], ~out["deep"]))
        found = first.new_zeros(first.shape[0], self.num_labels)
        traced = exporting()  # then nobody knows yet how many rows there are
        if traced or len(fast):
            found = found.index_copy(0, fast, self._head("fast", first[fast]).to(found.dtype))
        if traced or len(deep):
            found = found.index_copy(0, deep, self._deep(out, states[deep], seen[deep]).to(found.dtype))
        out["logits"] = found

    def _head(self, branch: str, first: Tensor) -> Tensor:
        hidden = self.activation(self.body.dense[branch](self.dropout(first)))
        found: Tensor = self.classifiers[branch](self.dropout(hidden))
        return found

    def _deep(self, out: dict[str, Any], states: Tensor, seen: Tensor) -> Tensor:
        """Logits of the deep branch; notes in ``out`` the experts' loss and use, and the states if they are wanted."""
        balances, choices = [], []
        for layer in self.body.deep:
            states, balance, chosen = layer(states, seen)
            if balance is not None:
                balances.append(balance)
                choices.append(chosen)
            if out["hidden_states"] is not None:
                out["hidden_states"] = (*out["hidden_states"], states)
        if choices:
            out["expert_choices"] = torch.stack(choices)
            if not exporting():  # a graph has no use for counts
                number = self.config.experts
                out["expert_tokens"] = torch.stack([tokens_by_expert(own, number) for own in choices])
        if self.training and balances and self.config.balance_weight:
            out["auxiliary"]["balance"] = self.config.balance_weight * torch.stack(balances).mean()
        return self._head("deep", states[:, 0])


AutoModelForSequenceClassification.register(RouterConfig, RouterForSequenceClassification, exist_ok=True)
