"""Who holds which token, and what a roll is."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from overlap_mtp import DeviceLayout, SequenceLayout, pad_documents, roll_reference
from overlap_mtp.device_layout import layout_from

from cases import assert_names, error_of
from strategies import CP_SIZES, DTYPES, KINDS, layouts, random_tensor, same_bits

BOUNDS = torch.tensor([0, 4, 8])
# The bounds of documents, cp_size, kind, and the positions that each rank holds.
SHARDS = [
    ([0, 8], 1, "zigzag", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ([0, 4], 2, "zigzag", [[0, 3], [1, 2]]),
    ([0, 16], 2, "zigzag", [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]),
    ([0, 12], 3, "zigzag", [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]),
    ([0, 16], 4, "zigzag", [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]),
    ([0, 4, 12], 2, "zigzag", [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]),
    ([0, 4, 4, 12, 12], 2, "zigzag", [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]),
    ([0, 6, 18], 3, "zigzag", [[0, 5, 6, 7, 16, 17], [1, 4, 8, 9, 14, 15], [2, 3, 10, 11, 12, 13]]),
    ([0, 2, 6], 1, "zigzag", [[0, 1, 2, 3, 4, 5]]),
    ([0, 12], 3, "contiguous", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ([0, 1, 1, 7, 8], 2, "contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ([0, 1, 1, 7, 8], 2, "zigzag_stream", [[0, 1, 6, 7], [2, 3, 4, 5]]),
    ([0, 5, 12], 3, "zigzag_stream", [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]),
]


def shards_of(layout: SequenceLayout) -> list[list[int]]:
    return [layout.shard(torch.arange(layout.seq_len), rank).tolist() for rank in range(layout.cp_size)]


@pytest.mark.parametrize(("cu_seqlens", "cp_size", "kind", "expected"), SHARDS)
def test_shards_follow_the_public_convention(cu_seqlens, cp_size, kind, expected):
    """Zigzag cuts each packed document by itself; the others cut the stream wherever documents end."""
    for given_as in (cu_seqlens, np.array(cu_seqlens, np.int32), torch.tensor(cu_seqlens, dtype=torch.int32)):
        assert shards_of(SequenceLayout.packed(given_as, cp_size, kind)) == expected
    if kind != "zigzag" or len(cu_seqlens) == 2:
        assert shards_of(SequenceLayout.dense(cu_seqlens[-1], cp_size, kind)) == expected


def test_positions_are_the_callers():
    layout = SequenceLayout.packed([0, 4, 12], 2)
    before = shards_of(layout)
    layout.positions(0)[:] = 0
    assert shards_of(layout) == before
    assert layout.positions(0).tolist() == before[0]


@pytest.mark.parametrize(
    ("kind", "seq_len", "shards"),
    [
        ("zigzag", 10, [[0, 3, 4, 5, 6], [1, 2, 7, 8, 9]]),  # a tail of 6 tokens, no multiple of 4
        ("zigzag_stream", 8, [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ("contiguous", 6, [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_a_tail_belongs_to_no_document(kind, seq_len, shards):
    layout = SequenceLayout.packed([0, 4], 2, kind, [3], seq_len)
    assert shards_of(layout) == shards
    assert (layout.seq_len, layout.tail_len, layout.num_documents) == (seq_len, seq_len - 4, 2)
    stream = torch.arange(1, seq_len + 1)
    assert roll_reference(stream, layout, 1).tolist() == [2, 3, 0, 0, *range(5, seq_len + 1)]
    assert roll_reference(stream, layout, 2).tolist() == [3, 0, 0, 0, *range(5, seq_len + 1)]
    valid = torch.from_numpy(layout.unshard([layout.valid(rank) for rank in range(2)]))
    assert valid.tolist() == [True] * 3 + [False] * (seq_len - 3)
    assert layout.key != SequenceLayout.packed([0, 4, seq_len], 2, "contiguous", [3, 0]).key


@pytest.mark.parametrize(
    ("kind", "seq_len", "message"),
    [
        ("zigzag", 3, "seq_len must be at least the last entry of cu_seqlens, 4, got 3"),
        ("zigzag", 7, "seq_len must be a multiple of cp_size 2, got 7"),
        ("zigzag_stream", 6, "the stream's length seq_len must be a positive multiple of 4"),
        ("contiguous", 7, "the stream's length seq_len must be a positive multiple of 2"),
    ],
)
def test_a_tail_must_be_shared_equally(kind, seq_len, message):
    with pytest.raises(ValueError, match=message):
        SequenceLayout.packed([0, 4], 2, kind, seq_len=seq_len)


def test_padding_does_not_change_who_holds_what():
    padded = SequenceLayout.packed([0, 4, 12], 2, valid_lengths=[1, 5])
    assert shards_of(padded) == shards_of(SequenceLayout.packed([0, 4, 12], 2))


@given(cp_size=st.sampled_from(CP_SIZES), chunks=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_rank_r_holds_chunks_r_and_its_mirror_of_every_document(cp_size, chunks):
    assume(any(chunks))
    lengths = [2 * cp_size * n for n in chunks]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    layout = SequenceLayout.packed(bounds, cp_size)
    stream = np.arange(layout.seq_len)
    for rank in range(cp_size):
        expected = []
        for start, end in pairwise(bounds):
            pieces = np.split(stream[start:end], 2 * cp_size)
            expected += [pieces[rank], pieces[2 * cp_size - 1 - rank]]
        np.testing.assert_array_equal(layout.shard(stream, rank), np.concatenate(expected))


@given(
    layout=layouts(),
    others=st.lists(st.integers(1, 3), max_size=3),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
)
def test_unshard_undoes_shard(layout, others, data, dtype):
    at = data.draw(st.integers(0, len(others)))
    shape = (*others[:at], layout.seq_len, *others[at:])
    dim = at - data.draw(st.sampled_from([0, len(shape)]))
    tensor = random_tensor(shape, dtype, torch.Generator().manual_seed(0))
    shards = [layout.shard(tensor, rank, dim=dim) for rank in range(layout.cp_size)]
    assert {one.shape[dim] for one in shards} == {layout.seq_len // layout.cp_size}
    assert same_bits(layout.unshard(shards, dim=dim), tensor)

    array = np.arange(np.prod(shape)).reshape(shape).astype(np.uint16)
    pieces = [layout.shard(array, rank, dim=dim) for rank in range(layout.cp_size)]
    same = torch.from_numpy(array.astype(np.int64))
    for rank, piece in enumerate(pieces):
        np.testing.assert_array_equal(piece, layout.shard(same, rank, dim=dim).numpy())
    back = layout.unshard(pieces, dim=dim)
    assert isinstance(back, np.ndarray)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def documents_of(lengths: list[int], as_torch: bool) -> list:
    """Documents that hold the tokens 1, 2, 3, ... one after the other: none of them looks like padding."""
    ends = np.cumsum(lengths)
    arrays = [np.arange(end - n + 1, end + 1, dtype=np.int32) for n, end in zip(lengths, ends, strict=True)]
    return [torch.from_numpy(one) for one in arrays] if as_torch else arrays


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    cp_size=st.sampled_from(CP_SIZES),
    kind=st.sampled_from(KINDS),
    as_torch=st.booleans(),
    spare=st.none() | st.integers(0, 3),
)
def test_pad_documents_makes_any_documents_legal(lengths, cp_size, kind, as_torch, spare):
    documents = documents_of(lengths, as_torch)
    multiple = cp_size if kind == "contiguous" else 2 * cp_size
    seq_len = None
    if spare is not None:
        seq_len = (sum(-(-n // multiple) for n in lengths) + 1 + spare) * multiple
    stream, layout = pad_documents(documents, cp_size, kind=kind, pad_value=-1, seq_len=seq_len)

    assert type(stream) is type(documents[0])
    assert stream.dtype == documents[0].dtype
    assert stream.shape == (layout.seq_len,)
    assert (layout.cp_size, layout.kind, layout.num_documents) == (cp_size, kind, len(documents))
    assert seq_len is None or layout.seq_len == seq_len
    SequenceLayout.packed(layout.cu_seqlens, cp_size, kind, layout.valid_lengths)  # legal, or it raises
    assert layout.valid_lengths.tolist() == lengths
    values, is_padding = np.asarray(stream), np.ones(layout.seq_len, bool)
    for document, start, length in zip(documents, layout.cu_seqlens, lengths, strict=False):
        np.testing.assert_array_equal(values[start : start + length], np.asarray(document))
        is_padding[start : start + length] = False
    assert (values[is_padding] == -1).all()
    shards = [layout.shard(stream, rank) for rank in range(cp_size)]
    np.testing.assert_array_equal(np.asarray(layout.unshard(shards)), values)


def test_pad_documents_pads_each_document_for_zigzag_and_the_stream_for_contiguous():
    documents = documents_of([3, 0, 1, 5], as_torch=True)
    stream, layout = pad_documents(documents, 2)
    assert stream.tolist() == [1, 2, 3, 0, 4, 0, 0, 0, 5, 6, 7, 8, 9, 0, 0, 0]
    assert layout.cu_seqlens.tolist() == [0, 4, 4, 8, 16]
    stream, layout = pad_documents(documents, 2, kind="contiguous")
    assert stream.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert layout.cu_seqlens.tolist() == [0, 3, 3, 4, 10]


@pytest.mark.parametrize("make", [list, tuple, lambda one: one, np.array, torch.tensor])
def test_pad_documents_takes_lists(make):
    """Lists of ids, of floats (weights) and of bools (masks), empty ones among them."""
    for dtype, values in ((torch.int64, range(1, 6)), (torch.float32, [0.5] * 5), (torch.bool, [True] * 5)):
        documents = [[], list(values), list(values)[:2]]
        stream, layout = pad_documents([make(one) if one else one for one in documents], 2)
        expected = torch.tensor(documents[1] + [0] * 3 + documents[2] + [0] * 2, dtype=dtype)
        assert torch.equal(torch.as_tensor(stream), expected.to(torch.as_tensor(stream).dtype))
        assert make is np.array or same_bits(stream, expected)
        assert layout.valid_lengths.tolist() == [0, 5, 2]
    assert same_bits(pad_documents([[], []], 2)[0], torch.zeros(4, dtype=torch.int64))
    for empty in (np.zeros(0, np.int64), torch.zeros(0), []):
        assert pad_documents([empty, torch.arange(3)], 2)[0].tolist() == [0, 1, 2, 0]
        assert pad_documents([np.arange(3), empty], 2)[0].tolist() == [0, 1, 2, 0]
    assert pad_documents(torch.ones(2, 3), 2)[0].tolist() == [1, 1, 1, 0] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_documents_without_a_token_are_legal(kind):
    stream, layout = pad_documents([torch.zeros(0, dtype=torch.int64)] * 3, 4, kind=kind)
    assert layout.seq_len > 0
    assert layout.valid_lengths.tolist() == [0, 0, 0]
    assert roll_reference(stream + 5, layout, 1).tolist() == [0] * layout.seq_len


def roll_by_definition(tensor: torch.Tensor, layout: SequenceLayout, depth: int, fill) -> torch.Tensor:
    """Position by position: entry i is entry i + depth while that is a valid token of i's document."""
    rolled = torch.empty_like(tensor)
    bounds, valid = layout.cu_seqlens.tolist(), layout.valid_lengths.tolist()
    for document, length in enumerate(valid):
        for i in range(bounds[document], bounds[document + 1]):
            inside = i + depth < bounds[document] + length
            rolled[..., i] = tensor[..., i + depth] if inside else fill
            if length == -1:  # a tail
                rolled[..., i] = tensor[..., i]
    return rolled


