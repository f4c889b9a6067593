"""What roll_latency and scaling_model rest on: checks of bits that can fail, failures of one rank, real counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scaling_model import SCHEDULES, Measured

from latency import megatron_rolls
from latency.bench import Bench
from latency.cases import TENSORS, Case, Configuration, Method, Workload
from overlap_mtp import SequenceLayout, make_roller

from rank_pool import device_of


def differences_of_wrong_rolls(group):
    """What the check says of right rolls, of rolls by one too few, and of rolls that keep the padding."""
    workload = Workload(group.size(), 2, 4, 32)
    case = Case(workload, group, device_of(group), seed=1)
    roller = make_roller("prefetch", group, num_depths=2)
    right = roller.start(case.batch, case.layout)
    unpadded = SequenceLayout.packed(case.layout.cu_seqlens, group.size())
    keeping = make_roller("prefetch", group, num_depths=2).start(case.batch, unpadded)

    class Late:
        def at(self, depth):
            return case.batch if depth == 1 else right.at(depth - 1)

    return case.differences(right), case.differences(Late()), case.differences(keeping)


def test_the_check_of_bits_can_fail(pool):
    for right, late, keeping in pool.run(differences_of_wrong_rolls, 2):
        assert right == (0, 0)
        assert late[1] > 100
        assert keeping[0] > 0
        assert keeping[1] == 0


class FailingRoller:
    """Raises on one rank, at a given roll."""

    def __init__(self, roller, at_roll):
        self.roller, self.left = roller, at_roll
        self.traffic = roller.traffic

    def start(self, batch, layout):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("/some/folder/of/this/machine/file.py broke\nand more")
        return self.roller.start(batch, layout)

    def close(self):
        self.roller.close()


def bench_with_a_failure(group):
    workload = Workload(group.size(), 2, 4, 32)
    methods = [Method("prepared"), Method("prefetch", "process_group"), Method("sync", "nonsense")]
    bench = Bench([Configuration(workload, method) for method in methods], device_of(group))
    prepared = bench.candidates[0]
    opening = prepared.open

    def open_failing():
        opening()
        if group.rank() == 1:
            prepared.roller = FailingRoller(prepared.roller, 1 + 3 + 2 * 6 + 1)

    prepared.open = open_failing
    bench.prepare(rounds=4, slow_seconds=10)
    bench.run(4)
    bench.close()
    return [(candidate.failed, len(candidate.host_us), candidate.wall_us) for candidate in bench.candidates]


def test_one_failure_does_not_end_the_others(pool):
    first, second = pool.run(bench_with_a_failure, pool.world_size)[:2]
    assert first[0][0] == second[0][0] == "RuntimeError: file.py broke"
    assert second[0][1] == 2  # 1 check, 3 warm-ups, 2 rounds of 6; the next roll failed
    assert first[1][:2] == second[1][:2] == (None, 4)
    assert first[2][0].startswith("ValueError: transport must be one of")
    assert all(wall > 0 for wall in first[1][2])


def megatron_against_oracle(group):
    found = {}
    for documents in (1, 4):
        case = Case(Workload(group.size(), 3, documents, 64), group, device_of(group), seed=documents)
        for where in megatron_rolls.CU_SEQLENS_ON:
            roller = megatron_rolls.MegatronRoller(group, where, torch.device("cpu"))
            rolls = roller.start(case.batch, roller.argument(case.layout))
            found[documents, where] = case.differences(rolls)
    return found


def test_megatron_differs_from_the_oracle_at_padding_only(pool):
    pytest.importorskip("megatron.core")
    for cp_size in (2, 4):
        by_rank = pool.run(megatron_against_oracle, cp_size)
        for found in by_rank:
            assert found[1, "host"] == found[1, "device"] == (0, 0)
            assert found[4, "host"] == found[4, "device"]
            assert found[4, "host"][1] == 0
        assert any(found[4, "host"][0] for found in by_rank)


def messages_for(group, cases):
    """How many messages this rank's rollers send for a microbatch of each case."""
    sent, size = [], group.size()
    for schedule, depths, documents in cases:
        layout = SequenceLayout.dense(32 * size, size)
        if documents > 1:
            layout = SequenceLayout.packed(np.arange(documents + 1) * 8 * size, size)
        ones = torch.ones(1, layout.local_len, dtype=torch.int64, device=device_of(group))
        roller = make_roller(schedule, group, depths)
        rolls = roller.start(dict.fromkeys(TENSORS, ones), layout)
        for depth in range(1, depths + 1):
            rolls.at(depth)
        sent.append(roller.traffic.messages)
    return sent


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_counts_of_the_scaling_model_are_those_of_the_busiest_rank(pool, cp_size):
    cases = [(s, depths, documents) for s in SCHEDULES for depths in (1, 3) for documents in (1, 4)]
    by_rank = pool.run(messages_for, cp_size, cases)
    neighbours = 1 if cp_size == 2 else 2
    for at, case in enumerate(cases):
        one = Measured("run", "step", case[0], cp_size, *case[1:], 1.0, 0.0, 0.0, 0.0)
        _, messages, _, exchanges = one.counts()[0]
        busiest = max(ranks[at] for ranks in by_rank)
        if case[0] == "prefetch" and case[1:] == (
            3,
            4,
        ):  # chunks may be shorter than 3: more peers, one exchange
            assert busiest >= exchanges * neighbours
        else:
            assert busiest == messages + exchanges * neighbours, case
