"""The workloads that roll_latency times, without any roll."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import roll_latency

from latency.candidate import Method
from latency.cases import Workload, new_layout


def test_packings_are_new_legal_and_padded():
    workload = Workload(cp_size=4, depths=2, documents=16, tokens=64)
    layouts = [new_layout(workload, seed) for seed in range(20)]
    assert len({layout.key for layout in layouts}) == 20
    assert {layout.seq_len for layout in layouts} == {256}
    assert {layout.num_documents for layout in layouts} == {16}
    assert new_layout(workload, 3).key == layouts[3].key  # the same on all ranks
    padded = [layout.valid_lengths < np.diff(layout.cu_seqlens) for layout in layouts]
    assert np.mean(padded) > 0.5
    assert all((layout.valid_lengths > 0).all() for layout in layouts)
    assert not new_layout(replace(workload, documents=0), 0).is_packed
    assert new_layout(replace(workload, documents=1), 0).num_documents == 1
    with pytest.raises(ValueError, match=r"--documents must be in \[0, 32\]"):
        new_layout(replace(workload, documents=33), 0)


def test_every_method_times_every_workload():
    options = roll_latency.Options(depths=(1, 2), documents=(0, 8), seq_len=256)
    assert options.workloads(4) == [Workload(4, depths, n, 64) for depths in (1, 2) for n in (0, 8)]
    assert options.methods(8, ("process_group",)) == [
        Method("sync"),
        Method("merged", "process_group"),
        Method("batched", "process_group"),
        Method("overlap", "process_group"),
        Method("prefetch", "process_group"),
        Method("prepared"),
        Method("megatron", "host"),
        Method("megatron", "device"),
    ]
    assert len(options.methods(8, ("process_group", "symmetric"))) == 12
    assert Method("megatron", "device") not in options.methods(0, ("process_group",))  # it has no cu_seqlens
