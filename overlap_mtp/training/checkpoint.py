"""Checkpoints of a training run: they are complete or absent, and load at other parallel sizes."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from overlap_mtp.training.checkpoint_record import (
    HINT,
    CheckpointError,
    Json,
    NoCheckpointError,
    compare,
    file_marks,
    first_few,
    message,
    read_run,
    sync_to_disk,
    write_run,
)
from overlap_mtp.training.safe_reader import SafePlanner, SafeReader

__all__ = ["CheckpointError", "Checkpoints", "NoCheckpointError"]
CLASSES = ("optimizer", "scheduler")  # of an identity: their classes, which `save` adds
T = TypeVar("T")


class Checkpoints:
    """The last `keep` checkpoints of one run, in a folder that all ranks of `group` share.

    A checkpoint is a folder `step-00000100` (`step-00000100-2` if that step was saved again). It holds the tensors in
    torch's distributed format, `state.pt` (parameter groups, scheduler, and torch's random generators of the CPU and of
    each rank's GPU) and `run.json` (plain numbers, and the size and CRC-32 of every file). Its name begins with a dot
    until all of it is on disk, and again while it is deleted. So a folder `step-*` is complete, whenever the run dies.
    Only one run at a time may write.

    Args:
        sizes: of the mesh. Random generators are restored only at the same sizes and number of ranks.
        may_differ: names of identity values that the run that loads may change.
        if_absent: identity values of checkpoints that do not have them, because they are older.
        group: the ranks that save and load together, by default all. With NCCL, each must have set its device.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        *,
        sizes: Json | None = None,
        may_differ: Collection[str] = (),
        if_absent: Json | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self.folder, self.keep, self.may_differ, self.group = Path(folder), keep, may_differ, group
        self.if_absent = if_absent or {}
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._size = dist.get_world_size(group) if dist.is_initialized() else 1
        self._layout = {**(sizes or {}), "ranks": self._size}

    def latest(self) -> Path | None:
        """Return the last complete checkpoint, if any. Change nothing and ask no other rank."""
        return next((path for *_, path in reversed(self._complete())), None)

    def check(self, identity: Json) -> int:
        """Return the step of the last checkpoint, 0 if there is none. Read no tensor and ask no other rank.

        Raises:
            CheckpointError: it was made with another identity than `load` will be given, or its `run.json` is damaged.
        """
        path = self.latest()
        if path is None:
            return 0
        try:
            run = read_run(path)
            there = {name: value for name, value in run["identity"].items() if name not in CLASSES}
            self._compare_identity(there, identity)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return int(run["progress"]["step"])

    def save(
        self,
        step: int,
        model: Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        progress: Json,
        identity: Json,
    ) -> Path:
        """Write the checkpoint of `step`, then delete all but the last `keep`. Collective over the group.

        Call it between steps: gradients are not saved. It changes nothing in the run, not even torch's random
        generators. A step that was saved before is saved again beside the old one, which is then deleted.

        Args:
            progress: JSON values for `load` to return, for example the position in the data. Rank 0's are saved.
            identity: JSON values that must be the same in the run that loads, for example the model's sizes.

        Raises:
            CheckpointError: a weight is not finite, a file cannot be written, or there is a later step. Earlier
                checkpoints stay as they are.
        """
        what = f"saving step {step} in {self.folder}"
        identity = _with_classes(identity, optimizer, scheduler)
        run = {"progress": {**progress, "step": step}, "identity": identity, "layout": self._layout}
        tensors, groups = self._together(what, lambda: _state_of(model, optimizer))
        self._together(what, lambda: _check_finite(model, tensors["model"]))
        final = self._on_first(what, lambda: self._begin(step, run))
        scratch = self.folder / f".{final.name}.tmp"
        on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if on_gpu else None}
        state = {"groups": groups, "scheduler": scheduler.state_dict(), "random": self._gather(random)}
        self._on_first(what, lambda: _write_state(scratch / "state.pt", state))
        writer = dcp.FileSystemWriter(scratch, sync_files=False)  # `file_marks` does, after the last byte
        self._together(what, lambda: dcp.save(tensors, storage_writer=writer, process_group=self.group))
        names = self._on_first(what, lambda: [path.name for path in scratch.iterdir()])
        run["files"] = self._marks_of(what, scratch, names)
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
        """Load the checkpoint at `path`, by default the last one, and return its progress and its "step". Collective.

        Everything is read and checked before the run changes, except that gradients are dropped: the tensors are read
        into their memory. Files may be pickles (`.metadata` is one), but no code in them runs, and no file outside of
        the checkpoint's folder is read.

        Raises:
            NoCheckpointError: there is none.
            CheckpointError: a file is missing or is not as it was written, names what no checkpoint needs, the format
                is unknown, or the checkpoint was made with another identity, other parameters or groups, or another
                class of optimizer or scheduler.
        """
        path = self._on_first("loading", lambda: path or self.latest())
        if path is None:
            raise NoCheckpointError(f"loading: there is no checkpoint in {self.folder}")
        what = f"loading {path}"
        identity = _with_classes(identity, optimizer, scheduler)
        run = self._on_first(what, lambda: read_run(path))
        self._together(what, lambda: self._compare_identity(run["identity"], identity))
        found = self._marks_of(what, path, run["files"])
        for name, marks in run["files"].items():
            if found[name] != marks:
                how = f"its [bytes, CRC-32] are {found[name] or 'missing'}, not {marks}"
                raise CheckpointError(f"{what}: {name} is half-written or damaged ({how}){HINT}")
        reader, read = SafeReader(path, run["files"]), {"planner": SafePlanner(), "process_group": self.group}
        tensors, state = self._together(what, lambda: _make_room(path, reader, model, optimizer))
        optimizer.zero_grad(set_to_none=True)
        self._together(what, lambda: dcp.load(tensors, storage_reader=reader, **read))
        self._together(what, lambda: _adopt(tensors, state, model, optimizer))
        scheduler.load_state_dict(state["scheduler"])
        if run["layout"] == self._layout:
            random = state["random"][self._rank]
            torch.set_rng_state(random["cpu"])
            if random["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(random["cuda"])
        return dict(run["progress"])

    def _compare_identity(self, there: Json, identity: Json) -> None:
        there, here = {**self.if_absent, **there}, json.loads(json.dumps(identity))
        both = [{n: v for n, v in one.items() if n not in self.may_differ} for one in (there, here)]
        compare("settings", *both)

    def _complete(self) -> list[tuple[int, int, Path]]:
        """Return (step, how many times it was saved, path) of each checkpoint, in this order."""
        paths = self.folder.iterdir() if self.folder.is_dir() else []
        matches = [(re.fullmatch(r"step-(\d+)(?:-(\d+))?", path.name), path) for path in paths]
        return sorted((int(match[1]), int(match[2] or 1), path) for match, path in matches if match)

    def _begin(self, step: int, run: Json) -> Path:
        """Make the temporary folder of a checkpoint and delete those of dead runs. Return its final path."""
        json.dumps(run)  # raises before anything is written
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{step:08d}"
        for last_step, times, last in self._complete()[-1:]:
            if last_step > step:
                newer = f"checkpoint {last.name} is newer than step {step}"
                raise CheckpointError(f"{newer}: resume into a different folder")
            if last_step == step:
                final = self.folder / f"step-{step:08d}-{times + 1}"
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        (self.folder / f".{final.name}.tmp").mkdir()
        return final

    def _publish(self, run: dict[str, Any], scratch: Path, final: Path) -> None:
        write_run(scratch, run)
        sync_to_disk(scratch)
        os.rename(scratch, final)
        sync_to_disk(self.folder)
        kept = list({step: path for step, _, path in self._complete()}.values())[-self.keep :]
        for old in [path for *_, path in self._complete() if path not in kept]:
            aside = self.folder / f".{old.name}.old.tmp"
            os.rename(old, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _marks_of(self, what: str, folder: Path, names: Iterable[str]) -> dict[str, Any]:
        """Return the marks of all files. Each rank reads its share of them."""
        share = sorted(names)[self._rank :: self._size]
        marks = self._together(what, lambda: {name: file_marks(folder / name) for name in share})
        return {name: mark for some in self._gather(marks) for name, mark in some.items()}

    def _gather(self, value: T) -> list[T]:
        values: list[Any] = [value] * self._size
        if dist.is_initialized():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def _together(self, what: str, function: Callable[[], T]) -> T:
        """Return this rank's result after every rank has one. If one fails, all raise, and none waits for it."""
        result, failure = cast(T, None), cast(BaseException | None, None)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # it may be
                result = function()
        except (Exception, dcp.CheckpointException) as error:
            failure = error
        if failures := dict.fromkeys(other for other in self._gather(failure and message(failure)) if other):
            raise CheckpointError(f"{what}: {first_few(list(failures))}") from failure
        return result

    def _on_first(self, what: str, function: Callable[[], T]) -> T:
        """Return the first rank's result on all ranks."""
        return cast(T, self._gather(self._together(what, lambda: function() if self._rank == 0 else None))[0])


def _with_classes(identity: Json, *objects: object) -> Json:
    names = [type(one).__name__ for one in objects]
    return {**dict(zip(CLASSES, names, strict=True)), **identity}


def _state_of(model: Module, optimizer: Optimizer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the tensors and the parameter groups, with the names of the model without parallelism."""
    own: dict[str, Any] = get_model_state_dict(model)  # first, because it reshards FSDP2
    wrapper = re.compile(r"(_orig_mod|_checkpoint_wrapped_module)\.")
    names = {parameter: wrapper.sub("", name) for name, parameter in model.named_parameters()}
    flat = [names.get(one, "?") for group in optimizer.param_groups for one in group["params"]]
    if unknown := [name for name in flat if name not in own]:
        raise CheckpointError(f"the model lacks these parameters of the optimizer: {first_few(unknown)}")
    packed = optimizer.state_dict()  # get_optimizer_state_dict would take a step if there is no state yet
    groups = [{**group, "params": [flat[i] for i in group["params"]]} for group in packed["param_groups"]]
    return {"model": own, "optimizer": {flat[i]: values for i, values in packed["state"].items()}}, groups


def _check_finite(model: Module, tensors: Json) -> None:
    """Raise CheckpointError if this rank's part of a parameter is not finite. A buffer may be infinite: a mask is."""
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in tensors.items():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in buffers and isinstance(part, torch.Tensor) and not part.isfinite().all():
            raise CheckpointError(
                f"{name} is not finite: go on from an earlier checkpoint, with a lower learning rate"
            )


def _make_room(
    path: Path, reader: SafeReader, model: Module, optimizer: Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return tensors to read a checkpoint into, sharded as the model is, and the contents of its `state.pt`."""
    metadata = reader.read_metadata()
    saved = [(*place, metadata.state_dict_metadata[key]) for key, place in metadata.planner_data.items()]
    tensors, groups = _state_of(model, optimizer)
    own = tensors["model"]
    there = {name: _kind(entry) for part, name, *_, entry in saved if part == "model"}
    compare("parameters", there, {name: _kind(value) for name, value in own.items()})
    state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    sorted_names = [[sorted(group["params"]) for group in some] for some in (state["groups"], groups)]
    compare("parameter groups", *({f"group {i}": n for i, n in enumerate(some)} for some in sorted_names))

    room: dict[str, Any] = {"model": copy.deepcopy(own), "optimizer": {}}
    for name, what, entry in [rest for part, *rest in saved if part == "optimizer"]:
        values = room["optimizer"].setdefault(name, {})
        values[what] = None  # an object: reading replaces it
        if isinstance(entry, dcp.TensorStorageMetadata):
            # A moment is sharded as its parameter; a step is on the CPU.
            like = own[name] if what != "step" and entry.size == own[name].shape else torch.empty(entry.size)
            values[what] = torch.empty_like(like, dtype=entry.properties.dtype)
    return room, state


def _adopt(tensors: dict[str, Any], state: dict[str, Any], model: Module, optimizer: Optimizer) -> None:
    """Give model and optimizer the tensors that were read."""
    _, own = _state_of(model, optimizer)
    names = [name for group in own for name in group["params"]]
    # A parameter that never had a gradient has no state, neither in the saved run nor here.
    states = {i: tensors["optimizer"][name] for i, name in enumerate(names) if name in tensors["optimizer"]}
    places = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    groups = [{**group, "params": some} for group, some in zip(state["groups"], places, strict=True)]
    set_model_state_dict(model, tensors["model"])
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _write_state(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path)
    torch.load(path, weights_only=True)  # what `load` would refuse is refused now


def _kind(value: Any) -> str:
    """Return the dtype and global shape of a tensor, in this run or in a checkpoint."""
    if isinstance(value, dcp.TensorStorageMetadata):
        return f"{value.properties.dtype} {list(value.size)}"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else "an object"
