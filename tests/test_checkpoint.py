"""Checkpoints: at other sizes, bit-equal at the same, through kills, and with damage that is named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from overlap_mtp.checkpoint import CheckpointError, Checkpoints, NoCheckpointError, _crc32_of, _marks

from rank_pool import RankPool, device_of

VOCAB, HIDDEN, INNER, BATCH, LENGTH = 26, 12, 20, 8, 8  # 26 and 20 do not divide by every size
IDENTITY = {"hidden_size": HIDDEN, "layers": [1, 2]}


class Tiny(nn.Module):
    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, hidden)
        self.norm = nn.RMSNorm(hidden)
        self.up = nn.Linear(hidden, INNER)
        self.down = nn.Linear(INNER, VOCAB, bias=False)
        self.spare = nn.Parameter(
            torch.ones(3)
        )  # which never has a gradient, so that AdamW has no state for it
        self.dropout = dropout

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.gelu(self.up(self.norm(self.embedding(ids))))
        return self.down(nn.functional.dropout(inner, self.dropout)).clone()  # FSDP2 warns of views


class Run:
    """A training run at the sizes (fsdp, tp); at (1, 1) with no group, plain tensors."""

    def __init__(
        self,
        sizes: tuple[int, int],
        device: str = "cpu",
        seed: int = 0,
        dropout: float = 0.0,
        hidden: int = HIDDEN,
    ) -> None:
        torch.manual_seed(seed)
        self.step, self.fsdp_rank, self.sizes, self.device = 0, 0, sizes, device
        self.model = Tiny(hidden, dropout).to(device)
        if dist.is_initialized() and dist.get_world_size() == sizes[0] * sizes[1]:
            mesh = dist.init_device_mesh(device, sizes, mesh_dim_names=("fsdp", "tp"))
            self.fsdp_rank = mesh["fsdp"].get_local_rank()
            plan = {
                "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(),
            }
            if sizes[1] > 1:
                parallelize_module(self.model, mesh["tp"], plan)
            fully_shard(self.model, mesh=mesh["fsdp"])
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        torch.manual_seed(1000 + self.fsdp_rank)  # for dropout

    def train(self, steps: int) -> list[float]:
        """The losses, of the whole batch."""
        return [self.train_step() for _ in range(steps)]

    def train_step(self) -> float:
        generator = torch.Generator().manual_seed(self.step)
        batch = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
        batch = batch.chunk(self.sizes[0])[self.fsdp_rank].to(self.device)
        logits = self.model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1
        total = loss.detach().clone()
        if self.sizes[0] > 1:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return total.item()

    def state(self) -> dict[str, np.ndarray]:
        """Everything that training changes but random generators, whole. Collective."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        found = {name: parameter for parameter, name in names.items()}
        for parameter, values in self.optimizer.state.items():
            found.update({f"{names[parameter]}.{what}": value for what, value in values.items()})
        rates = [group["lr"] for group in self.optimizer.param_groups] + self.scheduler.get_last_lr()
        found["rates"] = torch.tensor([*rates, self.scheduler.last_epoch], dtype=torch.float64)
        return {name: whole(value) for name, value in found.items()}

    def evaluate(self) -> None:
        """After which FSDP2 holds the whole parameters."""
        with torch.no_grad():
            self.model(torch.zeros(BATCH, LENGTH, dtype=torch.long, device=self.device))

    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        return self.model, self.optimizer, self.scheduler

    def save(self, checkpoints: Checkpoints) -> Path:
        return checkpoints.save(self.step, *self.parts(), {"samples": BATCH * self.step}, IDENTITY)

    def load(self, checkpoints: Checkpoints, path: Path | None = None) -> dict:
        progress = checkpoints.load(*self.parts(), IDENTITY, path)
        self.step = progress["step"]
        return progress


