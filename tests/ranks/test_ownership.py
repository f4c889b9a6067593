"""Whose tensors they are: the caller may do with a batch and its rolls what the docstrings allow."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from overlap_mtp import make_roller
from overlap_mtp.exchange.transport import Transport

from cases import NUM_DEPTHS, PACKED, error_of, full_batch, local_to, packed, wrong_rolls
from rank_pool import RankPool, device_of


def change_the_dict(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """The caller's dict gets other tensors under way, as a data loader's may."""
    layout = packed(group.size())
    roller = make_roller(schedule, group, NUM_DEPTHS)
    batch = local_to(group, schedule, layout)
    rolls = roller.start(batch, layout)
    for name in batch:
        batch[name] = torch.zeros_like(batch[name])
    wrong = wrong_rolls(rolls, layout, group.rank())
    roller.close()
    return wrong


def write_into_rolls(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """What autograd keeps of one roll survives a write into another, of the same and of the next microbatch."""
    layout = packed(group.size())
    roller = make_roller(schedule, group, NUM_DEPTHS)
    weight = torch.ones(
        full_batch(layout)["input_ids"].numel(), 3, device=device_of(group), requires_grad=True
    )
    batch = local_to(group, schedule, layout)
    rolls = [roller.start(batch, layout) for _ in range(2)]
    losses = []
    for one in rolls:
        for depth in range(1, NUM_DEPTHS + 1):
            losses.append(F.embedding(one.at(depth)["input_ids"], weight).sum())
    rolls[0].at(1)["labels"].fill_(-1)
    rolls[1].at(2)["loss_mask"].zero_()
    error = error_of(torch.stack(losses).sum().backward)
    roller.close()
    return [] if error == "nothing" else [error]


def infer_then_train(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """A roller that was first used in inference mode serves training as well."""
    layout = packed(group.size())
    roller = make_roller(schedule, group, NUM_DEPTHS)
    batch = local_to(group, schedule, layout)
    weight = torch.ones(
        full_batch(layout)["input_ids"].numel(), 3, device=device_of(group), requires_grad=True
    )
    with torch.inference_mode():
        wrong = wrong_rolls(roller.start(batch, layout), layout, group.rank())
    for _ in range(2):
        rolls = roller.start(batch, layout)
        error = error_of(lambda rolls=rolls: F.embedding(rolls.at(1)["input_ids"], weight).sum().backward())
        wrong += [] if error == "nothing" else [error]
        wrong += wrong_rolls(rolls, layout, group.rank())
    roller.close()
    return wrong


def ask_again(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """A join that failed once is asked for again: it is the same exchange, no other is sent."""
    layout = packed(group.size())
    roller = make_roller(schedule, group, NUM_DEPTHS)
    batch = local_to(group, schedule, layout)
    roller.start(batch, layout).at(NUM_DEPTHS)
    before = roller.traffic.messages
    roller.start(batch, layout).at(NUM_DEPTHS)
    per_batch = roller.traffic.messages - before
    rolls = roller.start(batch, layout)
    transport = roller._transport  # type: ignore[attr-defined]
    finish = type(transport).finish

    def fails(self: Transport, exchange: object) -> None:
        raise KeyboardInterrupt

    type(transport).finish = fails
    try:
        with pytest.raises(KeyboardInterrupt):
            rolls.at(1)
    finally:
        type(transport).finish = finish
    wrong = wrong_rolls(rolls, layout, group.rank())
    if roller.traffic.messages != before + 2 * per_batch:
        wrong.append(f"{roller.traffic.messages - before - per_batch} messages, not {per_batch}")
    roller.close()
    return wrong


CASES = (change_the_dict, write_into_rolls, infer_then_train, ask_again)


@pytest.mark.parametrize("schedule", PACKED)
@pytest.mark.parametrize("case", CASES)
def test_tensors_are_the_callers(pool: RankPool, case, schedule):
    assert pool.run(case, 2, schedule) == [[]] * 2


@pytest.mark.multi_gpu
@pytest.mark.parametrize("schedule", PACKED)
@pytest.mark.parametrize("case", CASES)
def test_tensors_are_the_callers_on_gpus(gpu_pool: RankPool, case, schedule):
    size = gpu_pool.world_size
    assert gpu_pool.run(case, size, schedule) == [[]] * size
