"""What ranks do in tests that run over gloo (tests/ranks) and on GPUs (tests/gpu). All return what is wrong."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from overlap_mtp import (
    SCHEDULES,
    DeviceLayout,
    SequenceLayout,
    make_roller,
    pad_documents,
    prepare,
    roll_reference,
    roll_tensor,
)
from overlap_mtp.exchange.transport import Transport

from cases import NUM_DEPTHS, Microbatch, error_of, short_patience
from rank_pool import device_of
from strategies import ALL_DTYPES, DTYPES, random_batch, random_tensor, same_bits

# Exactness

LAYOUTS = {
    "dense": SequenceLayout.dense,
    "packed": lambda n, cp_size, kind: SequenceLayout.packed([0, n // 2, n // 2, n], cp_size, kind),
    "padded": lambda n, cp_size, kind: SequenceLayout.packed(
        [0, n // 4, n], cp_size, kind, [n // 4 - 1, n // 2]
    ),
}


def rolls_differ(
    group: dist.ProcessGroup,
    layout: SequenceLayout,
    num_depths: int,
    rows: int = 2,
    dtypes: dict[str, torch.dtype] = ALL_DTYPES,
    seed: int = 7,
    transport: str = "auto",
) -> list[str]:
    """Every schedule against the reference. Three microbatches are under way before the first is waited for."""
    wrong = []
    batches = [Microbatch(group, layout, random_batch(layout, rows, seed + i, dtypes)) for i in range(3)]
    for schedule in SCHEDULES:
        roller = make_roller(schedule, group, num_depths, transport, max_documents=layout.num_documents)
        started = [batch.start(roller) for batch in batches]
        for i, (batch, rolls) in enumerate(zip(batches, started, strict=True)):
            wrong += [f"{schedule}, microbatch {i}: {one}" for one in batch.wrong(rolls, num_depths)]
        roller.close()
    return wrong


def mixed_rolls_differ(
    group: dist.ProcessGroup | None,
    layout: SequenceLayout,
    transport: str = "auto",
    on_device: bool = False,
    schedules: tuple[str, ...] = SCHEDULES,
) -> list[str]:
    """Tensors of several leading shapes, depths and fills, and a missing one, in one batch of each schedule.

    `on_device`: the bounds are on the ranks' device.
    """
    draw = functools.partial(random_tensor, generator=torch.Generator().manual_seed(5))
    length, device = layout.seq_len, device_of(group)
    full = {
        "input_ids": draw((2, length), torch.int64),
        "position_ids": draw((3, 2, length), torch.int32),  # as for multimodal rotary positions
        "labels": draw((2, length), torch.int64),
        "loss_mask": draw((2, length), torch.float16),
        "padding_mask": draw((length,), torch.bool),
    }
    depths, fills = {"position_ids": 1, "labels": 2}, {"labels": 7, "padding_mask": 0, "loss_mask": -1}
    rank = 0 if group is None else group.rank()
    wrong = []
    for schedule in schedules:
        roller = make_roller(
            schedule, group, 3, transport, layout.num_documents + 2, fills=fills, depths=depths
        )
        prepared = prepare(full, layout, 3, fills=fills, depths=depths) if schedule == "prepared" else full
        batch = {name: layout.shard(tensor, rank).to(device) for name, tensor in prepared.items()}
        given = device_layout_of(layout, device) if on_device else layout
        started = [roller.start({**batch, "attention_mask": None}, given) for _ in range(2)]
        for rolls in started:
            for depth in (1, 2, 3):
                rolled = rolls.at(depth)
                names = {name for name in full if depths.get(name, 3) >= depth}
                if rolled.keys() != names:
                    wrong.append(f"{schedule}: {sorted(rolled)} at depth {depth}")
                for name in names & rolled.keys():
                    reference = roll_reference(full[name], layout, depth, fills.get(name, 0))
                    if not same_bits(rolled[name].cpu(), layout.shard(reference, rank)):
                        wrong.append(f"{schedule}: {name} at depth {depth}")
        roller.close()
    return wrong


def device_layout_of(
    layout: SequenceLayout, device: torch.device, dtype: torch.dtype = torch.int32
) -> DeviceLayout:
    """The same layout, with its bounds on a device."""
    documents = layout.num_documents - bool(layout.tail_len)
    valid = np.concatenate([[0], np.cumsum(layout.valid_lengths[:documents])])
    bounds = layout.cu_seqlens[: documents + 1]
    if documents == 0:  # nothing but a tail
        bounds = valid = np.zeros(2, np.int64)
    tensors = [torch.from_numpy(one).to(device, dtype) for one in (bounds, valid)]
    return DeviceLayout(tensors[0], layout.seq_len, layout.cp_size, layout.kind, tensors[1])


def rolls_differ_in_a_default_group(world: dist.ProcessGroup) -> list[str]:
    """In a group that names no backend, as init_process_group() and init_device_mesh make them."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device_of(world).type, (world.size(),), mesh_dim_names=("cp",))
    layout = SequenceLayout.dense(8 * world.size(), world.size())
    return rolls_differ(mesh.get_group("cp"), layout, num_depths=2, rows=1)


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
        sums = torch.int64
        if dtype.is_floating_point:
            sums = torch.float64 if dtype == torch.float64 else torch.float32
        same_sum = torch.equal(total, rolled.sum(dtype=sums)) or bool(
            total.isnan()
        )  # in the order of one device
        rolled = rolled.T if dims == 0 else rolled
        if not same_bits(rolled.cpu(), expected):
            wrong.append(f"{dtype}")
        if total.dtype != sums or not same_sum:
            wrong.append(f"sum of {dtype}: {total}")
    return wrong