def whole(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().numpy().copy()


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def of_sizes(folder: Path, sizes: tuple[int, int], keep: int = 3) -> Checkpoints:
    return Checkpoints(folder, keep, sizes={"fsdp": sizes[0], "tp": sizes[1]})


@pytest.fixture(scope="module")
def ranks():
    four = RankPool(4)
    yield four
    four.close()


def on_ranks(pool, case, sizes, *args):
    """The case's results by rank; at (1, 1) in this process."""
    count = sizes[0] * sizes[1]
    return [case(None, sizes, *args)] if count == 1 else pool.run(case, count, sizes, *args)


def save_after_three(group, sizes, folder):
    run = Run(sizes, "cpu" if group is None else device_of(group).type)
    run.train(3)
    run.evaluate()
    run.save(of_sizes(folder, sizes))
    return run.state(), run.train(3)


def load_and_go_on(group, sizes, folder):
    run = Run(sizes, "cpu" if group is None else device_of(group).type, seed=1)
    run.train(1)  # what is there must go
    run.evaluate()
    torch.rand(7)
    random_state = torch.get_rng_state()
    progress = run.load(of_sizes(folder, sizes))
    left_alone = torch.equal(random_state, torch.get_rng_state())
    return progress, run.state(), run.train(3), left_alone


def assert_loads_at(pool, all_sizes, saved_at, folder):
    expected, losses = on_ranks(pool, save_after_three, saved_at, folder)[0]
    for sizes in all_sizes:
        for progress, state, found, left_alone in on_ranks(pool, load_and_go_on, sizes, folder):
            assert progress == {"step": 3, "samples": 3 * BATCH}
            assert_same(state, expected)
            assert found == pytest.approx(losses, rel=1e-6)
            assert left_alone == (sizes != saved_at), "random generators, at other sizes alone"


@pytest.mark.parametrize("saved_at", [(2, 2), (1, 4), (1, 1)])
def test_loads_at_other_sizes(ranks, tmp_path, saved_at):
    assert_loads_at(ranks, [(2, 2), (4, 1), (1, 4), (1, 1)], saved_at, tmp_path)


@pytest.mark.multi_gpu
def test_loads_at_other_sizes_on_gpus(gpu_pool, tmp_path):
    count = gpu_pool.world_size
    assert_loads_at(gpu_pool, [(count, 1), (1, count), (1, 1)], (1, count), tmp_path)


def straight(_group, sizes, steps):
    run = Run(sizes, dropout=0.2)
    return run.train(steps), run.state(), torch.get_rng_state().numpy()


def with_saves(_group, sizes, folder, steps):
    """Step 0 too, where the optimizer has no state."""
    run, checkpoints = Run(sizes, dropout=0.2), of_sizes(folder, sizes)
    run.save(checkpoints)
    losses = run.train(steps)
    run.save(checkpoints)
    return losses


def resumed(_group, sizes, folder, steps, step):
    run, checkpoints = Run(sizes, seed=1, dropout=0.2), of_sizes(folder, sizes)
    run.train(1)
    torch.rand(7)
    assert run.load(checkpoints, folder / f"step-{step:08d}")["step"] == step
    return run.train(steps), run.state(), torch.get_rng_state().numpy()


@pytest.mark.parametrize("sizes", [(2, 2), (1, 1)])
def test_goes_on_bit_equal_at_the_same_sizes(ranks, tmp_path, sizes):
    expected = on_ranks(ranks, straight, sizes, 6)
    before = on_ranks(ranks, with_saves, sizes, tmp_path, 3)
    for step in (0, 3):
        for rank, found in enumerate(on_ranks(ranks, resumed, sizes, tmp_path, 6 - step, step)):
            assert before[rank][:step] + found[0] == expected[rank][0]
            assert_same(found[1], expected[rank][1])
            np.testing.assert_array_equal(found[2], expected[rank][2])


STEPS = 120  # more than the run gets to that is killed
PRELOAD = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "overlap_mtp.checkpoint",
]
DELETING = {"os.remove", "os.rmdir"}  # their paths are relative
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "shutil.rmtree"} | DELETING


def digest(run: Run) -> str:
    state = run.state()
    return hashlib.sha256(b"".join(state[name].tobytes() for name in sorted(state))).hexdigest()


