"""Recomputed layers give the same bits and send no roll again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from test_model import SMALL, layout_of, local_shards, make_batch, make_model
from test_traffic import counting
from torch._dynamo.utils import counters

from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import combine

from rank_pool import RankPool, device_of


def wrong_when_recomputed(
    group: dist.ProcessGroup, schedule: str, documents: str, num_experts: int = 0
) -> list[str]:
    """What is wrong with a step that computes its layers again, compared with one that keeps activations."""
    layout = layout_of(documents, group.size(), "zigzag")
    local = local_shards(group, schedule, layout, make_batch(layout))
    torch.manual_seed(0)
    model = GPT(replace(SMALL, num_experts=num_experts), group, schedule).double().to(device_of(group))
    model(local, layout)  # the ranks agree on the batch at the first exchange
    traffic, computed = model.mtp.roller.traffic, []
    layers = [*model.layers, *(block.layer for block in model.mtp.depths)]
    for number, layer in enumerate(layers):
        layer.ffn.register_forward_pre_hook(lambda *_, number=number: computed.append(number))

    def sent_by(call: Callable[[], None]) -> tuple[list, int]:
        """What leaves by torch.distributed, and how many messages by any transport."""
        before = traffic.messages
        with counting(group) as sent:
            call()
        return sent.messages + sent.others, traffic.messages - before

    found = []
    for recompute in (False, True):
        model.recompute_layers(recompute)
        model.zero_grad()
        computed.clear()
        sums: list[torch.Tensor] = []
        forward = sent_by(lambda sums=sums: sums.append(model(local, layout)))
        backward = sent_by(lambda sums=sums: sums[0].sum().backward())
        assert sorted(computed) == sorted([*range(len(layers))] * (1 + recompute))
        found.append(([sums[0].detach(), *(p.grad for p in model.parameters())], forward, backward))
    model.mtp.roller.close()
    (kept, forward, backward), (again, forward_again, backward_again) = found
    names = ["sums", *(name for name, _ in model.named_parameters())]
    wrong = [name for name, a, b in zip(names, kept, again, strict=True) if not torch.equal(a, b)]
    if schedule != "prepared" and forward == ([], 0):
        wrong.append("nothing was counted")
    if forward != forward_again:
        wrong.append(f"forward sent {forward_again}, not {forward}")
    if not backward == backward_again == ([], 0):
        wrong.append(f"backward sent {backward} and, recomputing, {backward_again}")
    return wrong


@pytest.mark.parametrize("documents", ["dense", "packed"])
@pytest.mark.parametrize("schedule", ["sync", "merged", "batched", "overlap", "prefetch", "prepared"])
def test_recomputing_gives_the_same_bits_and_sends_no_roll(ranks: RankPool, schedule, documents):
    assert ranks.run(wrong_when_recomputed, 2, schedule, documents) == [[]] * 2


@pytest.mark.parametrize("documents", ["dense", "packed"])
def test_recomputed_experts_add_up_their_counts_once(ranks: RankPool, documents):
    assert ranks.run(wrong_when_recomputed, 4, "prefetch", documents, 4) == [[]] * 4


def compiled_errors(group: dist.ProcessGroup) -> tuple[int, float]:
    """How many graphs were compiled, and the largest relative error of a loss or gradient that they give."""
    layout = layout_of("packed", group.size(), "zigzag")
    batch = local_shards(group, "prefetch", layout, make_batch(layout))
    found = []
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    for compiling in (False, True):
        model = make_model(torch.float64, group)
        model.recompute_layers()
        if compiling:
            model.compile_layers("aot_eager")  # needs no C++ compiler
        sums = model(batch, layout)
        combine(sums, model.counts(batch, layout), SMALL.mtp_loss_factor).backward()
        found.append([sums.detach(), *(p.grad for p in model.parameters())])
        model.mtp.roller.close()
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True)]
    return counters["stats"]["unique_graphs"] - before, max(errors)


def test_compiled_layers_are_recomputed_too(ranks: RankPool):
    for graphs, error in ranks.run(compiled_errors, 2):
        assert graphs > 0
        assert error <= 1e-12
