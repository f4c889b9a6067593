"""Where rows of activations lie in symmetric memory, and what is said if they are late, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overlap_mtp.exchange.rows import make_row_plans
from overlap_mtp.schedules.activations import make_activation_roller

from strategies import layouts

pytest.importorskip("triton")
ROW_WORDS = 6


@given(
    layout=layouts(cp_sizes=(2, 3, 4)),
    num_depths=st.integers(1, 4),
    spare=st.integers(0, 3),
    is_backward=st.booleans(),
)
def test_what_a_rank_puts_is_what_its_peer_takes(layout, num_depths, spare, is_backward):
    from overlap_mtp.exchange.row_symmetric import Direction

    plans = make_row_plans(layout, num_depths, layout.num_documents + spare, False)
    direction, ranks = Direction(plans, ROW_WORDS, is_backward), range(layout.cp_size)
    puts, takes = {}, {}
    for rank in ranks:
        constants = direction.constants(rank)
        assert constants.first_late == (1 + layout.cp_size if is_backward else 1)
        words = direction.peers(rank, [1000 + peer for peer in ranks])
        for n in range(constants.num_destinations):
            address, peer, there, here, size = words[5 * n : 5 * n + 5]
            assert address == 1000 + peer
            assert here + size <= plans[rank].num_rows * ROW_WORDS
            puts[rank, peer] = there, size
        for n in range(constants.num_sources):
            at = 5 * constants.num_destinations + 4 * n
            address, peer, here, size = words[at : at + 4]
            assert address == 1000 + peer
            takes[peer, rank] = here, size
        assert len(words) == 5 * constants.num_destinations + 4 * constants.num_sources + 1
        assert (
            direction.first_received(rank) * ROW_WORDS
            + sum(size for (_, to), (_, size) in takes.items() if to == rank)
            <= plans[rank].num_rows * ROW_WORDS
        )
    assert puts == takes
    for rank in ranks:
        mine = sorted(one for (_, to), one in takes.items() if to == rank)
        ends = [here + size for here, size in mine]
        assert all(here >= end for (here, _), end in zip(mine[1:], ends, strict=False))
        assert max(ends, default=0) <= direction.places.buffer_words
        longest = max((size for _, size in mine), default=0)
        assert longest <= direction.places.num_parts * direction.places.part_rows


def test_a_late_backward_is_called_one():
    from overlap_mtp.exchange.row_symmetric import SymmetricRowTransport

    transport = SymmetricRowTransport.__new__(SymmetricRowTransport)
    transport.plan = SimpleNamespace(cp_size=4, cp_rank=1)  # type: ignore[assignment]
    transport.num_started = 3
    forward, backward = (transport._describe_failure(0, late, 0) for late in ([3, 4 + 1], [4 + 3, 0]))
    assert "gave up waiting for the activations of cp rank 2" in forward
    assert backward == f"{forward}; it was a backward, which every rank must run"


def test_transports_that_do_not_exist_or_fit_are_refused():
    with pytest.raises(ValueError, match="transport must be one of auto, process_group, symmetric"):
        make_activation_roller("overlap", None, 2, transport="pigeon")
    with pytest.raises(ValueError, match="symmetric memory carries activations of schedule overlap"):
        make_activation_roller("merged", None, 2, transport="symmetric")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the batch is on the CPU")
def test_symmetric_memory_needs_gpus():
    from overlap_mtp import SequenceLayout

    roller = make_activation_roller("overlap", None, 2, transport="symmetric")
    with pytest.raises(ValueError, match="transport symmetric needs GPUs that share memory"):
        roller.start({"a": torch.ones(1, 8, 4)}, SequenceLayout.dense(8, 1))
