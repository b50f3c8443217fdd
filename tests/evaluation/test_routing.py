"""What a report says of a router: shares, branches, classes, experts, parts and the files that show them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pykd import compare, evaluate
from pykd.data.bundle import batches
from pykd.evaluation import Report, write_report
from pykd.evaluation.routing import Routing, measure_routing
from pykd.models.adapter import call, logits
from pykd.models.router import calibrate, routed

from .. import routers


@pytest.fixture(scope="module")
def report() -> Report:
    model = routers.router().eval()
    calibrate(model, batches(routers.data().test, routers.data().collate, 100))
    return evaluate(model, routers.data(), name="router", latency_rounds=5)


def test_the_split_is_counted_by_class_and_by_score(report: Report) -> None:
    routing = report.routing
    assert routing is not None and routing.deep_share == pytest.approx(0.3, abs=0.005)
    assert sum(each.rows for each in routing.labels) == 400 and [each.name for each in routing.labels] == ["no", "yes"]
    assert sum(each.deep for each in routing.labels) == round(400 * routing.deep_share) == sum(routing.deep_counts)
    assert sum(routing.fast_counts) + sum(routing.deep_counts) == 400
    below = [high <= routing.threshold for high in routing.edges[1:]]
    assert not any(count for count, low in zip(routing.deep_counts, below, strict=True) if low)


def test_each_branch_is_judged_on_all_rows_and_on_its_own(report: Report) -> None:
    routing, data, model = report.routing, routers.data(), routers.router().eval()
    assert routing is not None
    for routing_name, accuracy in (("fast", routing.fast_accuracy), ("deep", routing.deep_accuracy)):
        with torch.no_grad(), routed(model, routing_name):
            answers = [
                logits(model, each).argmax(-1) == each["labels"] for each in batches(data.test, data.collate, 99)
            ]
        assert torch.cat(answers).double().mean().item() == pytest.approx(accuracy)
    own = routing.deep_share * routing.deep_rows_accuracy + (1 - routing.deep_share) * routing.fast_rows_accuracy
    assert own == pytest.approx(report.accuracy)


def test_experts_parts_and_times(report: Report) -> None:
    routing, model = report.routing, routers.router().eval()
    assert routing is not None
    model.config.threshold = routing.threshold
    used = [call(model, each).expert_tokens for each in batches(routers.data().test, routers.data().collate, 64)]
    assert routing.experts == tuple(map(tuple, torch.stack(used).sum(0).tolist()))
    assert sum(routing.parts.values()) == report.parameters
    assert set(routing.branch_ms) == {"fast", "deep", "learned"} and routing.timed_rows == 64
    assert routing.branch_ms["fast"][1] < routing.branch_ms["deep"][1]


def test_models_without_a_router_have_no_such_section() -> None:
    assert measure_routing(routers.teacher(), routers.data()) is None
    assert measure_routing(routers.router(routing="deep"), routers.data()) is None


def test_it_survives_json_and_is_shown(report: Report, tmp_path: Path) -> None:
    read = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert read.routing == report.routing and isinstance(read.routing, Routing)
    plain = dataclasses.replace(report, name="teacher", routing=None)
    page = write_report(tmp_path, compare([plain, report]), routers.data(), title="split").read_text()
    text = (tmp_path / "report.md").read_text()
    for shown in ("shared encoder", "expert 3", "each row its branch", "fast branch right", "int4, MB"):
        assert shown in page and shown in text
    assert "histogram of the scores by branch" in page and "30.0 % the deep one" in text.replace("**", "")
    alone = write_report(tmp_path / "plain", compare([plain]), routers.data(), title="none").read_text()
    assert "histogram of the scores" not in alone