@given(
    layout=layouts(),
    depth=st.integers(1, 9),
    rows=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    fill=st.booleans(),
)
def test_roll_reference_is_the_definition(layout, depth, rows, dtype, fill):
    tensor = random_tensor((rows, layout.seq_len), dtype, torch.Generator().manual_seed(1))
    before = tensor.clone()
    expected = roll_by_definition(tensor, layout, depth, fill)
    assert same_bits(roll_reference(tensor, layout, depth, fill), expected)
    assert same_bits(tensor, before)


def test_roll_reference_on_documents_shorter_than_the_depth():
    layout = SequenceLayout.packed([0, 4, 4, 8, 16], 2, valid_lengths=[3, 0, 1, 8])
    tokens = torch.arange(1, 17)
    by_one, by_two = [2, 3, *[0] * 6, *range(10, 17), 0], [3, *[-7] * 7, *range(11, 17), -7, -7]
    assert roll_reference(tokens, layout, 1).tolist() == by_one
    assert roll_reference(tokens, layout, 2, fill=-7).tolist() == by_two
    assert roll_reference(tokens, layout, 100).tolist() == [0] * 16


@pytest.mark.parametrize(
    ("seq_len", "cp_size", "kind", "multiple", "next_legal"),
    [
        (10, 2, "zigzag", 4, 12),
        (2, 2, "zigzag", 4, 4),
        (0, 2, "zigzag", 4, 4),
        (-4, 2, "zigzag", 4, 4),
        (7, 1, "zigzag", 2, 8),
        (9, 4, "contiguous", 4, 12),
        (0, 3, "contiguous", 3, 3),
    ],
)
def test_an_illegal_dense_length_names_the_next_legal_one(seq_len, cp_size, kind, multiple, next_legal):
    message = error_of(SequenceLayout.dense, seq_len, cp_size, kind)
    assert_names(message, *map(str, (seq_len, cp_size, multiple, next_legal)), kind, "pad_documents")
    assert SequenceLayout.dense(next_legal, cp_size, kind).seq_len == next_legal


