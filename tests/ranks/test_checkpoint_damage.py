"""Kills while a checkpoint is written, damage to one, and checkpoints of another model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from overlap_mtp.training.checkpoint import Checkpoints, NoCheckpointError
from overlap_mtp.training.checkpoint_record import file_marks

from rank_pool import forks
from tiny_runs import BATCH, HIDDEN, IDENTITY, Run, assert_all_say, assert_same, kept

STEPS = 80  # more than a run takes before it is killed
KILLS = 9
DELETING = {"os.remove", "os.rmdir"}  # their paths are relative
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "shutil.rmtree"} | DELETING


def digest(run: Run) -> str:
    state = run.state()
    return hashlib.sha256(b"".join(state[name].tobytes() for name in sorted(state))).hexdigest()


def killed_run(folder: Path | None, out: Path, dies: tuple[int, int], steps: int) -> None:
    """Train two ranks until `steps`, and save every step if there is a folder. Write the digest of every step.

    With dies = (rank, n), both are killed before the n-th file operation of that rank in `save` (never if n = 0).
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
    with contextlib.suppress(NoCheckpointError):
        run.load(folder or out)
    digests = {run.step: digest(run)}
    Path(f"{out}.alive").touch()
    while run.step < steps:
        run.train()
        digests[run.step] = digest(run)
        saving = True
        if folder:
            run.save(folder, keep=2)
        saving = False
    if dist.get_rank() == 0:
        out.write_text(json.dumps(digests))


def start(*args):
    process = forks().Process(target=killed_run, args=args)
    process.start()
    return process


def finish(process):
    process.join(timeout=60)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def test_kills_leave_complete_checkpoints_and_a_bit_equal_run(tmp_path):
    folder, never, draw = tmp_path / "run", (0, 0), random.Random(20)
    assert finish(start(None, tmp_path / "straight", never, STEPS)) == 0
    expected = json.loads((tmp_path / "straight").read_text())
    in_saves = last = 0
    for kill in range(KILLS):
        out = tmp_path / f"kill{kill}"
        if kill % 3 == 2:  # at any time
            process = start(folder, out, never, STEPS)
            while not Path(f"{out}.alive").exists():
                assert process.is_alive()
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.1))
            os.killpg(process.pid, signal.SIGKILL)
        else:
            rank = draw.choice([0, 0, 1])
            process = start(folder, out, (rank, draw.randint(1, 15 if rank else 90)), STEPS)
        assert finish(process) == -signal.SIGKILL
        in_saves += any(folder.glob(".step-*.tmp"))
        complete = sorted(folder.glob("step-*"))
        assert Checkpoints(folder).latest() == (complete[-1] if complete else None)
        steps = [step_held(path, expected) for path in complete]
        assert last <= max(steps, default=0), "a complete checkpoint stays"
        last = max(steps, default=0)
    assert in_saves >= KILLS / 2
    assert last >= KILLS / 2
    assert finish(start(folder, tmp_path / "end", never, last + 3)) == 0
    found = json.loads((tmp_path / "end").read_text())
    assert found == {str(step): expected[str(step)] for step in range(last, last + 4)}
    assert kept(folder) == [f"step-{last + 2:08d}", f"step-{last + 3:08d}"]


def step_held(path: Path, expected: dict[str, str]) -> int:
    run = Run(seed=1)
    assert run.load(path.parent, path) == {"step": int(path.name[5:]), "samples": BATCH * run.step}
    assert digest(run) == expected[str(run.step)]
    return run.step


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


def remove(name: str):
    return lambda path: (path / name).unlink()


def truncate(path: Path) -> None:
    os.truncate(path / "__1_0.distcp", (path / "__1_0.distcp").stat().st_size - 1)


def truncate_and_mark(path: Path) -> None:
    """No CRC shows this: the error comes from reading."""
    truncate(path)
    record = json.loads((path / "run.json").read_text())
    record["run"]["files"]["__1_0.distcp"] = file_marks(path / "__1_0.distcp")
    record["crc32"] = zlib.crc32(json.dumps(record["run"]).encode())
    (path / "run.json").write_text(json.dumps(record))