def killed_run(folder: Path | None, out: Path, dies: tuple[int, int], steps: int) -> None:
    """Two ranks that go on to `steps`, and save every step if there is a folder.

    With dies = (rank, n), both are killed before the n-th file operation of that rank in `save` (never: n = 0).
    Writes the digest of every step.
    """
    os.setsid()
    rank = 1 if os.fork() == 0 else 0
    try:
        torch.set_num_threads(1)
        store = f"file://{out.with_suffix('.store')}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        train_and_save(folder, out, dies[1] if dies[0] == rank else 0, steps)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def train_and_save(folder: Path | None, out: Path, dies_at: int, steps: int) -> None:
    run, saving, left = Run((2, 1), dropout=0.2), False, dies_at

    def die_in_time(event, args):
        nonlocal left
        if saving and event in FILE_EVENTS and (event in DELETING or str(folder) in str(args[0])):
            left -= 1
            if left == 0:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(die_in_time)
    checkpoints = of_sizes(folder or out, (2, 1), keep=2)
    with contextlib.suppress(NoCheckpointError):
        run.load(checkpoints)
    digests = {run.step: digest(run)}
    Path(f"{out}.alive").touch()
    while run.step < steps:
        run.train_step()
        digests[run.step] = digest(run)
        saving = True
        if folder:
            run.save(checkpoints)
        saving = False
    if dist.get_rank() == 0:
        out.write_text(json.dumps(digests))


def start(forks, *args):
    process = forks.Process(target=killed_run, args=args)
    process.start()
    return process


def finish(process):
    process.join(timeout=60)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def test_kills_leave_complete_checkpoints_and_a_bit_equal_run(tmp_path):
    forks = multiprocessing.get_context("forkserver")  # torch is imported once
    forks.set_forkserver_preload(PRELOAD)
    folder, never, draw = tmp_path / "run", (0, 0), random.Random(20)
    assert finish(start(forks, None, tmp_path / "straight", never, STEPS)) == 0
    expected = json.loads((tmp_path / "straight").read_text())
    in_saves = last = 0
    for kill in range(12):
        out = tmp_path / f"kill{kill}"
        if kill % 3 == 2:  # at any time
            process = start(forks, folder, out, never, STEPS)
            while not Path(f"{out}.alive").exists():
                assert process.is_alive()
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.1))
            os.killpg(process.pid, signal.SIGKILL)
        else:
            rank = draw.choice([0, 0, 1])
            process = start(forks, folder, out, (rank, draw.randint(1, 15 if rank else 90)), STEPS)
        assert finish(process) == -signal.SIGKILL
        in_saves += any(folder.glob(".step-*.tmp"))
        complete = sorted(folder.glob("step-*"))
        assert of_sizes(folder, (2, 1)).latest() == (complete[-1] if complete else None)
        steps = [step_held(path, expected) for path in complete]
        assert last <= max(steps, default=0), "what was complete stays"
        last = max(steps, default=0)
    assert in_saves >= 6
    assert last >= 6
    assert finish(start(forks, folder, tmp_path / "end", never, last + 3)) == 0
    found = json.loads((tmp_path / "end").read_text())
    assert found == {str(step): expected[str(step)] for step in range(last, last + 4)}
    assert kept(folder) == [f"step-{last + 2:08d}", f"step-{last + 3:08d}"]


def step_held(path: Path, expected: dict[str, str]) -> int:
    run = Run((1, 1), seed=1)
    progress = run.load(Checkpoints(path.parent), path)
    assert progress == {"step": int(path.name[5:]), "samples": BATCH * run.step}
    assert digest(run) == expected[str(run.step)]
    return run.step


def truncate(path: Path) -> None:
    file = path / "__1_0.distcp"
    os.truncate(file, file.stat().st_size - 1)


def flip(name: str, place: int):
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[place] ^= 1
        (path / name).write_bytes(content)

    return damage


def replace(old: str, new: str):
    def damage(path: Path) -> None:
        text = (path / "run.json").read_text()
        assert text.count(old) == 1
        (path / "run.json").write_text(text.replace(old, new))

    return damage


def truncate_and_mark(path: Path) -> None:
    """What no CRC tells: the error comes from reading."""
    truncate(path)
    record = json.loads((path / "run.json").read_text())
    record["run"]["files"]["__1_0.distcp"] = _marks(path / "__1_0.distcp")
    record["crc32"] = _crc32_of(record["run"])
    (path / "run.json").write_text(json.dumps(record))


def remove(name: str):
    return lambda path: (path / name).unlink()


