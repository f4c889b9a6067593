"""Rolled embeddings, mixed hidden states and distillation: loss and gradients against one process."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import cache

import parity
import pytest
import test_parallel
import torch
import torch.distributed as dist
from test_model import make_batch
from test_traffic import counting

from overlap_mtp import SequenceLayout
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import combine
from overlap_mtp.model.reference import loss_reference
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES
from overlap_mtp.training.parallel import ParallelDims, parallelize, split_loss
from overlap_mtp.training.trainer import global_counts

from rank_pool import RankPool, device_of

ROWS = 8
KEYS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 7, 7, 1 << 40])
PLAIN = replace(parity.CONFIG, num_depths=3)
EMBEDDINGS = replace(PLAIN, mtp_inputs="embeddings")
MIXING = replace(PLAIN, hidden_state_mixing=True)
TV = replace(PLAIN, distillation="tv", distillation_weight=0.5)
KL = replace(PLAIN, distillation="kl", distillation_detach=False)
ALL = replace(KL, mtp_inputs="embeddings", hidden_state_mixing=True)
ALL_TV = replace(ALL, distillation="tv", num_depths=4, derive_labels=True, repeat_mtp_layer=True)
DETACHED = replace(ALL, distillation_detach=True, detach_mtp=True, num_experts=4)


@dataclass(frozen=True)
class Case:
    """A run that is compared with one process. All eight ranks take part: dp ranks share the rows."""

    name: str
    config: ModelConfig
    tp: int
    cp: int
    documents: str = "packed"
    recompute: bool = False
    schedule: str = "overlap"


CASES = [
    Case("all", ALL, 1, 1),
    Case("all", ALL, 1, 2, "dense", recompute=True),
    Case("all", ALL, 1, 4, recompute=True),
    Case("all", ALL, 2, 1, recompute=True),
    Case("all", ALL, 2, 2, "dense"),
    Case("all", ALL, 2, 4),
    Case("all", ALL, 4, 1, "dense", recompute=True),
    Case("all", ALL, 4, 2, recompute=True),
    Case("all_tv", ALL_TV, 4, 2),
    Case("detached", DETACHED, 2, 4, recompute=True),
    Case("embeddings", EMBEDDINGS, 1, 4, recompute=True),
    Case("mixing", MIXING, 1, 4, "dense", recompute=True),
    Case("tv", TV, 1, 2),
    Case("kl", KL, 1, 4, "dense"),
]


def layout_of(documents: str, cp_size: int) -> SequenceLayout:
    """64 tokens, the same at every cp_size: a dense stream, or documents, one empty and two padded."""
    if documents == "dense":
        return SequenceLayout.dense(64, cp_size)
    return SequenceLayout.packed([0, 16, 16, 48, 64], cp_size, valid_lengths=[13, 0, 32, 3])


def batch_of(config: ModelConfig, documents: str) -> dict[str, torch.Tensor]:
    """A full batch. The rows and the cp ranks have different numbers of tokens that count."""
    batch = make_batch(layout_of(documents, 4), ROWS)
    for row in range(ROWS):
        batch["loss_mask"][row, : 2 * row] = 0
    if config.derive_labels:
        del batch["labels"]
    return batch


def model_of(config: ModelConfig, group: dist.ProcessGroup | None = None, schedule: str = "overlap") -> GPT:
    torch.manual_seed(0)
    return GPT(config, group, activation_schedule=schedule).double()


def loss_of(config: ModelConfig, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    aux_loss_factor = config.aux_loss_factor if config.num_experts else None
    return combine(sums, counts, config.mtp_loss_factor, aux_loss_factor)


@cache
def expected(config: ModelConfig, documents: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = model_of(config)
    loss = loss_reference(model, batch_of(config, documents), layout_of(documents, 1), KEYS.tolist())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def step(world: dist.ProcessGroup, case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
    """The loss and all gradients, whole, from the first rank."""
    parallel = parity.mesh_of(ParallelDims(world.size() // (case.tp * case.cp), case.cp, case.tp), "cpu")
    model = model_of(case.config, parallel.cp_group, case.schedule)
    model.recompute_layers(case.recompute)
    parallelize(model, parallel)
    layout, mine = layout_of(case.documents, case.cp), slice(parallel.dp_rank, None, parallel.dims.dp)
    full = batch_of(case.config, case.documents)
    batch = {name: layout.shard(t[mine], parallel.cp_rank) for name, t in full.items()}
    with split_loss(parallel):
        sums = model(batch, layout, mixing_keys=KEYS[mine])
        counts = global_counts(model, [(batch, layout)], parallel.data_group)
        loss = loss_of(case.config, sums, counts)
        loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=parallel.data_group)
    model.mtp.close()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return None if world.rank() else (total, gradients)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, [case.name, *astuple(case)[2:]])))
def test_loss_and_every_gradient_equal_one_process(eight: RankPool, case):
    (loss, gradients), *_ = eight.run(step, 8, case)
    expected_loss, expected_gradients = expected(case.config, case.documents)
    assert float((loss - expected_loss).abs() / expected_loss) <= 1e-10
    for name, gradient in expected_gradients.items():
        error = float((gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-30))
        assert error <= 1e-10, name


def test_schedules_give_the_same_bits(eight: RankPool):
    (loss, gradients), *others = (
        eight.run(step, 8, Case("all", ALL, 1, 4, schedule=schedule))[0] for schedule in ACTIVATION_SCHEDULES
    )
    for other_loss, found in others:
        assert torch.equal(loss, other_loss)
        assert [name for name in gradients if not torch.equal(gradients[name], found[name])] == []


def test_a_training_step_is_that_of_one_process(eight: RankPool):
    """Also the keys of mixed rows, which the trainer gives to dp ranks and accumulated microbatches."""
    setting = test_parallel.Setting(replace(ALL, distillation="tv"), recompute=True)
    report, gradients = test_parallel.step(None, None, setting)
    found_report, found = eight.run(test_parallel.step, 8, ParallelDims(2, 2, 2), setting)[0]
    assert found_report.mtp_losses == pytest.approx(report.mtp_losses, rel=1e-10)
    for name, gradient in gradients.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) <= 1e-10, name


def sent_in_a_step(group: dist.ProcessGroup, schedule: str, recompute: bool) -> list:
    """The messages that leave this rank in forward and in backward, and the gradients."""
    layout, rank = layout_of("packed", group.size()), group.rank()
    batch = {
        name: layout.shard(tensor, rank).to(device_of(group))
        for name, tensor in batch_of(ALL, "packed").items()
    }
    model = model_of(ALL, group, schedule).to(device_of(group))
    model.recompute_layers(recompute)
    model(batch, layout).sum().backward()  # the ranks agree on the batches at the first exchange
    model.zero_grad()
    before = [replace(roller.traffic) for roller in model.mtp.activations]
    with counting(group) as forward:
        sums = model(batch, layout)
    with counting(group) as backward:
        sums.sum().backward()
    traffic = [
        (after.traffic.messages - was.messages, after.traffic.bytes - was.bytes)
        for was, after in zip(before, model.mtp.activations, strict=True)
    ]
    model.mtp.close()
    return [forward.messages, backward.messages, traffic, [p.grad for p in model.parameters()]]


@pytest.mark.parametrize("schedule", ACTIVATION_SCHEDULES)
def test_recomputing_sends_no_activation_again(ranks: RankPool, schedule):
    kept, again = (ranks.run(sent_in_a_step, 4, schedule, recompute) for recompute in (False, True))
    for (*sent, gradients), (*sent_again, found) in zip(kept, again, strict=True):
        assert sent == sent_again
        _, backward, traffic = sent
        assert len(backward) > 0
        assert len(traffic) == 4  # embeddings, hidden states of the trunk and of depth 1, teacher
        assert all(torch.equal(a, b) for a, b in zip(gradients, found, strict=True))


def test_each_use_of_a_schedule_sends_one_message_a_peer(ranks: RankPool):
    """Overlapped, a zigzag rank with two neighbours sends each of them one message for each use and direction."""
    for forward, backward, traffic, _ in ranks.run(sent_in_a_step, 4, "overlap", True):
        assert len(backward) == sum(messages for messages, _ in traffic) / 2
        assert len(forward) > len(backward)  # tokens travel, too


def test_mixed_states_are_those_of_evaluation_if_it_is_off(ranks: RankPool):
    for equal, mixed in ranks.run(evaluated, 4):
        assert equal
        assert mixed


def evaluated(group: dist.ProcessGroup) -> tuple[bool, bool]:
    """Whether evaluation gives the sums of a model that does not mix, and training gives others."""
    layout = layout_of("packed", group.size())
    batch = {name: layout.shard(t, group.rank()) for name, t in batch_of(PLAIN, "packed").items()}
    sums = []
    for config, training in ((PLAIN, True), (MIXING, False), (MIXING, True)):
        model = model_of(config, group).train(training)
        with torch.no_grad():
            one = model(batch, layout, mixing_keys=KEYS)
        dist.all_reduce(one, group=group)
        sums.append(one)
        model.mtp.close()
    return torch.equal(sums[0], sums[1]), bool((sums[0][2:] != sums[2][2:]).all())
