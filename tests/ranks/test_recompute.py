"""Full recompute: the same bits, and no roll is sent again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from test_model import SMALL, layout_of, make_batch, make_model
from test_traffic import counting
from torch._dynamo.utils import counters

from overlap_mtp import prepare
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import combine

from rank_pool import RankPool, device_of


def with_and_without(
    group: dist.ProcessGroup, schedule: str, documents: str, num_experts: int = 0
) -> list[str]:
    """What differs between a step that keeps activations and one that computes them again."""
    layout = layout_of(documents, group.size(), "zigzag")
    batch = make_batch(layout)
    given = prepare(batch, layout, SMALL.num_depths) if schedule == "prepared" else batch
    local = {n: layout.shard(tensor, group.rank()).to(device_of(group)) for n, tensor in given.items()}
    torch.manual_seed(0)
    model = GPT(replace(SMALL, num_experts=num_experts), group, schedule).double().to(device_of(group))
    model(local, layout)  # the agreement of the first exchange
    found, traffic, computed = [], model.mtp.roller.traffic, []
    layers = [*model.layers, *(block.layer for block in model.mtp.depths)]
    for number, layer in enumerate(layers):
        layer.ffn.register_forward_pre_hook(lambda *_, number=number: computed.append(number))
    for recompute in (False, True):
        model.recompute_layers(recompute)
        model.zero_grad()
        computed.clear()
        counts = [traffic.messages]  # of what leaves beside torch.distributed, over symmetric memory
        with counting(group) as forward:
            sums = model(local, layout)
        counts.append(traffic.messages)
        with counting(group) as backward:
            sums.sum().backward()
        counts.append(traffic.messages)
        sent = (
            (forward.messages + forward.others, counts[1] - counts[0]),
            (backward.messages + backward.others, counts[2] - counts[1]),
        )
        found.append((sums.detach(), [p.grad for p in model.parameters()], *sent))
        times = [computed.count(number) for number in range(len(layers))]
        assert times == [1 + recompute] * len(layers), times
    model.mtp.roller.close()
    (sums, gradients, forward, backward), (again, gradients_again, forward_again, backward_again) = found
    wrong = [] if torch.equal(sums, again) else ["sums"]
    wrong += [
        name
        for (name, _), a, b in zip(model.named_parameters(), gradients, gradients_again, strict=True)
        if not torch.equal(a, b)
    ]
    if schedule != "prepared" and forward == ([], 0):
        wrong.append("nothing was counted")
    if forward != forward_again:
        wrong.append(f"forward sent {forward_again}, not {forward}")
    if not backward == backward_again == ([], 0):
        wrong.append(f"backward sent {backward} and, recomputing, {backward_again}")
    return wrong


@pytest.mark.parametrize("documents", ["dense", "packed"])
@pytest.mark.parametrize("schedule", ["sync", "merged", "overlap", "prefetch", "prepared"])
def test_recomputing_gives_the_same_bits_and_sends_no_roll(pool: RankPool, schedule, documents):
    assert pool.run(with_and_without, 2, schedule, documents) == [[]] * 2


@pytest.mark.parametrize("documents", ["dense", "packed"])
def test_recomputed_experts_count_their_tokens_once(pool: RankPool, documents):
    """What their load-balancing loss is made of was summed over ranks in the forward pass."""
    assert pool.run(with_and_without, 4, "prefetch", documents, 4) == [[]] * 4


@pytest.mark.multi_gpu
@pytest.mark.parametrize("schedule", ["sync", "prefetch"])
def test_recomputing_on_gpus(gpu_pool: RankPool, schedule):
    size = gpu_pool.world_size
    assert gpu_pool.run(with_and_without, size, schedule, "packed") == [[]] * size


def compiled(group: dist.ProcessGroup) -> tuple[int, float]:
    """How many graphs were compiled, and by how much losses and gradients differ from those that were not."""
    layout = layout_of("packed", group.size(), "zigzag")
    batch = {name: layout.shard(tensor, group.rank()) for name, tensor in make_batch(layout).items()}
    found = []
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    for compiling in (False, True):
        model = make_model(torch.float64, group)
        model.recompute_layers()
        if compiling:
            model.compile_layers("aot_eager")  # which needs no compiler of C++
        sums = model(batch, layout)
        combine(sums, model.counts(batch, layout), SMALL.mtp_loss_factor).backward()
        found.append([sums.detach(), *(p.grad for p in model.parameters())])
        model.mtp.roller.close()
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True)]
    return counters["stats"]["unique_graphs"] - before, max(errors)


def test_compiled_layers_are_recomputed_too(pool: RankPool):
    for graphs, error in pool.run(compiled, 2):
        assert graphs > 0
        assert error <= 1e-12