@pytest.mark.parametrize("as_type", [list, np.array, torch.tensor])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("cu_seqlens", "words"),
    [
        ([4, 8], ["cu_seqlens", "start at 0", "4"]),
        ([-4, 4], ["cu_seqlens", "start at 0", "-4"]),
        ([0, 8, 4, 8], ["cu_seqlens", "decrease", "8", "4"]),
        ([0, 4, 0], ["cu_seqlens", "decrease", "4", "0"]),
        ([0], ["cu_seqlens", "start at 0", "document"]),
        ([], ["cu_seqlens"]),
        ([0.0, 4.0], ["cu_seqlens"]),
        ([0, 0, 0], ["0", "pad_documents"]),
    ],
)
def test_illegal_cu_seqlens_are_refused(cu_seqlens, words, kind, as_type):
    assert_names(error_of(SequenceLayout.packed, as_type(cu_seqlens), 2, kind), *words)


DOCUMENTS = documents_of([3, 5], as_torch=True)
LAYOUT = SequenceLayout.packed([0, 4, 16], 2)
KIND_WORDS = [*KINDS, "striped"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SequenceLayout.packed([0, 4, 9, 16], 2), ["document 1", "5", "4", "8", "pad_documents"]),
        (lambda: SequenceLayout.packed([0, 6, 12, 13], 3), ["document 2", "1", "6", "pad_documents"]),
        (lambda: SequenceLayout.packed([0, 3, 10], 4, "contiguous"), ["10", "4", "12", "pad_documents"]),
        (lambda: SequenceLayout.packed([0, 4, 12], 2, valid_lengths=[5, 8]), ["0", "4", "5"]),
        (lambda: SequenceLayout.packed([0, 4, 12], 2, valid_lengths=[-1, 8]), ["0", "4", "-1"]),
        (lambda: SequenceLayout.packed([0, 4, 12], 2, valid_lengths=[4, 9]), ["0", "8", "9"]),
        (lambda: SequenceLayout.packed([0, 4, 12], 2, valid_lengths=[4]), ["1", "2"]),
        (lambda: SequenceLayout.dense(16, 2, "striped"), KIND_WORDS),
        (lambda: SequenceLayout.packed([0, 16], 2, "striped"), KIND_WORDS),
        (lambda: LAYOUT.shard(torch.zeros(16), 2), ["0, 1", "2"]),
        (lambda: LAYOUT.shard(torch.zeros(16), -1), ["0, 1", "-1"]),
        (lambda: roll_reference(torch.zeros(2, 20), LAYOUT, 1), ["16", "20"]),
        (lambda: roll_reference(torch.zeros(16), LAYOUT, 0), ["1", "0"]),
        (lambda: roll_reference(torch.zeros(16), LAYOUT, -1), ["1", "-1"]),
        (lambda: pad_documents([], 2), ["one document"]),
        (lambda: pad_documents([torch.zeros(2, 3)], 2), ["1-D", "document 0"]),
        (lambda: pad_documents([[1], [[1, 2], [3, 4]]], 2), ["1-D", "document 1"]),
        (lambda: pad_documents([[1], [[1, 2], [3]]], 2), ["1-D", "document 1", "list"]),
        (lambda: pad_documents([1, 2, 3], 2), ["1-D", "document 0", "int"]),
        (lambda: pad_documents(["text"], 2), ["document 0", "str"]),
        (lambda: pad_documents([[1], [0.5]], 2), ["torch.int64", "document 1", "torch.float32"]),
        (
            lambda: pad_documents([*DOCUMENTS, torch.zeros(1)], 2),
            ["torch.int32", "document 2", "torch.float32"],
        ),
        (lambda: pad_documents(DOCUMENTS, 2, multiple_of=0), ["multiple_of", "1", "0"]),
        (lambda: pad_documents(DOCUMENTS, 2, seq_len=8), ["4", "12", "8"]),
        (lambda: pad_documents(DOCUMENTS, 2, seq_len=14), ["4", "12", "14"]),
        (lambda: pad_documents(DOCUMENTS, 2, seq_len=0), ["0", "12"]),
    ],
)
def test_illegal_arguments_are_refused(call, words):
    assert_names(error_of(call), *words)


