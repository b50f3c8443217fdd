"""KDLoss: the module says and does what kd_loss does."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import pykd
from pykd.nn import KDLoss


def test_is_kd_loss_with_its_options() -> None:
    student, teacher, labels = torch.randn(4, 5, 9), torch.randn(4, 5, 9), torch.randint(0, 9, (4, 5))
    options = {"temperature": 2.0, "alpha": 0.7, "direction": "jsd", "beta": 0.2, "reduction": "sum",
               "ignore_index": 3, "label_smoothing": 0.1, "shift": True, "scale_t2": False}  # fmt: skip
    call = {"mask": torch.rand(4, 5) > 0.3, "weights": torch.rand(4, 5)}
    want = pykd.kd_loss(student, teacher, labels, **options, **call)
    loss = KDLoss(**options)
    torch.testing.assert_close(loss(student, teacher, labels, **call), want, rtol=0, atol=0)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(twin(student, teacher, labels, **call), want, rtol=0, atol=0)


def test_num_items_and_inplace() -> None:
    leaf, teacher, labels = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9), torch.randint(0, 9, (4,))
    student = leaf * 1.0
    loss = KDLoss(inplace=True)(student, teacher, labels, num_items=8)
    torch.testing.assert_close(loss, pykd.kd_loss(leaf, teacher, labels) / 2)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(student.detach(), gradient)


def test_defaults_are_those_of_kd_loss() -> None:
    module, function = (inspect.signature(x).parameters for x in (KDLoss, pykd.kd_loss))
    assert {name: p.default for name, p in module.items()} == {name: function[name].default for name in module}
    assert set(function) - set(module) == {"student_logits", "teacher_logits", "labels", "mask", "weights", "num_items"}


def test_repr_names_the_options() -> None:
    assert "temperature=2.0, alpha=0.25, direction='forward'" in repr(KDLoss(2.0, 0.25))


def test_without_labels() -> None:
    with pytest.raises(ValueError, match="labels are needed for the label term"):
        KDLoss()(torch.zeros(2, 3), torch.zeros(2, 3))
    assert KDLoss(alpha=1.0)(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0
