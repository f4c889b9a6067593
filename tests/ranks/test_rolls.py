"""Every schedule against the oracle, bit for bit, on 2, 3, 4 and 8 ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, prepare, roll_reference, roll_tensor
from overlap_mtp.exchange.spec import fill_of

from rank_pool import RankPool, device_of
from strategies import DTYPES, layouts, random_tensor, same_bits

NAMES = ("input_ids", "position_ids", "labels", "loss_mask", "padding_mask")


def full_batch(layout: SequenceLayout, batch: int, dtypes: dict[str, torch.dtype], seed: int):
    generator = torch.Generator().manual_seed(seed)
    return {name: random_tensor((batch, layout.seq_len), dtype, generator) for name, dtype in dtypes.items()}


def rolls_differ(
    group: dist.ProcessGroup,
    layout: SequenceLayout,
    num_depths: int,
    batch: int,
    dtypes: dict[str, torch.dtype],
    seed: int,
    schedules: tuple[str, ...] = SCHEDULES,
    transport: str = "auto",
) -> list[str]:
    """What differs from the oracle, by schedule, tensor and depth: an empty list where all is well.

    Three microbatches are in flight before the first is joined.
    """
    wrong = []
    rank, device = group.rank(), device_of(group)
    for schedule in schedules:
        roller = make_roller(schedule, group, num_depths, transport, max_documents=layout.num_documents)
        full = [full_batch(layout, batch, dtypes, seed + i) for i in range(3)]
        started = []
        for one in full:
            given_to_all = prepare(one, layout, num_depths) if schedule == "prepared" else one
            local = {name: layout.shard(t, rank).to(device) for name, t in given_to_all.items()}
            started.append(roller.start(local, layout))
        for i, (one, rolls) in enumerate(zip(full, started, strict=True)):
            for depth in range(1, num_depths + 1):
                rolled = rolls.at(depth)
                assert sorted(rolled) == sorted(one)
                for name, tensor in one.items():
                    expected = roll_reference(tensor, layout, depth, fill_of(name))
                    if not same_bits(rolled[name].cpu(), layout.shard(expected, rank)):
                        wrong.append(f"{schedule} microbatch {i} {name} {dtypes[name]} depth {depth}")
        roller.close()
    return wrong


dtype_choices = st.fixed_dictionaries({}, optional={name: st.sampled_from(DTYPES) for name in NAMES}).filter(
    bool
)


@settings(max_examples=60, deadline=None)
@given(
    layout=layouts(cp_sizes=(2, 3, 4, 8)),
    num_depths=st.integers(1, 5),
    batch=st.integers(1, 2),
    dtypes=dtype_choices,
    seed=st.integers(0, 999),
)
def test_rolls_are_exact_on_any_layout(pool: RankPool, layout, num_depths, batch, dtypes, seed):
    results = pool.run(rolls_differ, layout.cp_size, layout, num_depths, batch, dtypes, seed)
    assert results == [[]] * layout.cp_size


CASES = [
    ("dense", SequenceLayout.dense),
    ("packed", lambda n, cp_size, kind: SequenceLayout.packed([0, n // 2, n // 2, n], cp_size, kind)),
    (
        "padded",
        lambda n, cp_size, kind: SequenceLayout.packed([0, n // 4, n], cp_size, kind, [n // 4 - 1, n // 2]),
    ),
]


@pytest.mark.parametrize("num_depths", [1, 2, 9])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("documents", [case[0] for case in CASES])
@pytest.mark.parametrize("cp_size", [2, 3, 4, 8])
def test_rolls_are_exact(pool: RankPool, cp_size, documents, kind, num_depths):
    layout = dict(CASES)[documents](16 * cp_size, cp_size, kind)
    dtypes = dict(zip(NAMES, DTYPES, strict=True))
    results = pool.run(rolls_differ, cp_size, layout, num_depths, 2, dtypes, 7)
    assert results == [[]] * cp_size


def roll_tensor_differs(group: dist.ProcessGroup, dims: int, shifts: int) -> list[str]:
    layout = SequenceLayout.dense(8 * group.size(), group.size())
    wrong = []
    for dtype in DTYPES:
        full = random_tensor((3, layout.seq_len), dtype, torch.Generator().manual_seed(1))
        local = layout.shard(full, group.rank()).to(device_of(group))
        expected = layout.shard(roll_reference(full, layout, -shifts), group.rank())
        if dims == 0:
            local = local.T.contiguous()
        rolled, total = roll_tensor(local, shifts=shifts, dims=dims, cp_group=group)
        rolled = rolled.T if dims == 0 else rolled
        sums = torch.int64 if not dtype.is_floating_point else torch.float32
        if not same_bits(rolled.cpu(), expected):
            wrong.append(f"{dtype}")
        same_sum = torch.equal(total.cpu(), rolled.cpu().sum(dtype=sums)) or bool(total.isnan())
        if total.dtype != sums or not same_sum:
            wrong.append(f"sum of {dtype}: {total}")
    return wrong


@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize(("dims", "shifts"), [(-1, -1), (0, -1), (1, -2), (-1, -5)])
def test_roll_tensor_keeps_the_contract(pool: RankPool, cp_size, dims, shifts):
    assert pool.run(roll_tensor_differs, cp_size, dims, shifts) == [[]] * cp_size


def test_roll_tensor_on_one_rank():
    rolled, total = roll_tensor(torch.arange(1, 6), shifts=-2)
    assert rolled.tolist() == [3, 4, 5, 0, 0]
    assert total.item() == 12


def test_roll_tensor_carries_no_gradients():
    assert not roll_tensor(torch.ones(4, requires_grad=True))[0].requires_grad


@settings(max_examples=40, deadline=None)
@given(layout=layouts(cp_sizes=(1,)), num_depths=st.integers(1, 9), dtypes=dtype_choices)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_rank_needs_no_group(schedule, layout, num_depths, dtypes):
    full = full_batch(layout, 2, dtypes, seed=1)
    batch = prepare(full, layout, num_depths) if schedule == "prepared" else full
    rolls = make_roller(schedule, None, num_depths).start(batch, layout)
    for depth in range(1, num_depths + 1):
        for name, rolled in rolls.at(depth).items():
            assert same_bits(rolled, roll_reference(full[name], layout, depth, fill_of(name)))


def rolls_differ_in_a_default_group(world: dist.ProcessGroup, layout: SequenceLayout) -> list[str]:
    """A group that names no backend, as init_process_group() and init_device_mesh make them."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device_of(world).type, (world.size(),), mesh_dim_names=("cp",))
    dtypes = dict(zip(NAMES, DTYPES, strict=True))
    return rolls_differ(mesh.get_group("cp"), layout, 2, 1, dtypes, 5)