def on_device(bounds, seq_len=8, valid=None, kind="zigzag") -> DeviceLayout:
    return DeviceLayout(bounds, seq_len, 2, kind, valid)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: on_device([0, 8]), ["cu_seqlens", "tensor", "list", "SequenceLayout"]),
        (lambda: on_device(torch.tensor([0.0, 8])), ["cu_seqlens", "int32", "int64", "float32"]),
        (lambda: on_device(torch.tensor([[0, 8]])), ["cu_seqlens", "two entries", "1, 2"]),
        (lambda: on_device(torch.tensor([0])), ["cu_seqlens", "two entries", "1"]),
        (lambda: on_device(torch.tensor([0, 4, 8])[::2]), ["cu_seqlens", "contiguous"]),
        (lambda: on_device(BOUNDS, valid=[0, 8]), ["cu_valid", "tensor", "list"]),
        (lambda: on_device(BOUNDS, valid=BOUNDS.int()), ["cu_valid", "dtype", "cu_seqlens"]),
        (lambda: on_device(BOUNDS, valid=torch.tensor([0, 8])), ["cu_valid", "shape", "cu_seqlens"]),
        (lambda: on_device(BOUNDS, valid=BOUNDS.to("meta")), ["cu_valid", "device", "cu_seqlens"]),
        (lambda: on_device(BOUNDS, 7), ["seq_len", "2", "7"]),
        (lambda: on_device(BOUNDS, 0), ["4", "0"]),
        (lambda: on_device(BOUNDS, 6, kind="zigzag_stream"), ["seq_len", "4", "6"]),
        (lambda: on_device(BOUNDS, kind="striped"), ["kind", "striped"]),
        (lambda: layout_from(SimpleNamespace(cu_seqlens_q=None), 4, 2), ["cu_seqlens_q"]),
        (
            lambda: layout_from(
                SimpleNamespace(cu_seqlens_q=BOUNDS.to("meta"), cu_seqlens_q_padded=BOUNDS), 4, 2
            ),
            ["one device", "cu_seqlens_q", "meta"],
        ),
    ],
)
def test_illegal_bounds_of_a_framework_are_refused(call, words):
    assert_names(error_of(call), *words)


