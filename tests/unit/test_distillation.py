"""The distance of a depth's prediction from the trunk's, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch

from overlap_mtp.model.distillation import distillation_sum

COUNTS = torch.tensor([[True, True, False], [True, False, True]])
MASK = torch.tensor([[1.0, 0.5, 1.0], [2.0, 0.0, 1.0]])


def logits_of(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).mul_(3).requires_grad_()


def by_autograd(kind: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind == "kl":
        distances = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    else:
        distances = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    return (distances * MASK)[COUNTS].sum()


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_distances_and_gradients_equal_those_of_autograd(kind):
    student, teacher = logits_of(0), logits_of(1)
    expected = by_autograd(kind, student, teacher)
    found = distillation_sum(kind, student, teacher, COUNTS, MASK)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-14)
    gradients = (torch.autograd.grad(loss, (student, teacher)) for loss in (found, expected))
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tokens_that_do_not_count_have_no_influence(kind, value):
    results = []
    for fill in (1.0, value):
        student, teacher = logits_of(0), logits_of(1)
        for logits in (student, teacher):
            logits.data[~COUNTS] = fill
        loss = distillation_sum(kind, student, teacher, COUNTS, MASK)
        results.append((loss, *torch.autograd.grad(loss, (student, teacher))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[1][1][~COUNTS].any()


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_half_precision_is_summed_in_single_precision(kind):
    student, teacher = (logits_of(seed).detach().bfloat16() for seed in (0, 1))
    loss = distillation_sum(kind, student.requires_grad_(), teacher, COUNTS, MASK)
    expected = by_autograd(kind, student.detach().double(), teacher.double())
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_equal_predictions_have_no_distance(kind):
    student = logits_of(0)
    teacher = student.detach() + 100
    loss = distillation_sum(kind, student, teacher, COUNTS, MASK)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-13)
