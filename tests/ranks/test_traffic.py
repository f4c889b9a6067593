"""Messages counted where they leave, at torch.distributed. What the library says of itself is checked against that."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import SMALL, layout_of, make_batch

from overlap_mtp import SequenceLayout, make_roller, pad_documents
from overlap_mtp.model.gpt import GPT

from cases import PACKED, Microbatch
from rank_pool import RankPool
from strategies import ALL_DTYPES, KINDS, layouts, random_batch

RECEIVING = {"irecv", "recv"}
VERBS = ("all_", "barrier", "broadcast", "gather", "recv", "reduce", "scatter", "send")
WATCHED = [
    name
    for name in dist.distributed_c10d.__all__
    if any(verb in name for verb in VERBS) and name.islower() and callable(getattr(dist, name))
]


@dataclass
class Sent:
    """What left this rank: (peer, bytes) of each message, the split sizes, and calls of another kind."""

    messages: list[tuple[int, int]] = field(default_factory=list)
    splits: list[tuple[tuple[int, ...], tuple[int, ...], int]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def per_peer(self) -> Counter[int]:
        return Counter(peer for peer, _ in self.messages)


@contextlib.contextmanager
def counting(group: dist.ProcessGroup) -> Iterator[Sent]:
    """Count as cp ranks' messages all that `torch.distributed` is asked to send."""
    sent = Sent()
    all_to_all_single, isend = dist.all_to_all_single, dist.isend

    def counted_all_to_all(output, input, output_split_sizes=None, input_split_sizes=None, **options):  # noqa: A002
        received, given = (
            list(sizes or [len(rows) // group.size()] * group.size())
            for sizes, rows in ((output_split_sizes, output), (input_split_sizes, input))
        )
        row_bytes = input[0].nbytes if len(input) else 0
        sent.splits.append((tuple(given), tuple(received), row_bytes))
        sent.messages += [
            (peer, rows * row_bytes) for peer, rows in enumerate(given) if rows and peer != group.rank()
        ]
        return all_to_all_single(output, input, output_split_sizes, input_split_sizes, **options)

    def counted_isend(tensor, dst=None, *args, **options):
        sent.messages.append((dist.get_group_rank(group, dst), tensor.nbytes))
        return isend(tensor, dst, *args, **options)

    def noted(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args, **options):
            if name not in RECEIVING:
                sent.others.append(name)
            return original(*args, **options)

        return call

    counted = {"all_to_all_single": counted_all_to_all, "isend": counted_isend}
    with mock.patch.multiple(dist, **{name: noted(name) for name in WATCHED} | counted):
        yield sent


def count_microbatches(
    group: dist.ProcessGroup,
    schedule: str,
    microbatches: list[SequenceLayout],
    num_depths: int,
    num_tensors: int = 5,
    max_documents: int = 128,
    check_layouts: bool = False,
) -> list[Sent]:
    """What leaves for each microbatch; the roller must report the same.

    The first one also holds the agreement, which does not count as a message, as the check of layouts does not.
    """
    roller = make_roller(
        schedule, group, num_depths, max_documents=max_documents, check_layouts=check_layouts
    )
    check = ["all_gather"] * (1 + num_depths) * check_layouts
    counts = []
    for layout in microbatches:
        dtypes = dict(list(ALL_DTYPES.items())[:num_tensors])
        batch = Microbatch(group, layout, random_batch(layout, dtypes=dtypes))
        before = replace(roller.traffic)
        with counting(group) as sent:
            rolls = batch.start(roller)
            for depth in [*range(1, num_depths + 1), *range(num_depths, 0, -1)]:
                rolls.at(depth)
        before.add(len(sent.messages), sum(size for _, size in sent.messages))
        assert roller.traffic == before
        counts.append(sent)
    assert counts[0].others in ([], ["all_gather_object", *check])
    assert all(count.others == check for count in counts[1:])
    roller.close()
    return counts


def documents(cp_size: int, number: int, kind: str = "zigzag") -> SequenceLayout:
    """`number` documents of 1, 2, 3, 1, ... tokens a chunk."""
    lengths = [2 * cp_size * (1 + i % 3) for i in range(number)]
    return SequenceLayout.packed([sum(lengths[:i]) for i in range(number + 1)], cp_size, kind)


@pytest.mark.parametrize(
    ("schedule", "num_depths"),
    [
        ("batched", 2),
        ("prefetch", 1),
        ("prefetch", 2),
        ("prefetch", 9),
        *product(("merged", "overlap"), (1, 3)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_an_exchange_sends_at_most_one_message_a_peer(pool: RankPool, cp_size, kind, schedule, num_depths):
    exchanges = 1 if schedule in ("batched", "prefetch") else num_depths
    dense = SequenceLayout.dense(8 * cp_size, cp_size, kind)
    few, many = documents(cp_size, 1, kind), documents(cp_size, 8, kind)
    for microbatches in ([dense] * 3, [few, many, few]):
        for num_tensors in (1, 5):
            arguments = (schedule, microbatches, num_depths, num_tensors, 8)
            results = pool.run(count_microbatches, cp_size, *arguments)
            for counts in results:
                for count in counts:
                    assert all(messages <= exchanges for messages in count.per_peer.values())
                    assert kind == "contiguous" or len(count.messages) >= exchanges
            assert all(sum(len(counts[i].messages) for counts in results) >= exchanges for i in range(3))


@settings(max_examples=30)
@given(layout=layouts(cp_sizes=(2, 3, 4, 8), max_documents=8), num_depths=st.integers(1, 9))
def test_no_layout_makes_prefetch_send_more(pool: RankPool, layout, num_depths):
    for counts in pool.run(count_microbatches, layout.cp_size, "prefetch", [layout] * 2, num_depths, 5, 8):
        for count in counts:
            assert all(messages == 1 for messages in count.per_peer.values())


@pytest.mark.parametrize("cp_size", [2, 4])
def test_prepared_sends_nothing(pool: RankPool, cp_size):
    for layout in (SequenceLayout.dense(8 * cp_size, cp_size), documents(cp_size, 8)):
        for counts in pool.run(count_microbatches, cp_size, "prepared", [layout] * 2, 3):
            assert all(count.messages == count.splits == [] for count in counts)


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


@pytest.mark.parametrize("kind", KINDS)
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
        for num_depths, num_tensors, check in ((1, 1, True), (3, 5, False)):
            arguments = ("sync", [layout] * 2, num_depths, num_tensors, 128, check)
            results = pool.run(count_microbatches, cp_size, *arguments)
            for counts, expected in zip(results, boundaries(layout), strict=True):
                per_tensor_and_depth = {peer: n * num_depths * num_tensors for peer, n in expected.items()}
                assert [dict(count.per_peer) for count in counts] == [per_tensor_and_depth] * 2


@pytest.mark.parametrize("schedule", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_message_lengths_do_not_change_with_the_documents(pool: RankPool, kind, schedule):
    """Two ranks can never disagree on a length, whatever cu_seqlens each of them has within max_documents."""
    cp_size, chunks = 3, 6
    in_chunks = [[0, 8], [0, 1, 2, 5, 8], [0, 0, 0, 8, 8], list(range(9))]
    bounds = [[chunks * n for n in one] for one in in_chunks]
    microbatches = [SequenceLayout.packed(one, cp_size, kind) for one in bounds]
    microbatches.append(SequenceLayout.packed(bounds[1], cp_size, kind, [1, 0, 3 * chunks - 1, chunks]))
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
    with counting(group) as sent:
        model(batch, layout)
    model.mtp.roller.close()
    return dict(sent.per_peer)


@pytest.mark.parametrize("derive_labels", [False, True])
def test_a_model_sends_one_message_a_peer_with_derived_labels_too(pool: RankPool, derive_labels):
    for found in pool.run(messages_of_a_model, 4, derive_labels):
        assert found
        assert set(found.values()) == {1}