DAMAGE = {
    "truncated shard": (truncate, ["__1_0.distcp", "truncated"]),
    "flipped byte in a shard": (flip("__0_0.distcp", 300), ["__0_0.distcp", "garbled", "CRC-32"]),
    "flipped byte in state.pt": (flip("state.pt", 200), ["state.pt", "garbled"]),
    "flipped byte in .metadata": (flip(".metadata", 50), [".metadata", "garbled"]),
    "another number in run.json": (
        replace('"samples": 16', '"samples": 17'),
        ["run.json", "garbled", "CRC-32"],
    ),
    "no JSON": (lambda path: (path / "run.json").write_text("{"), ["run.json", "garbled"]),
    "no run.json": (remove("run.json"), ["half-written", "run.json"]),
    "no .metadata": (remove(".metadata"), ["half-written", ".metadata"]),
    "no shard": (remove("__1_0.distcp"), ["half-written", "__1_0.distcp"]),
    "unknown format": (replace('"format": 1', '"format": 99'), ["format 99 is unknown", "reads 1"]),
    "shard that cannot be read": (truncate_and_mark, ["loading", "rank 0", "rank 1"]),
    "no folder": (shutil.rmtree, ["half-written", "run.json"]),
}


@pytest.fixture(scope="module")
def two_saved(ranks, tmp_path_factory):
    """Steps 1 and 2 by two ranks of four, of plain tensors."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    ranks.run(save_two, 2, folder)
    return folder


def save_two(group, folder):
    run = Run((1, 1))
    for _ in range(2):
        run.train(1)
        run.save(Checkpoints(folder, group=group))


def error_in(function, run):
    """(class, message) of a load or save that must fail and change nothing."""
    before = run.state(), torch.get_rng_state().numpy()
    try:
        function()
    except CheckpointError as error:
        assert_same(run.state(), before[0])
        np.testing.assert_array_equal(torch.get_rng_state().numpy(), before[1])
        return type(error).__name__, str(error)
    raise AssertionError("no error")


def load_damaged(group, folder, path):
    run = Run((1, 1), seed=1)
    run.train(1)
    checkpoints = Checkpoints(folder, group=group)
    error = error_in(lambda: run.load(checkpoints, path), run)
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.load(checkpoints, folder / "step-00000001")
    assert all(parameter.grad is None for parameter in run.model.parameters())
    return error, run.state(), run.train(1)


def assert_all_say(errors, words):
    assert len(set(errors)) == 1, "ranks raise alike"
    for word in words:
        assert word in errors[0][1]


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_the_one_before_loads(ranks, two_saved, tmp_path, what):
    damage, words = DAMAGE[what]
    folder = tmp_path / "run"
    shutil.copytree(two_saved, folder)
    damage(folder / "step-00000002")
    path = folder / "step-00000002" if what == "no folder" else None
    errors, states, losses = zip(*ranks.run(load_damaged, 2, folder, path), strict=True)
    assert_all_say(errors, [*words, "step-00000002"])
    expected = Run((1, 1))
    expected.train(1)
    for state in states:
        assert_same(state, expected.state())
    assert losses[0] == losses[1] == expected.train(1)


def load_as_another(group, folder, kind):
    run = Run((1, 1), hidden=16 if kind == "shapes" else HIDDEN)
    model, optimizer, scheduler = run.parts()
    identity = dict(IDENTITY)
    if kind == "identity":
        identity = {"hidden_size": 99, "layers": (1, 2), "experts": 8}
    if kind == "names":
        model.other = model.__dict__["_parameters"].pop("spare")
    if kind == "dtype":
        model.to(torch.float64)
    if kind == "groups":
        run.optimizer = optimizer = torch.optim.AdamW(model.parameters())
        run.scheduler = scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1)
    if kind == "optimizer":
        run.optimizer = optimizer = torch.optim.SGD(model.parameters(), lr=1)
        run.scheduler = scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1)
    if kind == "parameters of another model":
        optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(2)))
    return error_in(lambda: Checkpoints(folder, group=group).load(model, optimizer, scheduler, identity), run)


ANOTHER = {
    "identity": ["identity", "hidden_size is 12 there, 99 here", "experts is absent there, 8 here"],
    "shapes": ["embedding.weight is torch.float32 [26, 12] there, torch.float32 [26, 16] here"],
    "names": ["spare is torch.float32 [3] there, absent here", "other is absent there"],
    "dtype": ["norm.weight is torch.float32 [12] there, torch.float64 [12] here"],
    "groups": ["parameter groups", "group 1 is ['norm.weight', 'spare', 'up.bias'] there, absent here"],
    "optimizer": ["optimizer is AdamW there, SGD here"],
    "parameters of another model": ["parameters of the optimizer that the model has not"],
}


@pytest.mark.parametrize("kind", ANOTHER)
def test_checkpoints_of_another_model_are_refused(ranks, two_saved, kind):
    assert_all_say(ranks.run(load_as_another, 2, two_saved, kind), [*ANOTHER[kind]])
    words = {"layers"} & set(ranks.run(load_as_another, 2, two_saved, "identity")[0][1].split())
    assert not words, "a tuple is the list that JSON makes of it"


def load_none(group, folder):
    run = Run((1, 1))
    return error_in(lambda: run.load(Checkpoints(folder, group=group)), run)


def test_a_folder_without_checkpoints_is_told_apart(ranks, tmp_path):
    (tmp_path / ".step-00000001.tmp").mkdir()
    for folder in (tmp_path, tmp_path / "missing"):
        errors = ranks.run(load_none, 2, folder)
        assert_all_say(errors, [str(folder), "no checkpoint"])
        assert errors[0][0] == "NoCheckpointError"
        assert Checkpoints(folder).latest() is None
    assert kept(tmp_path) == [".step-00000001.tmp"]


def failing_saves(group, folder):
    run, checkpoints = Run((1, 1)), Checkpoints(folder, group=group)
    run.train(2)
    run.save(checkpoints)
    own = kept(folder)
    refused = [error_in(lambda: checkpoints.save(9, *run.parts(), {"x": object()}, IDENTITY), run)]
    refused += [error_in(lambda: checkpoints.save(1, *run.parts(), {}, IDENTITY), run)]
    dist.barrier(group)
    assert kept(folder) == own
    run.optimizer.param_groups[0]["odd"] = Run
    refused += [error_in(lambda: checkpoints.save(9, *run.parts(), {}, IDENTITY), run)]
    del run.optimizer.param_groups[0]["odd"]
    rename = os.rename
    try:
        os.rename = no_rename
        refused += [error_in(lambda: checkpoints.save(9, *run.parts(), {}, IDENTITY), run)]
    finally:
        os.rename = rename
    assert checkpoints.latest() == folder / "step-00000002"
    dist.barrier(group)
    run.train(1)
    run.save(checkpoints)
    return refused


def no_rename(*_args):
    raise OSError("disk is full")


def test_failing_saves_are_told_on_all_ranks_and_leave_the_rest(ranks, tmp_path):
    by_rank = ranks.run(failing_saves, 2, tmp_path)
    words = ["not JSON serializable", "step-00000002 is there: a run taken back", "Run", "disk is full"]
    for errors, word in zip(zip(*by_rank, strict=True), words, strict=True):
        assert_all_say(errors, [word, str(tmp_path)])
    assert kept(tmp_path) == ["step-00000002", "step-00000003"]


def test_the_last_few_are_kept(tmp_path):
    run, checkpoints = Run((1, 1)), Checkpoints(tmp_path, keep=2)
    for step in range(1, 5):
        run.train(1)
        assert run.save(checkpoints) == checkpoints.latest() == tmp_path / f"step-{step:08d}"
        assert kept(tmp_path) == [f"step-{one:08d}" for one in range(max(1, step - 1), step + 1)]
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_saving_a_step_again_always_leaves_one(tmp_path, monkeypatch):
    run, checkpoints = Run((1, 1)), Checkpoints(tmp_path, keep=1)
    run.train(1)
    run.save(checkpoints)
    rename, seen = os.rename, []

    def watched(*args):
        seen.append(checkpoints.latest())
        rename(*args)
        seen.append(checkpoints.latest())

    monkeypatch.setattr(os, "rename", watched)
    for again in (2, 3):
        run.train(1)
        run.step = 1
        assert run.save(checkpoints) == tmp_path / f"step-00000001-{again}"
        assert kept(tmp_path) == [f"step-00000001-{again}"]
        other = Run((1, 1), seed=1)
        other.load(checkpoints)
        assert_same(other.state(), run.state())
    assert None not in seen
    assert len(seen) >= 8


def test_state_of_a_compiled_model_loads_into_a_plain_one(tmp_path):
    run, plain = Run((1, 1)), Run((1, 1), seed=1)
    run.train(2)
    run.model.up = torch.compile(run.model.up)  # which puts a wrapper's name between
    assert any("_orig_mod" in name for name, _ in run.model.named_parameters())
    run.save(Checkpoints(tmp_path))
    plain.load(Checkpoints(tmp_path))
    for (_, found), (_, expected) in zip(
        plain.model.named_parameters(), run.model.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected)
