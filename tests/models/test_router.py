"""The router: what it is made of, which rows each branch computes, and the threshold between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from pykd.models.adapter import auxiliary_losses, call, logits, num_classes
from pykd.models.huggingface import load_huggingface
from pykd.models.router import RouterConfig, RouterForSequenceClassification, calibrate, from_teacher, routed
from pykd.nn.slicing import feed_forward_blocks, keep_neurons

from .. import routers

EXACT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def router() -> Any:
    """Half of the held-out rows go deep."""
    model = routers.router()
    calibrate(model, [routers.batch(64)], deep_share=0.5)
    return model


def counted(model: nn.Module) -> dict[str, list[int]]:
    """Rows that each branch is called with from now on, tokens of the experts by their number."""
    seen: dict[str, list[int]] = {"fast": [], "deep": [], "experts": []}
    inner: Any = model
    inner.classifiers["fast"].register_forward_hook(lambda m, args, out: seen["fast"].append(len(args[0])))
    inner.body.deep[0].register_forward_hook(lambda m, args, out: seen["deep"].append(len(args[0])))
    for expert in inner.body.deep[0].feed_forward.experts:
        expert.register_forward_hook(lambda m, args, out: seen["experts"].append(len(args[0])))
    return seen


@pytest.mark.parametrize("experts", [0, 1, 3])
def test_the_deep_branch_of_a_teacher_gives_its_logits(experts: int) -> None:
    teacher, batch = routers.teacher(), routers.batch()
    model = routers.router(experts=experts).eval()
    with torch.no_grad(), routed(model, "deep"):
        torch.testing.assert_close(logits(model, batch), logits(teacher, batch), **EXACT)
    assert num_classes(model) == 2 and model.config.encoder.num_hidden_layers == 2 and len(model.body.deep) == 2


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "electra"])
def test_teachers_of_other_families(kind: str) -> None:
    tiny = {**routers.TINY, "model_type": kind}
    if kind == "distilbert":
        tiny = {"model_type": kind, "vocab_size": 40, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48}
    tiny["max_position_embeddings"] = 20
    teacher, batch = load_huggingface(None, num_labels=3, config=tiny).eval(), routers.batch()
    model = from_teacher(teacher, shared_layers=1, experts=2).eval()
    with torch.no_grad(), routed(model, "deep"):
        torch.testing.assert_close(logits(model, batch), logits(teacher, batch), **EXACT)


def test_each_branch_computes_its_own_rows_only(router: Any) -> None:
    batch, seen = routers.batch(), counted(router)
    with torch.no_grad():
        out = call(router, batch)
    deep = int(out.deep.sum())
    assert 0 < deep < 16 and seen["deep"] == [deep] and seen["fast"] == [16 - deep]
    tokens = int(batch["attention_mask"][out.deep].sum())  # none of the padding
    assert sum(seen["experts"]) == tokens * router.config.experts_per_token == int(out.expert_tokens[0].sum())


def test_a_branch_without_rows_is_not_called(router: Any) -> None:
    batch, seen = routers.batch(), counted(router)
    with torch.no_grad():
        router.config.threshold = 1e9
        assert not call(router, batch).deep.any() and seen == {"fast": [16], "deep": [], "experts": []}
        router.config.threshold = -1e9
        assert call(router, batch).deep.all() and seen["fast"] == [16] and seen["deep"] == [16]


def test_a_batch_is_answered_as_its_rows_one_by_one(router: Any) -> None:
    batch = routers.batch(32)
    with torch.no_grad():
        whole = call(router, batch)
        rows = [call(router, {k: v[n : n + 1][:, :length] if v.dim() > 1 else v[n : n + 1] for k, v in batch.items()})
                for n, length in enumerate(batch["attention_mask"].sum(1))]  # fmt: skip
        both = call(router, batch, output_branches=True)
    torch.testing.assert_close(whole.logits, torch.cat([row.logits for row in rows]), **EXACT)
    assert torch.equal(whole.deep, torch.cat([row.deep for row in rows]))
    torch.testing.assert_close(both.logits, whole.logits, **EXACT)
    chosen = both.branch_logits[torch.arange(32), whole.deep.long()]
    assert torch.equal(chosen, both.logits) and not torch.equal(chosen, both.branch_logits[:, 0])


def test_training_mixes_the_branches_and_every_parameter_learns(router: Any) -> None:
    router.train()
    for module in router.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    out = call(router, routers.batch())
    p = torch.sigmoid(out.scores - router.config.threshold)[:, None]
    mixed = (1 - p) * out.branch_logits[:, 0].softmax(-1) + p * out.branch_logits[:, 1].softmax(-1)
    torch.testing.assert_close(out.logits.exp(), mixed, **EXACT)
    own = auxiliary_losses(out)
    share = float(out.deep.float().mean())
    assert set(own) == {"load", "balance"} and own["load"].item() == pytest.approx(0.3 * (share - 0.5) ** 2)
    assert 0.005 < own["balance"].item() < 0.03  # 0.01 times about 1, all experts alike, to 3, one alone
    (out.logits[:, 0].sum() + sum(own.values())).backward()
    assert [name for name, p in router.named_parameters() if p.grad is None] == []


def test_labels_give_a_loss_with_the_models_own(router: Any) -> None:
    batch = routers.batch()
    out = router.train()(**batch)
    plain = nn.functional.cross_entropy(out.logits, batch["labels"])
    assert out.loss.item() == pytest.approx((plain + sum(out.auxiliary.values())).item())
    assert router.eval()(**batch).auxiliary is None and isinstance(router(**batch, return_dict=False), tuple)


def test_calibration_meets_the_share_and_is_kept_in_the_configuration() -> None:
    model, batches = routers.router().train(), [routers.batch(100), routers.batch(60)]
    for share in (0.1, 0.3, 0.75):
        threshold = calibrate(model, batches, deep_share=share)
        assert model.training and model.config.threshold == threshold and model.config.deep_share == share
        assert model.pykd_report[-1]["sent_deep"] == pytest.approx(share, abs=0.01)
    assert model.pykd_report[-1]["rows"] == 160


def test_the_options_that_an_ablation_takes_away() -> None:
    batch = routers.batch()
    whole = routers.router().eval()
    for routing in ("fast", "deep"):
        model = routers.router(routing=routing).eval()
        assert model.router is None and set(model.classifiers) == {routing}
        with torch.no_grad(), routed(whole, routing):
            torch.testing.assert_close(logits(model, batch), logits(whole, batch), **EXACT)
    assert "experts" not in routers.router(experts=0).parts() and "experts" in whole.parts()
    silent = routers.router(load_weight=0.0, balance_weight=0.0).train()
    assert auxiliary_losses(call(silent, batch)) == {}


def test_parts_hold_every_parameter_once() -> None:
    model = routers.router()
    parts = model.parts()
    found: list[Tensor] = [p for modules in parts.values() for module in modules for p in module.parameters()]
    assert list(parts) == ["shared encoder", "router", "fast branch", "deep branch", "experts"]
    assert sorted(map(id, found)) == sorted(map(id, model.parameters()))


def test_from_a_configuration_by_the_auto_classes() -> None:
    config = AutoConfig.for_model("pykd-router", encoder=routers.TINY, experts=2, num_labels=4)
    model = AutoModelForSequenceClassification.from_config(config)
    assert isinstance(model, RouterForSequenceClassification) and isinstance(config, RouterConfig)
    assert logits(model, routers.batch()).shape == (16, 4)
    small = from_teacher(routers.teacher(), expert_size=20, deep_layers=1)
    assert small.body.deep[0].feed_forward.experts[0].fc1.out_features == 20 and len(small.body.deep) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "slow"}, "unknown routing 'slow'"),
        ({"deep_layers": 0}, "deep_layers must be at least 1, got 0"),
        (
            {"experts": 2, "experts_per_token": 3},
            "got experts=2 and experts_per_token=3; experts=0 makes the deep branch dense",
        ),
        ({"deep_share": 1.0}, "deep_share must be above 0 and below 1, got 1.0"),
        ({"load_weight": -1.0}, "weights of losses are not negative, got load_weight=-1.0"),
    ],
)
def test_configurations_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterConfig(**options)


def test_what_cannot_be_done_is_said() -> None:
    model = routers.router(routing="deep")
    with pytest.raises(ValueError, match="has no router to calibrate"):
        calibrate(model, [routers.batch()])
    with pytest.raises(ValueError, match="built with routing='deep' and has no other branch"), routed(model, "fast"):
        pass
    with pytest.raises(ValueError, match="unknown routing 'slow'"), routed(routers.router(), "slow"):
        pass
    with pytest.raises(ValueError, match="deep_share must be above 0 and below 1, got 0"):
        calibrate(routers.router(), [routers.batch()], deep_share=0)
    with pytest.raises(ValueError, match="calibrate needs rows to score"):
        calibrate(routers.router(), [])
    with pytest.raises(ValueError, match="at most the teacher's 4, got 3 and 2"):
        from_teacher(routers.teacher(), shared_layers=3, deep_layers=2)
    with pytest.raises(ValueError, match="a router is made of a sequence classifier, unknown model type 'Linear'"):
        from_teacher(nn.Linear(2, 2))
    for task in ("token-classification", "masked-lm"):
        with pytest.raises(ValueError, match=r"sequence classifier, whose head its branches take over, got a BertFor"):
            from_teacher(load_huggingface(None, task, config=routers.TINY))
    with pytest.raises(ValueError, match="unknown option 'experts_per_tokn': did you mean 'experts_per_token'"):
        from_teacher(routers.teacher(), experts_per_tokn=1)
    with pytest.raises(ValueError, match="expert_size is some of the 48 neurons of the teacher's layers, got 49"):
        from_teacher(routers.teacher(), expert_size=49)
    cut = routers.teacher()
    keep_neurons(feed_forward_blocks(cut)[0], [0, 1])
    with pytest.raises(ValueError, match="make the router of the teacher as it was before pruning"):
        from_teacher(cut)
