"""Checkpoints of a training run: complete or absent, and loadable at other parallel sizes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from overlap_mtp.training.snapshot import (
    CheckpointError,
    Json,
    adopt,
    compare,
    first_few,
    make_room,
    random_state,
    set_random_state,
    state_of,
)

__all__ = ["CheckpointError", "Checkpoints", "NoCheckpointError"]

FORMAT = 1
T = TypeVar("T")


class NoCheckpointError(CheckpointError):
    """There is none in the folder: the run begins."""


class Checkpoints:
    """The last `keep` checkpoints of one run, in a folder that all ranks of `group` share.

        checkpoints = Checkpoints(folder, sizes={"dp": 2, "cp": 2, "tp": 2})
        try:
            progress = checkpoints.load(model, optimizer, scheduler, identity)
        except NoCheckpointError:
            progress = {"step": 0, "samples": 0}
        ...
        checkpoints.save(step, model, optimizer, scheduler, {"samples": samples}, identity)

    A checkpoint is a folder `step-00000100` (`step-00000100-2` where that step was saved again): the tensors as
    torch.distributed.checkpoint lays them out, `state.pt` (parameter groups, scheduler, random generators) and
    `run.json` (the plain numbers, and the size and CRC-32 of every file). It is written under a name that begins
    with a dot, renamed when all of it is on disk, and renamed back before it is deleted: a folder with the name of a
    checkpoint is complete whenever the run dies. One run at a time may write to a folder.

    `group`: the ranks that save and load together (default: all; this process alone where torch.distributed is not
    in use). With NCCL, each rank must have set its device. `sizes`: of the meshes. torch's random generators are
    restored only where these and the number of ranks are those saved; else they are left alone.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        *,
        sizes: Json | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self.folder, self.keep, self.sizes, self.group = Path(folder), keep, dict(sizes or {}), group

    def latest(self) -> Path | None:
        """The last complete checkpoint. Changes nothing and asks no other rank."""
        return next((path for *_, path in reversed(self._complete())), None)

    def save(
        self,
        step: int,
        model: Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        progress: Json,
        identity: Json,
    ) -> Path:
        """Writes the checkpoint of `step`, then deletes those before the last `keep`; where it is.

        Collective over the group; it is complete on return. `progress` (counters, the position in the data) and
        `identity` (what model this is) are JSON values, of which the first rank's are written. Call it between
        steps: gradients are not saved. Changes nothing in the run, no random generator either. A step that was
        saved before is saved again beside the old one, which goes afterwards.

        Raises CheckpointError, the earlier checkpoints left as they are, where something cannot be written or the
        folder holds a later step (a run that was taken back goes on in another folder).
        """
        what = f"saving step {step} in {self.folder}"
        made_by = _made_by(optimizer, scheduler, identity)
        layout = {**self.sizes, "ranks": self._size}
        run = {"progress": {**progress, "step": step}, "identity": made_by, "layout": layout}
        self._on_first(what, lambda: json.dumps(run))  # refused before anything is written
        final = self._on_first(what, lambda: self._prepare(step))
        scratch = self.folder / f".{final.name}.tmp"
        tensors, groups = self._together(what, lambda: state_of(model, optimizer))
        randoms = self._gather(random_state())
        state = {"groups": groups, "scheduler": scheduler.state_dict(), "random": randoms}
        self._on_first(what, lambda: _write_state(scratch / "state.pt", state))
        writer = FileSystemWriter(scratch, sync_files=False)  # `_seal` does, after the last byte
        self._together(what, lambda: self._dcp(save_tensors, tensors, storage_writer=writer))
        names = self._on_first(what, lambda: sorted(path.name for path in scratch.iterdir()))
        sealed = self._gather(self._together(what, lambda: self._seal(scratch, names)))
        run["files"] = dict(chain(*(share.items() for share in sealed)))
        self._on_first(what, lambda: self._publish(run, scratch, final))
        return final

    def load(
        self,
        model: Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        identity: Json,
        path: Path | None = None,
    ) -> dict[str, Any]:
        """Loads the last complete checkpoint, or the one at `path`; its progress, with "step" in it.

        Collective over the group; all ranks load what the first one finds. Gradients are dropped, and shards are
        read beside the model's own, into the memory that gradients take later: whatever is wrong with a checkpoint
        is found before model, optimizer and scheduler are touched. Files may hold pickles (`.metadata` is one):
        load only what you trust.

        Raises NoCheckpointError where the folder holds none, and CheckpointError where a file is missing or not of
        the size and CRC-32 written, where the format is not known, and where the checkpoint was made with another
        `identity`, other parameters or parameter groups, or another class of optimizer or scheduler.
        """
        path = self._on_first("loading", lambda: self._choose(path))
        what = f"loading {path}"
        made_by = _made_by(optimizer, scheduler, identity)
        run = self._on_first(what, lambda: _read_run(path, made_by))
        self._together(what, lambda: self._check(path, run["files"]))
        tensors, state = self._together(what, lambda: make_room(path, model, optimizer))
        optimizer.zero_grad(set_to_none=True)
        reader = FileSystemReader(path)
        self._together(what, lambda: self._dcp(load_tensors, tensors, storage_reader=reader))
        self._together(what, lambda: adopt(tensors, state, model, optimizer))
        scheduler.load_state_dict(state["scheduler"])
        if run["layout"] == {**self.sizes, "ranks": self._size}:
            set_random_state(state["random"][self._rank])
        progress: dict[str, Any] = run["progress"]
        return progress

    def _complete(self) -> list[tuple[int, int, Path]]:
        """(step, how many times it was saved, where), from the first to the last."""
        paths = self.folder.iterdir() if self.folder.is_dir() else []
        matches = [(re.fullmatch(r"step-(\d+)(?:-(\d+))?", path.name), path) for path in paths]
        return sorted((int(match[1]), int(match[2] or 1), path) for match, path in matches if match)

    def _choose(self, path: Path | None) -> Path:
        if path := path or self.latest():
            return Path(path)
        raise NoCheckpointError(f"no checkpoint in {self.folder}")

    def _prepare(self, step: int) -> Path:
        """Where the checkpoint will be; makes the folder that it is written to, and clears what dead runs left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{step:08d}"
        for last_step, times, last in self._complete()[-1:]:
            if last_step > step:
                raise CheckpointError(f"{last.name} is there: a run taken back goes on in another folder")
            if last_step == step:
                final = self.folder / f"step-{step:08d}-{times + 1}"
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        (self.folder / f".{final.name}.tmp").mkdir()
        return final

    def _publish(self, run: dict[str, Any], scratch: Path, final: Path) -> None:
        record = {"format": FORMAT, "crc32": _crc32_of(run), "run": run}
        (scratch / "run.json").write_text(json.dumps(record, indent=1))
        _sync(scratch / "run.json")
        _sync(scratch)
        os.rename(scratch, final)
        _sync(self.folder)
        last_of_step = {step: path for step, _, path in self._complete()}
        kept = list(last_of_step.values())[-self.keep :]
        for old in [path for *_, path in self._complete() if path not in kept]:
            aside = self.folder / f".{old.name}.old.tmp"
            os.rename(old, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _seal(self, folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
        """[bytes, CRC-32] of this rank's share of the files, which are on disk afterwards."""
        for name in self._share(names):
            _sync(folder / name)
        return {name: _marks(folder / name) for name in self._share(names)}

    def _check(self, folder: Path, files: dict[str, list[int]]) -> None:
        """This rank's share of the files."""
        for name in self._share(files):
            if not (folder / name).is_file():
                raise _damaged(f"half-written: {name} is missing")
            if (found := _marks(folder / name)) != files[name]:
                marks = f"[bytes, CRC-32] are {found}, {files[name]} were written"
                raise _damaged(f"{name} is truncated or garbled: its {marks}")

    def _dcp(self, function: Callable[..., T], tensors: dict[str, Any], **storage: Any) -> T:
        with warnings.catch_warnings():
            alone = "torch.distributed is disabled, unavailable or uninitialized"  # which is fine
            warnings.filterwarnings("ignore", alone, UserWarning)
            return function(tensors, **storage, process_group=self.group, no_dist=not dist.is_initialized())

    @property
    def _rank(self) -> int:
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    @property
    def _size(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def _share(self, names: Iterable[str]) -> list[str]:
        return sorted(names)[self._rank :: self._size]

    def _gather(self, value: T) -> list[T]:
        values: list[Any] = [value] * self._size
        if dist.is_initialized():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def _together(self, what: str, function: Callable[[], T]) -> T:
        """This rank's result, once every rank has one: where one fails all raise, and none waits for it."""
        value: Any = None
        failure: BaseException | None = None
        try:
            value = function()
        except (Exception, CheckpointException) as error:
            failure = error
        kind = NoCheckpointError if isinstance(failure, NoCheckpointError) else CheckpointError
        failures = [other for other in self._gather(failure and (kind, _message(failure))) if other]
        if failures:
            messages = dict.fromkeys(message for _, message in failures)
            raise failures[0][0](f"{what}: {first_few(list(messages))}") from failure
        result: T = value
        return result

    def _on_first(self, what: str, function: Callable[[], T]) -> T:
        """The first rank's result, on all ranks."""
        result: Any = self._together(what, lambda: function() if self._rank == 0 else None)
        first: T = self._gather(result)[0]
        return first


def _made_by(optimizer: Optimizer, scheduler: LRScheduler, identity: Json) -> dict[str, Any]:
    return {"optimizer": type(optimizer).__name__, "scheduler": type(scheduler).__name__, **identity}


def _write_state(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)  # what `load` would refuse is refused now
    path.write_bytes(buffer.getbuffer())


def _read_run(path: Path, made_by: Json) -> dict[str, Any]:
    if not (path / "run.json").is_file():
        raise _damaged("half-written, or no checkpoint: run.json is missing")
    try:
        record = json.loads((path / "run.json").read_text())
        if record["format"] != FORMAT:
            raise CheckpointError(f"format {record['format']!r} is unknown: this library reads {FORMAT}")
        if record["crc32"] != _crc32_of(record["run"]):
            raise _damaged("run.json is garbled (its CRC-32 is another)")
        run: dict[str, Any] = record["run"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(f"run.json is garbled ({_message(error)})") from error
    compare("settings", run["identity"], json.loads(json.dumps(made_by)))
    return run


def _damaged(how: str) -> CheckpointError:
    return CheckpointError(f"{how}; with its folder deleted, the run goes on from the checkpoint before")


def _marks(path: Path) -> list[int]:
    """[bytes, CRC-32]."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _crc32_of(run: Any) -> int:
    return zlib.crc32(json.dumps(run).encode())


def _sync(path: Path) -> None:
    """Has a file, or a folder's names, on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _message(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {_message(cause)}" for rank, (cause, _) in error.failures.items())
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