def packed_roll_tensor_differs(
    group: dist.ProcessGroup | None, layout: SequenceLayout, shifts: int
) -> list[str]:
    """Documents given as Megatron-LM gives them: the bounds on the ranks' device, as tensors and as a list."""
    rank, device = 0 if group is None else group.rank(), device_of(group)
    full = random_tensor((2, layout.seq_len), torch.int32, torch.Generator().manual_seed(1))
    local = layout.shard(full, rank).to(device)
    expected = layout.shard(roll_reference(full, layout, -shifts), rank)
    on_device = device_layout_of(layout, device)
    assert on_device.cu_valid is not None
    wrong = []
    for convert in (lambda bounds: bounds, torch.Tensor.tolist):
        params = SimpleNamespace(
            cu_seqlens_q=convert(on_device.cu_valid), cu_seqlens_q_padded=convert(on_device.cu_seqlens)
        )
        rolled, total = roll_tensor(local, shifts, cp_group=group, packed_seq_params=params, return_sum=False)
        if not same_bits(rolled.cpu(), expected) or total is not None:
            wrong.append(f"{convert}: {rolled}")
    return wrong


# Lifetimes

DEPTHS = 3
VOCABULARY, WIDTH = 23, 4


def padded(cp_size: int, variant: int = 0) -> SequenceLayout:
    """Packed and padded, with an empty document and chunks shorter than DEPTHS; one length for all variants."""
    lengths = [[5 * cp_size, 0, 1, 7], [1, 9, 0, 3 * cp_size], [0, 2 * cp_size, 2 * cp_size, 3]][variant % 3]
    return pad_documents([torch.zeros(n) for n in lengths], cp_size, seq_len=24 * cp_size)[1]


def random_microbatch(group: dist.ProcessGroup | None, seed: int, variant: int = 0) -> Microbatch:
    layout = padded(group.size() if group else 1, variant)
    return Microbatch(group, layout, random_batch(layout, seed=seed))