@pytest.mark.multi_gpu
def test_rolls_are_exact_in_a_device_mesh_on_gpus(gpu_pool: RankPool):
    layout = SequenceLayout.dense(8 * gpu_pool.world_size, gpu_pool.world_size)
    results = gpu_pool.run(rolls_differ_in_a_default_group, gpu_pool.world_size, layout)
    assert results == [[]] * gpu_pool.world_size


def test_rolls_are_exact_in_a_device_mesh():
    layout = SequenceLayout.dense(16, 2)
    with RankPool(2) as pool:
        assert pool.run(rolls_differ_in_a_default_group, 2, layout) == [[]] * 2


@pytest.mark.multi_gpu
@pytest.mark.parametrize("num_depths", [1, 2, 5])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("documents", [case[0] for case in CASES])
@pytest.mark.parametrize("transport", ["process_group", "symmetric"])
def test_rolls_are_exact_on_gpus(gpu_pool: RankPool, transport, documents, kind, num_depths):
    cp_size = gpu_pool.world_size
    for length in (16, 1024):
        layout = dict(CASES)[documents](length * cp_size, cp_size, kind)
        dtypes = dict(zip(NAMES, DTYPES, strict=True))
        results = gpu_pool.run(rolls_differ, cp_size, layout, num_depths, 2, dtypes, 7, SCHEDULES, transport)
        assert results == [[]] * cp_size


@pytest.mark.multi_gpu
@settings(max_examples=10, deadline=None)  # each one compiles its kernels
@given(data=st.data(), num_depths=st.integers(1, 3), dtypes=dtype_choices, seed=st.integers(0, 999))
@pytest.mark.parametrize("transport", ["process_group", "symmetric"])
def test_rolls_are_exact_on_any_layout_on_gpus(gpu_pool: RankPool, transport, data, num_depths, dtypes, seed):
    layout = data.draw(layouts(cp_sizes=(gpu_pool.world_size,)))
    results = gpu_pool.run(
        rolls_differ, layout.cp_size, layout, num_depths, 2, dtypes, seed, SCHEDULES, transport
    )
    assert results == [[]] * layout.cp_size


@pytest.mark.multi_gpu
def test_roll_tensor_keeps_the_contract_on_gpus(gpu_pool: RankPool):
    for dims, shifts in [(-1, -1), (0, -1), (-1, -5)]:
        assert (
            gpu_pool.run(roll_tensor_differs, gpu_pool.world_size, dims, shifts) == [[]] * gpu_pool.world_size
        )
