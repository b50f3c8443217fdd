"""Each loss beside the same formula written out in plain torch, with its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pykd.distillation.attention import attention_loss
from pykd.distillation.contrastive import contrastive_loss
from pykd.distillation.hidden import hidden_loss
from pykd.distillation.methods import METHODS, Method, resolve
from pykd.distillation.on_policy import on_policy_loss
from pykd.distillation.relation import relation_loss
from pykd.distillation.sequence import sequence_loss


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def test_hidden_states_count_where_the_mask_says() -> None:
    mine, its = [leaf(2, 3, 4), leaf(2, 3, 4)], [torch.randn(2, 3, 4), torch.randn(2, 3, 4)]
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = hidden_loss(mine, its, [mask, None])
    want = (F.mse_loss(mine[0][mask], its[0][mask]) + F.mse_loss(mine[1], its[1])) / 2
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert mine[0].grad is not None and mine[0].grad[~mask].eq(0).all() and mine[0].grad[mask].ne(0).all()
    maps = [torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)]
    torch.testing.assert_close(hidden_loss(maps[:1], maps[1:], [None]), F.mse_loss(*maps))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert hidden_loss(mine[:1], its[:1], [nothing]).item() == 0


def test_attention_is_a_divergence_of_maps() -> None:
    scores, wanted = leaf(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    causal = torch.full((4, 4), -torch.inf).triu(1)
    mine, its = (scores + causal).softmax(-1), (wanted + causal).softmax(-1)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    rows = (its * (its.clamp_min(1e-30).log() - mine.clamp_min(1e-30).log())).sum(-1)
    want = rows.transpose(1, 2)[mask].mean()
    loss = attention_loss([mine], [its], [mask])
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and scores.grad[0].ne(0).any()
    torch.testing.assert_close(attention_loss([its], [its], [None]), torch.tensor(0.0))
    one = attention_loss([mine.detach()], [its[:, :1]], [None])  # other heads: means over heads are compared
    mean = mine.detach().mean(1)
    torch.testing.assert_close(
        one, (its[:, 0] * (its[:, 0].clamp_min(1e-30).log() - mean.clamp_min(1e-30).log())).sum(-1).mean()
    )


def test_attention_undoes_dropout() -> None:
    its = torch.tensor([[[[0.25, 0.25, 0.5]]]])
    dropped = torch.tensor([[[[0.5, 0.0, 1.0]]]])  # half of what remains was scaled by 2
    s = torch.tensor([1 / 3, 2 / 3])
    want = (torch.tensor([0.25, 0.5]) * (torch.tensor([0.25, 0.5]) / s).log()).sum()
    torch.testing.assert_close(attention_loss([dropped], [its], [None]), want)


def test_relations_of_rows() -> None:
    mine, its = leaf(5, 4), torch.randn(5, 7)
    s, t = torch.pdist(mine), torch.pdist(its)
    distances = F.smooth_l1_loss(s / s.mean(), t / t.mean())

    def angles(x: Tensor) -> Tensor:
        found = [
            F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0) if i != j and k != j else x.sum() * 0
            for j in range(5) for i in range(5) for k in range(5)
        ]  # fmt: skip
        return torch.stack(found)

    want = distances + 2 * F.smooth_l1_loss(angles(mine), angles(its))
    loss = relation_loss(mine, its)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert mine.grad is not None and mine.grad.isfinite().all() and mine.grad.ne(0).all()
    torch.testing.assert_close(relation_loss(mine, its, angle=0.0), distances)
    assert relation_loss(mine[:1], its[:1]).item() == 0
    same = torch.ones(3, 4, requires_grad=True)
    relation_loss(same, its[:3]).backward()
    assert same.grad is not None and same.grad.isfinite().all()  # equal rows have no direction, and no NaN


def test_rows_told_apart() -> None:
    mine, its = leaf(4, 6), torch.randn(4, 6)
    cosines = torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in its]) for a in mine])
    want = -(cosines / 0.2).log_softmax(1).diagonal().mean()
    loss = contrastive_loss(mine, its, sharpness=0.2)
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert mine.grad is not None and mine.grad.ne(0).all()


@pytest.mark.parametrize("shift", [False, True])
def test_sequences(shift: bool) -> None:
    mine, its = leaf(2, 3, 5), torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 2, -100], [4, -100, -100]])
    moved = (mine[:, :-1], its[:, :-1], labels[:, 1:]) if shift else (mine, its, labels)
    keep = moved[2] != -100
    p, q = moved[0][keep].softmax(1), moved[1][keep].softmax(1)
    mixture = 0.3 * q + 0.7 * p
    jsd = (0.3 * q * (q / mixture).log() + 0.7 * p * (p / mixture).log()).sum(1).mean()
    torch.testing.assert_close(on_policy_loss(mine, its, labels, beta=0.3, shift=shift), jsd)
    loss = sequence_loss(mine, labels, shift=shift)
    torch.testing.assert_close(loss, F.cross_entropy(moved[0][keep], moved[2][keep]))
    loss.backward()
    assert mine.grad is not None and mine.grad.ne(0).any()


# Names and weights.


def test_methods_are_found_by_name_function_and_weight() -> None:
    def mine(*_: Tensor, **__: float) -> Tensor:
        return torch.zeros(())

    found = resolve({"logits": 1, "contrastive": {"weight": 0.1, "sharpness": 0.5}, mine: 2.0})
    assert [(each.name, each.weight) for each in found] == [("logits", 1.0), ("contrastive", 0.1), ("mine", 2.0)]
    assert found[1].method.options == {"sharpness": 0.5} and found[2].method.compares == "logits"
    own = Method(hidden_loss, "hidden", projected=True)
    assert resolve(own)[0].method.projected and resolve(own)[0].name == "hidden_loss"
    assert METHODS["contrastive"].options == {}


def test_methods_that_do_not_exist() -> None:
    for methods, message in [
        ("hiden", "unknown method 'hiden': did you mean 'hidden'"),
        ({}, "no method to distil by: name some of logits, hidden"),
        ({"logits": 0}, "the weight of method 'logits' must be a positive number, got 0"),
        ({"logits": {"weight": 1.0, "beta": 0.5}}, "method 'logits': unknown option 'beta': Known: alpha, shift, temp"),
        ({"hidden": {"angel": 1.0}}, "method 'hidden': unknown option 'angel': Known: weight"),
        ({"relation": {"angel": 1.0}}, "method 'relation': unknown option 'angel': did you mean 'angle'"),
        ({"sequence": {"beam": 2}}, "method 'sequence': unknown option 'beam': did you mean 'beams'"),
        ({"hidden": {"weight": "much"}}, "the weight of method 'hidden' must be a positive number, got 'much'"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve(methods)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown comparison 'states'"):
        Method(hidden_loss, "states")
