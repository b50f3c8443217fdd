"""Layers of the router's deep branch: attention, feed-forward networks, and a gate that chooses among several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from pykd.models.router_config import RouterConfig
from pykd.models.sizes import HEADS, NEURONS, value_of

Activation = Callable[[Tensor], Tensor]

#: Whether a graph is being made for a model of another format (torch before 2.7 tells it from compiling by no name).
exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class Attention(nn.Module):
    """Bidirectional self-attention (Vaswani et al. 2017). (rows, positions, hidden) -> the same.

    mask (rows, 1, 1, positions): True where a position may be looked at.
    """

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.dropout = heads, hidden_size // heads, dropout
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        q, k, v = (
            layer(states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        found: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        return found


class FeedForward(nn.Module):
    """fc2(activation(fc1(x))); (tokens, hidden) -> the same."""

    def __init__(self, hidden_size: int, neurons: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, neurons)
        self.fc2 = nn.Linear(neurons, hidden_size)
        self.activation = activation

    def forward(self, states: Tensor) -> Tensor:
        """See the class."""
        found: Tensor = self.fc2(self.activation(self.fc1(states)))
        return found


def tokens_by_expert(chosen: Tensor, experts: int) -> Tensor:
    """How many tokens each expert has, (experts,), of the experts chosen for each."""
    return chosen.flatten().bincount(minlength=experts)


class Experts(nn.Module):
    """Several feed-forward networks, of which a gate chooses some for every token (Shazeer et al. 2017).

    y = sum over the chosen e of w_e FFN_e(x), w the gate's softmax over the chosen. An expert computes its tokens only;
    in a graph that is exported, where counts are not known, all experts compute all tokens and w is 0 for most.
    """

    def __init__(
        self, hidden_size: int, neurons: int, experts: int, experts_per_token: int, activation: Activation
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(hidden_size, neurons, activation) for _ in range(experts))
        self.experts_per_token = experts_per_token

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, hidden) -> the same, the balance loss (a scalar), and the experts of each token (tokens, chosen).

        The balance loss is that of Switch (Fedus et al. 2021, eq. 4): experts * sum_e f_e P_e, with the share f of the
        choices and the mean probability P; 1 when all are used alike, up to ``experts`` when one is.
        """
        likely = self.gate(states).float().softmax(-1)
        weights, chosen = likely.topk(self.experts_per_token, dim=-1)
        total = weights.sum(-1, keepdim=True)
        # Divided by itself a single weight is 1 with no gradient; the gate then learns by that of its logarithm.
        weights = weights / (total if self.experts_per_token > 1 else total.detach())
        if exporting():
            gates = torch.zeros_like(likely).scatter(-1, chosen, weights).to(states.dtype)
            mixed = sum(gates[:, n : n + 1] * expert(states) for n, expert in enumerate(self.experts))
            assert isinstance(mixed, Tensor)
            return mixed, likely.new_ones(()), chosen
        mixed = torch.zeros_like(states)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token) or self.training:  # in training every parameter has a gradient, for processes that add them
                part = expert(states[token]) * weights[token, place, None]
                mixed = mixed.index_add(0, token, part.to(mixed.dtype))
        tokens = tokens_by_expert(chosen, len(self.experts))
        shares = tokens / tokens.sum().clamp_min(1)
        return mixed, len(self.experts) * (shares * likely.mean(0)).sum(), chosen


class DeepLayer(nn.Module):
    """One transformer layer, normalised after each half as in BERT, whose feed-forward half may be several experts."""

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        neurons: int,
        activation: Activation,
        *,
        experts: int,
        experts_per_token: int,
        dropout: float,
        epsilon: float,
    ) -> None:
        super().__init__()
        self.attention = Attention(hidden_size, heads, dropout)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=epsilon)
        self.feed_forward: nn.Module
        if experts:
            self.feed_forward = Experts(hidden_size, neurons, experts, experts_per_token, activation)
        else:
            self.feed_forward = FeedForward(hidden_size, neurons, activation)
        self.output_norm = nn.LayerNorm(hidden_size, eps=epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, seen: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(rows, positions, hidden) -> the same, and what `Experts` gives beside it, None without experts.

        seen (rows, positions): True where a position is no padding; the others do not go through the experts, except in
        a graph that is exported.
        """
        states = self.attention_norm(states + self.dropout(self.attention(states, seen[:, None, None, :])))
        flat, balance, chosen = states.flatten(0, 1), None, None
        if not isinstance(self.feed_forward, Experts):
            added = self.feed_forward(flat)
        elif exporting():
            added, balance, chosen = self.feed_forward(flat)
        else:
            places = seen.flatten().nonzero().squeeze(1)
            part, balance, chosen = self.feed_forward(flat[places])
            added = torch.zeros_like(flat).index_copy(0, places, part.to(flat.dtype))
        return self.output_norm(states + self.dropout(added.view_as(states))), balance, chosen


class Body(nn.Module):
    """Everything that lies before the heads: the encoder, the deep layers, and the dense layer of each head."""

    def __init__(self, encoder: nn.Module, config: RouterConfig, branches: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        its: Any = config.encoder
        width, heads = its.hidden_size, value_of(its, HEADS) or 1
        activation = getattr(its, "hidden_act", None) or getattr(its, "activation", "gelu")
        self.deep = nn.ModuleList(
            DeepLayer(
                width,
                heads,
                config.expert_size or value_of(its, NEURONS) or 4 * width,
                ACT2FN[activation],
                experts=config.experts,
                experts_per_token=config.experts_per_token,
                dropout=config.dropout,
                epsilon=getattr(its, "layer_norm_eps", 1e-12),
            )
            for _ in range(config.deep_layers if "deep" in branches else 0)
        )
        self.dense = nn.ModuleDict({branch: nn.Linear(width, width) for branch in branches})
