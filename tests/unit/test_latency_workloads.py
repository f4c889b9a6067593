"""The workloads that roll_latency times, without any roll."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import roll_latency

from latency.bench import _is_due
from latency.cases import Candidate, Configuration, Method, Workload, new_layout

OPTIONS = roll_latency.Options()


def test_packings_are_new_legal_and_padded():
    workload = Workload(cp_size=4, depths=2, documents=16, tokens=64)
    layouts = [new_layout(workload, (0, seed)) for seed in range(20)]
    assert len({layout.key for layout in layouts}) == 20
    assert {layout.seq_len for layout in layouts} == {256}
    assert {layout.num_documents for layout in layouts} == {16}
    assert new_layout(workload, (0, 3)).key == layouts[3].key  # the same on all ranks
    padded = [layout.valid_lengths < np.diff(layout.cu_seqlens) for layout in layouts]
    assert np.mean(padded) > 0.5
    assert all((layout.valid_lengths > 0).all() for layout in layouts)
    assert not new_layout(replace(workload, documents=1), (0,)).is_packed
    with pytest.raises(ValueError, match=r"documents in \[1, 32\]"):
        new_layout(replace(workload, documents=33), (0,))


def test_lines_go_through_the_base_workload():
    lines = roll_latency.lines_through(OPTIONS, 4)
    base = Workload(4, 2, 8, 4096)
    assert base in lines["documents, D = 2"]
    assert base in lines["tokens"]
    workloads = roll_latency.workloads_of(OPTIONS, 4)
    assert len(workloads) == len(set(workloads)) == 11 + 4  # of 2 * 32 in the full product
    for depths in (1, 2, 4, 8):
        assert {Workload(4, depths, 1, 4096), Workload(4, depths, 32, 4096)} <= set(workloads)
    assert {workload.documents for workload in workloads if workload.cp_size == 2} == {1, 8, 32, 128}
    assert {workload.cp_size for workload in roll_latency.workloads_of(OPTIONS, 2)} == {2}
    crossed = replace(OPTIONS, cross=True)
    assert len(roll_latency.workloads_of(crossed, 2)) == 32
    assert len(roll_latency.workloads_of(crossed, 4)) == 64


def test_methods_leave_out_what_is_missing():
    missing = {"symmetric": "no such transport", "megatron": "no module"}
    packed, dense = Workload(2, 2, 8, 64), Workload(2, 2, 1, 64)
    assert [str(method) for method in roll_latency.methods_for(packed, OPTIONS, missing)] == [
        "sync",
        "merged process_group",
        "overlap process_group",
        "prefetch process_group",
        "prepared",
    ]
    assert len(roll_latency.methods_for(packed, OPTIONS, {})) == 10
    assert len(roll_latency.methods_for(dense, OPTIONS, {})) == 9  # a dense roll has no cu_seqlens


def test_slow_configurations_sit_out_rounds_evenly():
    configuration = Configuration(Workload(2, 2, 8, 64), Method("sync"))
    candidate = Candidate(configuration, case=None, rounds=5)  # type: ignore[arg-type]
    due = [index for index in range(60) if _is_due(candidate, index, 60)]
    assert due == [11, 23, 35, 47, 59]
