"""The kernels of activations under the interpreter, against the same in plain torch and numpy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from overlap_mtp.exchange.plan import make_metadata
from overlap_mtp.exchange.row_spec import ALIGNMENT, DTYPES, RowSpec
from overlap_mtp.exchange.rows import HEADER, NOTHING, RowMaps, RowPlan, make_row_plans
from overlap_mtp.kernels import row_reference
from overlap_mtp.kernels.row_maps import RowMapper
from overlap_mtp.kernels.rows import BoundRows, RowConstants
from overlap_mtp.layout import SequenceLayout

from strategies import KINDS, layouts, random_tensor, same_bits

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted"
)
FINGERPRINT = 0x7654_3210_FEDC_BA98
ORDERS = ("[S, H]", "[S, B, H]", "[B, S, H]")


class Activations:
    """Random tensors of two widths, in one order, and buffers for them."""

    def __init__(self, order: str, length: int, hidden: int, dtype: torch.dtype, seed: int) -> None:
        self.order, self.length, self.widths, self.dtype = order, length, (hidden, hidden + 5), dtype
        self.generator = torch.Generator().manual_seed(seed)
        aligned = ALIGNMENT // dtype.itemsize
        self.elements = -(-sum(self.widths) * (1 if order == "[S, H]" else 2) // aligned) * aligned

    def bits(self, *shape: int) -> torch.Tensor:
        return random_tensor(shape, self.dtype, self.generator)

    def numbers(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator).to(self.dtype)

    def tensors(self, make) -> list[torch.Tensor]:
        if self.order == "[S, H]":
            return [make(self.length, hidden) for hidden in self.widths]
        if self.order == "[S, B, H]":
            return [make(self.length, 2, hidden) for hidden in self.widths]
        return [make(2, self.length, hidden).movedim(1, 0) for hidden in self.widths]

    def chosen(self, *shape: int, end: int) -> torch.Tensor:
        """Rows in [NOTHING, end), int32."""
        return torch.randint(NOTHING, end, shape, generator=self.generator, dtype=torch.int32)

    def different(self, count: int, end: int) -> torch.Tensor:
        """As `chosen`, each row once at most."""
        return torch.cat(
            [
                torch.randperm(end, generator=self.generator)[:count],
                torch.full((max(0, count - end),), NOTHING),
            ]
        ).int()[torch.randperm(count, generator=self.generator)]

    def bound(self, num_depths: int = 1, spare: int = 0, **groups: list[torch.Tensor]) -> BoundRows:
        """Kernels that are bound to words with the addresses of groups: of all tensors, for each depth."""
        layout = SequenceLayout.dense(self.length, 1, "contiguous")
        shapes = [torch.Size([hidden] if self.order == "[S, H]" else [2, hidden]) for hidden in self.widths]
        asked = ("overlap", "auto", num_depths, 1, layout.kind, layout.is_packed, layout.seq_len)
        seq_dim, device = int(self.order == "[B, S, H]"), torch.device("cpu")
        spec = RowSpec(*asked, ("a", "b"), self.dtype, tuple(shapes), seq_dim, 1, device)
        constants = RowConstants.of(spec)
        words = torch.zeros(constants[0].num_words, dtype=torch.int64)
        words[0], words[-1] = self.length, FINGERPRINT
        for name, tensors in groups.items():
            first = getattr(constants[0], f"{name}_at")
            addresses = [tensor.data_ptr() for tensor in tensors]
            words[first : first + len(addresses)] = torch.tensor(addresses)
        return BoundRows(constants, words, torch.tensor([FINGERPRINT]), self.length + spare)


def flat(depths: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [one for tensors in depths for one in tensors]


def no_headers() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 0, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)


activations = st.builds(
    Activations,
    st.sampled_from(ORDERS),
    length=st.sampled_from([1, 5, 20]),
    hidden=st.sampled_from([1, 3, 8, 300]),  # the last is more than a strip of float64
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies with the same strides."""
    return [torch.empty_like(tensor).copy_(tensor) for tensor in tensors]


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The interpreter does not round to bfloat16 as GPUs and torch do. All else has the same bits."""
    if found.dtype == torch.bfloat16:
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert same_bits(found, expected)


@settings(max_examples=25)
@given(make=activations, count=st.integers(1, 20))
def test_packed_rows_have_the_same_bits(make, count):
    tensors = make.tensors(make.bits)
    index = make.chosen(count, end=make.length)
    index[::5] = HEADER
    found, expected = copies([make.bits(count, make.elements)] * 2)
    make.bound(tensors=tensors).pack_rows(index, found)()
    row_reference.pack_rows(tensors, index.long(), expected, FINGERPRINT)
    assert same_bits(found, expected)


@settings(max_examples=25)
@given(make=activations, num_depths=st.integers(1, 3), count=st.integers(1, 20), spare=st.integers(0, 9))
def test_rolls_have_the_same_bits(make, num_depths, count, spare):
    tensors, buffer = make.tensors(make.bits), make.bits(count, make.elements)
    source = make.chosen(num_depths, make.length, end=make.length + count)
    back = torch.stack([make.different(count, make.length) for _ in range(num_depths)])
    back[0, ::5] = HEADER
    found = [make.tensors(make.bits) for _ in range(num_depths)]
    expected = [copies(one) for one in found]
    bound = make.bound(num_depths, spare, tensors=tensors, rolls=flat(found))
    bound.unroll_own_rows(torch.cat([source.flatten(), torch.zeros(spare, dtype=torch.int32)]))()
    bound.unroll_received_rows(back, buffer, *no_headers())()
    row_reference.unroll_own_rows(tensors, source.long(), expected)
    row_reference.unroll_received_rows(buffer, back.long(), expected)
    for one, other in zip(found, expected, strict=True):
        assert all(map(same_bits, one, other))


@settings(max_examples=25)
@given(make=activations, num_depths=st.integers(1, 3), spare=st.integers(0, 9))
def test_sums_of_own_rows_are_the_same(make, num_depths, spare):
    gradients = [make.tensors(make.numbers) for _ in range(num_depths)]
    back = torch.stack([make.different(make.length, make.length) for _ in range(num_depths)])
    back[make.chosen(num_depths, make.length, end=2) == NOTHING] = NOTHING
    found, expected = (make.tensors(make.bits) for _ in range(2))
    bound = make.bound(num_depths, spare, gradients=flat(gradients), sums=found)
    bound.sum_rows(torch.cat([back.flatten(), torch.zeros(spare, dtype=torch.int32)]))()
    row_reference.sum_rows(gradients, back.long(), expected)
    for one, other in zip(found, expected, strict=True):
        check(one, other)


@settings(max_examples=25)
@given(make=activations, num_depths=st.integers(1, 3), count=st.integers(1, 20))
def test_packed_sums_are_the_same(make, num_depths, count):
    gradients = [make.tensors(make.numbers) for _ in range(num_depths)]
    back = torch.stack([make.different(count, make.length) for _ in range(num_depths)])
    is_header = torch.arange(count) % 5 == 0
    back[:, is_header] = NOTHING
    back[0, is_header] = HEADER
    found, expected = copies([make.numbers(count, make.elements)] * 2)
    before = found.clone()
    make.bound(num_depths, gradients=flat(gradients)).pack_sums(back, found)()
    row_reference.pack_sums(gradients, back.long(), expected, FINGERPRINT)
    check(found[~is_header], expected[~is_header])
    assert (found.view(torch.int64)[is_header, 0] == FINGERPRINT).all()
    assert same_bits(found.view(torch.int64)[is_header, 1:], before.view(torch.int64)[is_header, 1:])


@settings(max_examples=25)
@given(make=activations, uses=st.integers(1, 3), count=st.integers(1, 20))
def test_rows_are_added_in_order(make, uses, count):
    buffer, found = make.numbers(9, make.elements), make.tensors(make.numbers)
    returned_to, returned = make.different(count, make.length), make.chosen(uses, count, end=9)
    expected, used = copies(found), returned_to >= 0
    make.bound(sums=found).add_rows(returned_to, returned, buffer, *no_headers())()
    row_reference.add_rows(buffer, returned_to[used].long(), returned[:, used].long(), expected)
    for one, other in zip(found, expected, strict=True):
        check(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["unroll_received_rows", "add_rows"])
def test_a_wrong_header_is_reported(direction, dtype):
    make = Activations("[B, S, H]", 4, 3, dtype, seed=1)
    tensors, buffer = make.tensors(make.numbers), make.numbers(6, make.elements)
    table = torch.tensor([[0, 4], [3, 1]]).int()

    def flags_of(*headers: int) -> list[int]:
        error_flags = torch.zeros(4, dtype=torch.int32)
        buffer.view(torch.int64)[table[0], 0] = torch.tensor(headers)
        bound = make.bound(2, rolls=tensors * 2, sums=tensors)
        if direction == "unroll_received_rows":
            bound.unroll_received_rows(make.chosen(2, 6, end=4), buffer, table, error_flags)()
        else:  # nothing comes back, but a header is read
            maps = torch.empty(0, dtype=torch.int32), torch.empty(2, 0, dtype=torch.int32)
            bound.add_rows(*maps, buffer, table, error_flags)()
        return error_flags.tolist()

    assert flags_of(FINGERPRINT, FINGERPRINT) == [0, 0, 0, 0]
    assert flags_of(FINGERPRINT ^ 1, FINGERPRINT) == [4, 0, 0, 0]
    assert flags_of(FINGERPRINT, FINGERPRINT ^ 1 << 62) == [2, 0, 0, 0]


def uses(maps: RowMaps) -> dict[int, list[int]]:
    """The rows of the buffer that are added to each own row, in order."""
    found = {}
    for own, at in zip(maps.returned_to.tolist(), maps.returned.T.tolist(), strict=True):
        if own != NOTHING:
            assert own not in found
            found[own] = [row for row in at if row != NOTHING]
    return found


def check_maps(layout: SequenceLayout, plans: list[RowPlan], block: int = 128, spare: int = 0) -> None:
    """The kernel's maps are those of numpy."""
    for plan in plans:
        metadata = torch.from_numpy(make_metadata(layout, plan.tokens))
        expected, held = RowMaps.of(layout, plan), layout.local_len // plan.tp_size
        mapper = RowMapper.of(plan, torch.device("cpu"))
        found = mapper.allocate(held + spare)
        mapper.bind(metadata, found, block)()
        for name in ("packed", "in_back"):
            assert torch.equal(getattr(found, name).long(), getattr(expected, name)), name
        for name in ("source", "own_back"):
            flat = getattr(expected, name).flatten()
            assert torch.equal(getattr(found, name)[: len(flat)].long(), flat), name
        assert uses(found) == uses(expected)


@settings(max_examples=25)
@given(
    layout=layouts(cp_sizes=(1, 2, 3)),
    num_depths=st.integers(1, 4),
    spare=st.integers(0, 2),
    by_depth=st.booleans(),
    tp=st.sampled_from([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]),
    cp_rank=st.integers(0, 2),
)
def test_the_device_makes_the_maps_that_the_host_makes(layout, num_depths, spare, by_depth, tp, cp_rank):
    assume(layout.local_len % tp[1] == 0)
    plans = make_row_plans(layout, num_depths, layout.num_documents + spare, by_depth, tp)
    check_maps(layout, [plans[cp_rank % layout.cp_size]], spare=spare)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_many_documents_and_blocks_are_the_same(kind):
    """Short chunks (zigzag), documents that end within a chunk (others), a tail, and many blocks of rows and slots."""
    layout = SequenceLayout.packed(range(0, 328, 8), 2, kind, [7] * 20 + [8] * 20, 332)
    plans = make_row_plans(layout, 3, layout.num_documents, False, (1, 2))
    check_maps(layout, plans, block=64, spare=100)