def test_a_device_layout_keeps_the_name_of_its_batch():
    named = on_device(BOUNDS).of_batch("sample 3")
    assert named.batch == named.on_host().batch == SequenceLayout.packed([0, 8], 2).of_batch("sample 3").batch
    assert named.on_host() == SequenceLayout.packed([0, 4, 8], 2)


def test_layouts_of_other_kinds_are_not_equal():
    made = {SequenceLayout.packed([0, 8], 2, kind) for kind in KINDS}
    made |= {SequenceLayout.dense(8, 2, kind) for kind in KINDS}
    assert len(made) == 2 * len(KINDS)


@pytest.mark.parametrize("cp_size", [0, -1])
def test_cp_sizes_below_one_are_refused(cp_size):
    assert_names(error_of(SequenceLayout.dense, 16, cp_size), "1", str(cp_size))
    assert_names(error_of(SequenceLayout.packed, [0, 16], cp_size), "1", str(cp_size))
    assert_names(error_of(pad_documents, [torch.zeros(3)], cp_size), "1", str(cp_size))


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_tensors_of_another_length_than_the_layouts_are_refused(make):
    assert_names(error_of(LAYOUT.shard, make((2, 20)), 0), "16", "20")
    assert_names(error_of(LAYOUT.shard, make((12, 2)), 0, 0), "16", "12")
    assert_names(error_of(LAYOUT.unshard, [make((2, 8)), make((2, 10))]), "8", "10")
    assert_names(error_of(LAYOUT.unshard, [make((2, 8))]), "2", "1")


def test_the_name_of_a_batch_is_a_string_and_no_part_of_a_layout():
    layout = SequenceLayout.packed([0, 4, 8], 1)
    named = layout.of_batch("samples 3 and 4")
    assert layout.batch == 0 != named.batch == layout.of_batch("samples 3 and 4").batch
    assert named.batch != layout.of_batch("samples 4 and 3").batch
    assert named == layout
    with pytest.raises(TypeError, match=r"must be a string, got int: pass str\(\.\.\.\)"):
        layout.of_batch(3)
