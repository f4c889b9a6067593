"""Messages counted where they leave, at torch.distributed, and not by what the library says of itself."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import SMALL, layout_of, make_batch

from overlap_mtp import SequenceLayout, make_roller, pad_documents, prepare
from overlap_mtp.model.gpt import GPT

from rank_pool import RankPool, device_of
from strategies import DTYPES, layouts, random_tensor

NAMES = ("input_ids", "position_ids", "labels", "loss_mask", "padding_mask")
COUNTED = {"all_to_all_single", "isend"}
RECEIVING = {"irecv", "recv"}
WATCHED = [
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "monitored_barrier",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
]


@dataclass
class Wire:
    """What left this rank: (peer, bytes) of each message, the split sizes, and calls of another kind."""

    messages: list[tuple[int, int]] = field(default_factory=list)
    splits: list[tuple[tuple[int, ...], tuple[int, ...], int]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def per_peer(self) -> Counter[int]:
        return Counter(peer for peer, _ in self.messages)

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.messages)


@contextlib.contextmanager
def counting(group: dist.ProcessGroup) -> Iterator[Wire]:
    """Counts as cp ranks' messages all that `torch.distributed` is asked to send."""
    wire = Wire()
    all_to_all_single, isend = dist.all_to_all_single, dist.isend

    def counted_all_to_all(output, input, output_split_sizes=None, input_split_sizes=None, **options):  # noqa: A002
        received = list(output_split_sizes or [len(output) // group.size()] * group.size())
        sent = list(input_split_sizes or [len(input) // group.size()] * group.size())
        row_bytes = input[0].nbytes if len(input) else 0
        wire.splits.append((tuple(sent), tuple(received), row_bytes))
        for peer, rows in enumerate(sent):
            if rows and peer != group.rank():
                wire.messages.append((peer, rows * row_bytes))
        return all_to_all_single(output, input, output_split_sizes, input_split_sizes, **options)

    def counted_isend(tensor, dst=None, **options):
        wire.messages.append((dist.get_group_rank(group, dst), tensor.nbytes))
        return isend(tensor, dst, **options)

    def noted(name: str, original: Any) -> Any:
        def call(*args, **options):
            if name not in RECEIVING:
                wire.others.append(name)
            return original(*args, **options)

        return call

    with contextlib.ExitStack() as patches:
        for name in WATCHED:
            if hasattr(dist, name):
                patches.enter_context(mock.patch.object(dist, name, noted(name, getattr(dist, name))))
        patches.enter_context(mock.patch.object(dist, "all_to_all_single", counted_all_to_all))
        patches.enter_context(mock.patch.object(dist, "isend", counted_isend))
        yield wire


def local_batch(
    group: dist.ProcessGroup, schedule: str, layout: SequenceLayout, num_depths: int, num_tensors: int
):
    generator = torch.Generator().manual_seed(layout.seq_len)
    full = {
        name: random_tensor((2, layout.seq_len), dtype, generator)
        for name, dtype in list(zip(NAMES, DTYPES, strict=True))[:num_tensors]
    }
    if schedule == "prepared":
        full = prepare(full, layout, num_depths)
    return {name: layout.shard(t, group.rank()).to(device_of(group)) for name, t in full.items()}


@dataclass
class Count:
    """One microbatch's traffic on one rank: counted, and as the roller reports it."""

    per_peer: Counter[int]
    num_bytes: int
    others: list[str]
    reported: tuple[int, int]
    splits: list[tuple[tuple[int, ...], tuple[int, ...], int]]


def count_microbatches(
    group: dist.ProcessGroup,
    schedule: str,
    microbatches: list[SequenceLayout],
    num_depths: int,
    num_tensors: int = 5,
    max_documents: int = 128,
) -> list[Count]:
    """The first microbatch also holds the agreement; by the roller's word that is no message."""
    roller = make_roller(schedule, group, num_depths, max_documents=max_documents)
    counts = []
    for layout in microbatches:
        batch = local_batch(group, schedule, layout, num_depths, num_tensors)
        before = (roller.traffic.messages, roller.traffic.bytes)
        with counting(group) as wire:
            rolls = roller.start(batch, layout)
            for depth in range(1, num_depths + 1):
                rolls.at(depth)
            for depth in range(num_depths, 0, -1):
                rolls.at(depth)
        reported = (roller.traffic.messages - before[0], roller.traffic.bytes - before[1])
        counts.append(Count(wire.per_peer, wire.num_bytes, wire.others, reported, wire.splits))
    roller.close()
    return counts


def documents(cp_size: int, number: int, kind: str = "zigzag") -> SequenceLayout:
    """`number` documents of 1, 2, 3, 1, ... tokens a chunk."""
    lengths = [2 * cp_size * (1 + i % 3) for i in range(number)]
    return SequenceLayout.packed([sum(lengths[:i]) for i in range(number + 1)], cp_size, kind)


def assert_reported(count: Count) -> None:
    assert count.reported == (sum(count.per_peer.values()), count.num_bytes)


@pytest.mark.parametrize("num_depths", [1, 2, 9])
@pytest.mark.parametrize("num_tensors", [1, 5])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_prefetch_sends_at_most_one_message_a_peer(pool: RankPool, cp_size, num_tensors, num_depths):
    for kind in ("zigzag", "contiguous"):
        dense = SequenceLayout.dense(8 * cp_size, cp_size, kind)
        few, many = documents(cp_size, 1, kind), documents(cp_size, 8, kind)
        for microbatches in ([dense] * 3, [few, many, few]):
            results = pool.run(
                count_microbatches, cp_size, "prefetch", microbatches, num_depths, num_tensors, 8
            )
            for counts in results:
                assert counts[0].others in ([], ["all_gather_object"])
                for count in counts:
                    assert all(messages == 1 for messages in count.per_peer.values())
                    assert_reported(count)
                assert [count.others for count in counts[1:]] == [[], []]
            assert all(sum(one[i].num_bytes for one in results) > 0 for i in range(3))


@settings(max_examples=30, deadline=None)
@given(layout=layouts(cp_sizes=(2, 3, 4, 8), max_documents=8), num_depths=st.integers(1, 9))
def test_no_layout_makes_prefetch_send_more(pool: RankPool, layout, num_depths):
    for counts in pool.run(count_microbatches, layout.cp_size, "prefetch", [layout] * 2, num_depths, 5, 8):
        for count in counts:
            assert all(messages == 1 for messages in count.per_peer.values())
            assert_reported(count)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_prepared_sends_nothing(pool: RankPool, cp_size):
    for layout in (SequenceLayout.dense(8 * cp_size, cp_size), documents(cp_size, 8)):
        for counts in pool.run(count_microbatches, cp_size, "prepared", [layout] * 2, 3):
            for count in counts:
                assert not count.per_peer
                assert count.splits == []
                assert count.reported == (0, 0)
            assert counts[1].others == []


@pytest.mark.parametrize("schedule", ["merged", "overlap"])
@pytest.mark.parametrize("num_depths", [1, 3])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_merged_and_overlap_send_at_most_one_message_a_peer_and_depth(
    pool: RankPool, cp_size, num_depths, schedule
):
    for layout in (SequenceLayout.dense(8 * cp_size, cp_size), documents(cp_size, 8)):
        results = pool.run(count_microbatches, cp_size, schedule, [layout] * 2, num_depths, 5, 8)
        for counts in results:
            for count in counts:
                assert all(messages <= num_depths for messages in count.per_peer.values())
                assert_reported(count)
            assert counts[1].others == []
        assert all(sum(one[1].per_peer.values()) >= num_depths for one in results)


def boundaries(layout: SequenceLayout) -> list[Counter[int]]:
    """By sending rank, to whom: the neighbouring tokens of one document that two ranks hold."""
    owner = torch.empty(layout.seq_len, dtype=torch.int64)
    for rank in range(layout.cp_size):
        owner[layout.shard(torch.arange(layout.seq_len), rank)] = rank
    sent: list[Counter[int]] = [Counter() for _ in range(layout.cp_size)]
    bounds = layout.cu_seqlens.tolist()
    for start, length in zip(bounds, layout.valid_lengths.tolist(), strict=False):
        for i in range(start, start + length - 1):
            if owner[i] != owner[i + 1]:
                sent[int(owner[i + 1])][int(owner[i])] += 1
    return sent


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_sync_sends_one_message_per_tensor_depth_and_document_boundary(pool: RankPool, cp_size, kind):
    bounds = [0, 2 * cp_size, 2 * cp_size, 8 * cp_size, 12 * cp_size]
    unpadded = [torch.zeros(n) for n in (3, 0, 1, 5 * cp_size, 2 * cp_size + 1)]
    for layout in (
        SequenceLayout.dense(8 * cp_size, cp_size, kind),
        SequenceLayout.packed(bounds, cp_size, kind),
        documents(cp_size, 7, kind),
        pad_documents(unpadded, cp_size, kind)[1],
    ):
        for num_depths, num_tensors in ((1, 1), (3, 5)):
            results = pool.run(count_microbatches, cp_size, "sync", [layout] * 2, num_depths, num_tensors)
            for counts, expected in zip(results, boundaries(layout), strict=True):
                per_tensor_and_depth = {peer: n * num_depths * num_tensors for peer, n in expected.items()}
                for count in counts:
                    assert dict(count.per_peer) == per_tensor_and_depth
                    assert_reported(count)
                assert counts[1].others == []


@pytest.mark.parametrize("schedule", ["merged", "overlap", "prefetch"])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_message_lengths_do_not_change_with_the_documents(pool: RankPool, kind, schedule):
    """Two ranks can never disagree on a length, whatever cu_seqlens each of them has within max_documents."""
    cp_size, unit = 3, 6
    bounds = [
        [0, 8 * unit],
        [0, unit, 2 * unit, 5 * unit, 8 * unit],
        [0, 0, 0, 8 * unit, 8 * unit],
        [unit * i for i in range(9)],
    ]
    microbatches = [SequenceLayout.packed(one, cp_size, kind) for one in bounds]
    microbatches.append(SequenceLayout.packed(bounds[1], cp_size, kind, [1, 0, 3 * unit - 1, unit]))
    results = pool.run(count_microbatches, cp_size, schedule, microbatches, 4, 5, 8)
    for counts in results:
        first = counts[0].splits
        assert first
        assert [count.splits for count in counts] == [first] * len(microbatches)
    for sender, counts in enumerate(results):
        for exchange, (sent, _, _) in enumerate(counts[0].splits):
            for receiver, rows in enumerate(sent):
                assert results[receiver][0].splits[exchange][1][sender] == rows


def messages_of_a_model(group: dist.ProcessGroup, derive_labels: bool) -> dict[int, int]:
    """How many messages a forward pass sends to each peer."""
    torch.manual_seed(0)
    model = GPT(replace(SMALL, derive_labels=derive_labels), group)
    layout = layout_of("packed", group.size(), "zigzag")
    batch = {name: layout.shard(tensor, group.rank()) for name, tensor in make_batch(layout).items()}
    if derive_labels:
        del batch["labels"]
    model(batch, layout)  # the agreement of the first exchange
    with counting(group) as wire:
        model(batch, layout)
    model.mtp.roller.close()
    return dict(wire.per_peer)


@pytest.mark.parametrize("derive_labels", [False, True])
def test_a_model_sends_one_message_a_peer_with_derived_labels_too(pool: RankPool, derive_labels):
    for found in pool.run(messages_of_a_model, 4, derive_labels):
        assert found
        assert set(found.values()) == {1}
