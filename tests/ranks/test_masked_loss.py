"""The loss of logits that tensor-parallel ranks share is that of one rank, whatever does not count."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

from overlap_mtp.model.loss import accepted_sum, masked_loss_sum

from cases import error_of
from rank_pool import RankPool

LABELS = torch.tensor([[3, 1, -1, 9], [0, -100, 2, 7]])
MASK = torch.tensor([[1.0, 0.5, 0, 0], [1, 1, 0, 1]])


def logits_of(vocab_size: int, bad: float | None) -> torch.Tensor:
    """Random logits; `bad` ones where nothing counts."""
    logits = torch.randn(2, 4, vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[1, 3, 7] = 9  # accepted: the best logit is in the last rank's part
    if bad is not None:
        logits[(MASK == 0) | (LABELS == -100)] = bad
    return logits


def loss_gradient_and_accepted(logits: torch.Tensor, labels: torch.Tensor = LABELS) -> list[torch.Tensor]:
    logits = logits.requires_grad_()
    loss = masked_loss_sum(logits, labels, MASK)
    (gradient,) = torch.autograd.grad(loss, logits)
    return [loss.detach(), gradient, accepted_sum(logits.detach(), labels, MASK)]


def shared(group: dist.ProcessGroup, vocab_size: int, bad: float) -> list[torch.Tensor]:
    mesh = DeviceMesh.from_group(group, "cpu")
    with loss_parallel():
        loss, gradient, accepted = loss_gradient_and_accepted(
            distribute_tensor(logits_of(vocab_size, bad), mesh, [Shard(-1)])
        )
        return [loss, gradient.full_tensor(), accepted]


@pytest.mark.parametrize("vocab_size", [8, 9])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_does_not_count_has_no_influence_on_a_shared_loss(ranks: RankPool, vocab_size, bad):
    expected = loss_gradient_and_accepted(logits_of(vocab_size, None))
    for found in ranks.run(shared, 2, vocab_size, bad):
        for one, right in zip(found, expected, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-15)


def refused(group: dist.ProcessGroup, label: int) -> str:
    mesh, labels = DeviceMesh.from_group(group, "cpu"), LABELS.masked_fill(LABELS == 7, label)
    with loss_parallel():
        logits = distribute_tensor(logits_of(8, None), mesh, [Shard(-1)])
        return error_of(loss_gradient_and_accepted, logits, labels)


@pytest.mark.parametrize("label", [-1, 8, 13])
def test_a_label_outside_the_vocabulary_is_an_error_on_every_rank(ranks: RankPool, label):
    """It is not in the part of the vocabulary that any rank holds."""
    for message in ranks.run(refused, 2, label):
        assert message.startswith(f"ValueError: label {label} counts and is outside of the vocabulary [0, 8)")