HALF = "is half-written or damaged"
DAMAGE = {
    "truncated shard": (truncate, [f"__1_0.distcp {HALF}", "CRC-32"]),
    "flipped byte in a shard": (flip("__0_0.distcp", 300), [f"__0_0.distcp {HALF}"]),
    "flipped byte in state.pt": (flip("state.pt", 200), [f"state.pt {HALF}"]),
    "flipped byte in .metadata": (flip(".metadata", 50), [f".metadata {HALF}"]),
    "another number in run.json": (replace('"samples": 16', '"samples": 17'), [f"run.json {HALF}", "CRC-32"]),
    "no JSON": (lambda path: (path / "run.json").write_text("{"), [f"run.json {HALF}"]),
    "no run.json": (remove("run.json"), [f"run.json {HALF}", "No such file"]),
    "no .metadata": (remove(".metadata"), [f".metadata {HALF}", "are missing"]),
    "no shard": (remove("__1_0.distcp"), [f"__1_0.distcp {HALF}", "are missing"]),
    "unknown format": (replace('"format": 1', '"format": 99'), ["format 99 is unknown", "reads 1"]),
    "shard that cannot be read": (truncate_and_mark, ["loading", "rank 0", "rank 1"]),
    "no folder": (shutil.rmtree, [f"run.json {HALF}"]),
}


@pytest.fixture(scope="module")
def two_saved(ranks, tmp_path_factory):
    """Steps 1 and 2 by two ranks of four, of plain tensors."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    ranks.run(save_two, 2, folder)
    return folder


def save_two(group, folder):
    run = Run(group=group)
    for _ in range(2):
        run.train()
        run.save(folder)


def load_damaged(group, folder, path):
    run = Run(group=group, seed=1)
    run.train()
    error = run.error_in(lambda: run.load(folder, path))
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.load(folder, folder / "step-00000001")
    assert all(parameter.grad is None for parameter in run.model.parameters())
    return error, run.state(), run.train()


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_the_one_before_loads(ranks, two_saved, tmp_path, what):
    damage, words = DAMAGE[what]
    folder = tmp_path / "run"
    shutil.copytree(two_saved, folder)
    damage(folder / "step-00000002")
    path = folder / "step-00000002" if what == "no folder" else None
    errors, states, losses = zip(*ranks.run(load_damaged, 2, folder, path), strict=True)
    assert_all_say(errors, [*words, "step-00000002"])
    assert ("delete its folder to resume" in errors[0][1]) == (HALF in words[0])
    expected = Run()
    expected.train()
    for state in states:
        assert_same(state, expected.state())
    assert losses[0] == losses[1] == expected.train()


def load_as_another(group, folder, kind):
    run = Run(group=group, hidden=16 if kind == "shapes" else HIDDEN)
    model, identity = run.model, dict(IDENTITY)
    if kind == "identity":
        identity = {"hidden_size": 99, "layers": (1, 2), "experts": 8}
    if kind == "names":
        model.other = model.__dict__["_parameters"].pop("spare")
    if kind == "dtype":
        model.to(torch.float64)
    if kind == "groups":
        run.optimize_by(torch.optim.AdamW(model.parameters()))
    if kind == "optimizer":
        run.optimize_by(torch.optim.SGD(model.parameters(), lr=1))
    if kind == "parameters of another model":
        run.optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(2)))
    return run.error_in(lambda: run.checkpoints(folder).load(*run.parts(), identity))


ANOTHER = {
    "identity": ["other settings", "hidden_size is 12 there, 99 here", "experts is absent there, 8 here"],
    "shapes": ["embedding.weight is torch.float32 [26, 12] there, torch.float32 [26, 16] here"],
    "names": ["spare is torch.float32 [3] there, absent here", "other is absent there"],
    "dtype": ["norm.weight is torch.float32 [12] there, torch.float64 [12] here"],
    "groups": ["parameter groups", "group 1 is ['norm.weight', 'spare', 'up.bias'] there, absent here"],
    "optimizer": ["optimizer is AdamW there, SGD here"],
    "parameters of another model": ["the model lacks these parameters of the optimizer"],
}


@pytest.mark.parametrize("kind", ANOTHER)
def test_checkpoints_of_another_model_are_refused(ranks, two_saved, kind):
    errors = ranks.run(load_as_another, 2, two_saved, kind)
    assert_all_say(errors, ANOTHER[kind])
    assert "layers" not in errors[0][1], "a tuple equals the list that JSON makes of it"