def gradients_differ(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """The embedding's gradient from the roller's ids, against the one from the reference's.

    Three microbatches run forward, twenty more come and go, and only then do the three run backward. A saved index
    that is overwritten moves an embedding's gradient to another row without a word.
    """
    device, generator = device_of(group), torch.Generator().manual_seed(3)

    def microbatch(variant: int) -> Microbatch:
        layout = padded(group.size(), variant)
        ids = torch.randint(0, VOCABULARY, (2, layout.seq_len), generator=generator)
        return Microbatch(group, layout, {"input_ids": ids, "labels": ids.flip(0)})

    batches = [microbatch(i) for i in range(3)]
    shape = (len(batches), DEPTHS, 2, batches[0].layout.local_len, WIDTH)
    # Whole numbers in float64: their sums are exact in any order.
    factors = torch.randint(-9, 10, shape, generator=generator).double().to(device)
    weight = torch.zeros(VOCABULARY, WIDTH, dtype=torch.float64, device=device, requires_grad=True)

    roller = make_roller(schedule, group, DEPTHS)
    started = [batch.start(roller) for batch in batches]
    losses = []
    for rolls, of_microbatch in zip(started, factors, strict=True):
        embedded = [F.embedding(rolls.at(depth)["input_ids"], weight) for depth in range(1, DEPTHS + 1)]
        losses.append(sum((e * f).sum() for e, f in zip(embedded, of_microbatch, strict=True)))
    del started, rolls, embedded
    for i in range(20):
        other = microbatch(i).start(roller)
        for depth in range(1, DEPTHS + 1):
            other.at(depth)
    for loss in losses:
        loss.backward()
    roller.close()

    expected = torch.zeros_like(weight)
    for batch, of_microbatch in zip(batches, factors, strict=True):
        for depth in range(1, DEPTHS + 1):
            rolled = roll_reference(batch.full["input_ids"], batch.layout, depth)
            ids = batch.layout.shard(rolled, batch.rank).to(device)
            expected.index_add_(0, ids.flatten(), of_microbatch[depth - 1].flatten(0, 1))
    assert expected.abs().max() > 0
    return [] if torch.equal(weight.grad, expected) else ["gradient"]


def keep_early_rolls(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """Which rolled tensors of four microbatches change while twenty others come and go."""
    roller = make_roller(schedule, group, DEPTHS)
    kept = []
    for i in range(24):
        rolls = random_microbatch(group, i, variant=i).start(roller)
        rolled = {(i, name, d): t for d in range(1, DEPTHS + 1) for name, t in rolls.at(d).items()}
        if i < 4:
            kept += [(what, tensor, tensor.clone()) for what, tensor in rolled.items()]
        del rolls
    roller.close()
    return [str(what) for what, tensor, copy in kept if not same_bits(tensor, copy)]


def wait_late(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """Five microbatches under way, waited for newest first, each depth of all before the next depth of any."""
    roller = make_roller(schedule, group, DEPTHS)
    batches = [random_microbatch(group, i, variant=i) for i in range(5)]
    started = [batch.start(roller) for batch in batches]
    for depth in range(1, DEPTHS + 1):
        for rolls in reversed(started):
            rolls.at(depth)
    wrong = [one for batch, rolls in zip(batches, started, strict=True) for one in batch.wrong(rolls, DEPTHS)]
    roller.close()
    return wrong


def drop_rolls(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """Rolls never waited for, or only at depth 1, between others that are: what is wrong with the others."""
    roller = make_roller(schedule, group, DEPTHS)
    wrong = []
    for i in range(30):
        batch = random_microbatch(group, i, variant=i)
        rolls = batch.start(roller)
        if i % 3 == 0:
            wrong += [f"microbatch {i}: {one}" for one in batch.wrong(rolls, DEPTHS)]
        elif i % 3 == 1:
            rolls.at(1)
        del rolls
    roller.close()
    return wrong


def close_under_way(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """A roller closed with microbatches under way, again and again: what is wrong with the next roller's."""
    wrong = []
    for i in range(5):
        abandoned = make_roller(schedule, group, DEPTHS)
        for _ in range(3):
            random_microbatch(group, 100).start(abandoned)
        abandoned.close()
        roller = make_roller(schedule, group, DEPTHS)
        batch = random_microbatch(group, i)
        wrong += batch.wrong(batch.start(roller), DEPTHS)
        roller.close()
    return wrong


def interleave(group: dist.ProcessGroup, first: str, second: str) -> list[str]:
    """Two rollers of one cp group, each with three microbatches under way among the other's."""
    rollers = [make_roller(first, group, DEPTHS), make_roller(second, group, DEPTHS)]
    batches = [random_microbatch(group, i, variant=i) for i in range(6)]
    started = [batch.start(rollers[i % 2]) for i, batch in enumerate(batches)]
    for depth in range(1, DEPTHS + 1):
        for rolls in started:
            rolls.at(depth)
    rollers[0].close()
    pairs = list(zip(batches, started, strict=True))
    wrong = [one for batch, rolls in pairs[1::2] for one in batch.wrong(rolls, DEPTHS)]
    last = random_microbatch(group, 99)
    wrong += last.wrong(last.start(rollers[1]), DEPTHS)
    wrong += [one for batch, rolls in pairs[::2] for one in batch.wrong(rolls, DEPTHS)]
    rollers[1].close()
    return wrong


def said_of_a_rank_that_stays_away(group: dist.ProcessGroup) -> list[str]:
    """What ranks raise, each time, if the last one stays away from the second exchange over symmetric memory."""
    from overlap_mtp.exchange import symmetric

    own = dist.new_group(list(range(group.size())))  # ranks out of step need another one
    batch = Microbatch.of(own)
    tensors = batch.shards()
    with short_patience(symmetric, own):
        roller = make_roller("prefetch", own, NUM_DEPTHS)
        roller.start(tensors, batch.layout).at(1)
    assert roller.transport == "symmetric"
    torch.cuda.synchronize()
    if own.rank() == own.size() - 1:
        return []

    def wait_in_vain() -> None:
        roller.start(tensors, batch.layout).at(1)
        torch.cuda.synchronize()
        roller.raise_if_failed()

    return [error_of(wait_in_vain), error_of(roller.raise_if_failed), error_of(wait_in_vain)]


LIFETIMES = [keep_early_rolls, wait_late, drop_rolls, close_under_way]


def with_delays(group: dist.ProcessGroup, transport: str, function, *args):
    """Run a function of this file over a transport. Each exchange is delayed on its stream by up to 2 ms, before and
    after it."""
    from overlap_mtp.exchange.nccl import NcclTransport
    from overlap_mtp.exchange.symmetric import SymmetricTransport

    rng = random.Random(group.rank())

    def delayed(send):
        def late(self, buffers, number):
            torch.cuda._sleep(rng.randrange(4_000_000))
            send(self, buffers, number)
            torch.cuda._sleep(rng.randrange(4_000_000))

        return late

    with pytest.MonkeyPatch.context() as patched:
        for kind in (NcclTransport, SymmetricTransport):
            patched.setattr(kind, "_send", delayed(kind._send))
        patched.setitem(globals(), "make_roller", functools.partial(make_roller, transport=transport))
        return function(group, *args)


# Ownership: the caller may do with a batch and its rolls what the docstrings allow.


def change_the_dict(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """The caller puts other tensors into its dict under way, as a data loader may."""
    batch = Microbatch.of(group)
    roller = make_roller(schedule, group, NUM_DEPTHS)
    local = batch.shards()
    rolls = roller.start(local, batch.layout)
    for name in local:
        local[name] = torch.zeros_like(local[name])
    wrong = batch.wrong(rolls)
    roller.close()
    return wrong


def embed(rolls, weight: torch.Tensor, depth: int) -> torch.Tensor:
    return F.embedding(rolls.at(depth)["input_ids"], weight).sum()


def weight_for(batch: Microbatch) -> torch.Tensor:
    tokens = batch.full["input_ids"].numel()
    return torch.ones(tokens, 3, device=device_of(batch.group), requires_grad=True)


def write_into_rolls(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """What autograd keeps of one roll survives a write into another, of the same and of the next microbatch."""
    batch = Microbatch.of(group)
    roller, weight = make_roller(schedule, group, NUM_DEPTHS), weight_for(batch)
    local = batch.shards()
    rolls = [roller.start(local, batch.layout) for _ in range(2)]
    losses = [embed(one, weight, depth) for one in rolls for depth in range(1, NUM_DEPTHS + 1)]
    rolls[0].at(1)["labels"].fill_(-1)
    rolls[1].at(2)["loss_mask"].zero_()
    error = error_of(torch.stack(losses).sum().backward)
    roller.close()
    return [] if error == "nothing" else [error]


def infer_then_train(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """A roller that was first used in inference mode serves training as well."""
    batch = Microbatch.of(group)
    roller, weight = make_roller(schedule, group, NUM_DEPTHS), weight_for(batch)
    local = batch.shards()
    with torch.inference_mode():
        wrong = batch.wrong(roller.start(local, batch.layout))
    for _ in range(2):
        rolls = roller.start(local, batch.layout)
        error = error_of(lambda rolls=rolls: embed(rolls, weight, depth=1).backward())
        wrong += [] if error == "nothing" else [error]
        wrong += batch.wrong(rolls)
    roller.close()
    return wrong


def ask_again(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """`at` that failed once is called again: it waits for the same exchange and sends no other."""
    batch = Microbatch.of(group)
    roller = make_roller(schedule, group, NUM_DEPTHS)
    batch.start(roller).at(NUM_DEPTHS)
    before = roller.traffic.messages
    batch.start(roller).at(NUM_DEPTHS)
    per_batch = roller.traffic.messages - before
    rolls = batch.start(roller)
    transport = type(roller._transport)  # type: ignore[attr-defined]

    def fails(self: Transport, exchange: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transport, "finish", fails)
        with pytest.raises(KeyboardInterrupt):
            rolls.at(1)
    wrong = batch.wrong(rolls)
    if roller.traffic.messages != before + 2 * per_batch:
        wrong.append(f"{roller.traffic.messages - before - per_batch} messages, not {per_batch}")
    roller.close()
    return wrong


OWNERSHIP = [change_the_dict, write_into_rolls, infer_then_train, ask_again]
