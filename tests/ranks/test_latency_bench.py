"""What roll_latency and scaling_model rest on: checks of bits that can fail, and real counts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scaling_model import SCHEDULES, Measured

from latency import megatron_rolls
from latency.candidate import Candidate, Method
from latency.cases import TENSORS, Case, Workload, new_layout
from overlap_mtp import SequenceLayout, make_roller

from rank_pool import device_of


def differences_of_wrong_rolls(group):
    """What the check says of right rolls, of rolls by one too few, and of rolls that keep the padding."""
    case = Case(Workload(group.size(), 2, 8, 64), group, device_of(group))
    roller = make_roller("prefetch", group, num_depths=2)
    right = roller.start(case.batch, case.layout)
    unpadded = SequenceLayout.packed(case.layout.cu_seqlens, group.size())
    keeping = make_roller("prefetch", group, num_depths=2).start(case.batch, unpadded)

    class Late:
        def at(self, depth):
            return case.batch if depth == 1 else right.at(depth - 1)

    return case.differences(right), case.differences(Late()), case.differences(keeping)


def test_the_check_of_bits_can_fail(ranks):
    for right, late, keeping in ranks.run(differences_of_wrong_rolls, 2):
        assert right == (0, 0)
        assert late[1] > 100
        assert keeping[0] > 0
        assert keeping[1] == 0


def candidates_after_two_rounds(group):
    """Warm up and time candidates. One returns wrong rolls. Return what they recorded, and the packings they saw."""
    case, seen = Case(Workload(group.size(), 2, 4, 32), group, device_of(group)), []
    found = []
    for method in (Method("prefetch", "process_group"), Method("prepared"), Method("none")):
        candidate = Candidate(case, method)
        candidate.roller.start = partial(start_noting, candidate.roller.start, seen)
        candidate.warm_up()
        for _ in range(2):
            candidate.time()
        candidate.roller.close()
        found.append((candidate.differs, candidate.sent, candidate.times_us))
    return found, [layout.key for layout in seen]


def start_noting(start, seen, batch, layout):
    seen.append(layout)
    return start(batch, layout)


def test_candidates_check_their_rolls_and_time_them_on_the_same_packings(ranks):
    for found, seen in ranks.run(candidates_after_two_rounds, ranks.world_size):
        (right, sent, times_us), (prepared, sent_nothing, _), (none, _, _) = found
        assert right == prepared == (0, 0)
        assert none[1] > 100
        assert 1 <= sent[0] < sent[1]
        assert sent_nothing == (0, 0)
        assert {name: len(times) for name, times in times_us.items()} == {
            "host": 2,
            "cold": 2,
            "wall": 2,
            "gpu": 0,
        }
        assert all(0 < host < wall for host, wall in zip(times_us["host"], times_us["wall"], strict=True))
        each = len(seen) // 3
        assert seen[:each] == seen[each : 2 * each] == seen[2 * each :]
        assert len(set(seen[:each])) == each == 1 + 3 + 4  # a check, warm-ups, and two packings in each round


def megatron_against_oracle(group):
    found = {}
    for documents in (0, 4):
        case = Case(Workload(group.size(), 3, documents, 64), group, device_of(group))
        for where in megatron_rolls.CU_SEQLENS_ON:
            roller = megatron_rolls.MegatronRoller(group, where, torch.device("cpu"))
            rolls = roller.start(case.batch, roller.argument(case.layout))
            found[documents, where] = case.differences(rolls)
    return found


def test_megatron_differs_from_the_oracle_at_padding_only(ranks):
    pytest.importorskip("megatron.core")
    for cp_size in (2, 4):
        by_rank = ranks.run(megatron_against_oracle, cp_size)
        for found in by_rank:
            assert found[0, "host"] == found[0, "device"] == (0, 0)
            assert found[4, "host"] == found[4, "device"]
            assert found[4, "host"][1] == 0
        layout = new_layout(Workload(cp_size, 3, 4, 64), seed=0)
        is_padded = bool((layout.valid_ends < layout.cu_seqlens[1:]).any())
        assert any(found[4, "host"][0] for found in by_rank) == is_padded == (cp_size == 4)


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
def test_counts_of_the_scaling_model_are_those_of_the_busiest_rank(ranks, cp_size):
    cases = [(s, depths, documents) for s in SCHEDULES for depths in (1, 3) for documents in (1, 4)]
    by_rank = ranks.run(messages_for, cp_size, cases)
    neighbours = 1 if cp_size == 2 else 2
    for at, case in enumerate(cases):
        one = Measured("run", "step", case[0], cp_size, *case[1:], 1.0, 0.0, 0.0, 0.0)
        _, messages, _, exchanges = one.counts()[0]
        busiest = max(sent[at] for sent in by_rank)
        if case[0] == "prefetch" and case[1:] == (
            3,
            4,
        ):  # chunks may be shorter than 3: more peers, one exchange
            assert busiest >= exchanges * neighbours
        else:
            assert busiest == messages + exchanges * neighbours, case
