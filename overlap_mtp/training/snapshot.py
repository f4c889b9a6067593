"""What of a run a checkpoint holds: its tensors by name, its parameter groups, its random generators."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn import Module
from torch.optim import Optimizer

Json = Mapping[str, Any]  # of JSON values


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or loaded. Raised on all ranks alike."""


def state_of(model: Module, optimizer: Optimizer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The tensors, named as in the model that is not parallel, and the parameter groups.

    torch's get_optimizer_state_dict would take a step of an optimizer that has no state yet, and leave it so.
    """
    own: dict[str, Any] = get_model_state_dict(model)
    names = _names(model, optimizer, own)
    flat = list(chain(*names))
    packed = optimizer.state_dict()
    groups = [{**group, "params": some} for group, some in zip(packed["param_groups"], names, strict=True)]
    return {"model": own, "optimizer": {flat[i]: values for i, values in packed["state"].items()}}, groups


def _names(model: Module, optimizer: Optimizer, own: Json) -> list[list[str]]:
    """The parameters of each group, by the names in the model's state `own` (taken before: it reshards FSDP2)."""
    wrappers = re.compile(r"(_orig_mod|_checkpoint_wrapped_module)\.")
    names = {parameter: wrappers.sub("", name) for name, parameter in model.named_parameters()}
    groups = [[names.get(one, "?") for one in group["params"]] for group in optimizer.param_groups]
    if unknown := [name for name in chain(*groups) if name not in own]:
        raise CheckpointError(f"parameters of the optimizer that the model has not: {first_few(unknown)}")
    return groups


def make_room(path: Path, model: Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors to read the checkpoint at `path` into, sharded as the model is, and the contents of its `state.pt`.

    Raises CheckpointError where the model or the optimizer's groups have other parameters.
    """
    metadata = FileSystemReader(path).read_metadata()
    saved = [(*place, metadata.state_dict_metadata[key]) for key, place in metadata.planner_data.items()]
    own: dict[str, Any] = get_model_state_dict(model)
    there = {name: _kind(entry) for part, name, *_, entry in saved if part == "model"}
    compare("parameters", there, {name: _kind(value) for name, value in own.items()})
    state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    groups = {f"group {i}": sorted(group["params"]) for i, group in enumerate(state["groups"])}
    here = {f"group {i}": sorted(names) for i, names in enumerate(_names(model, optimizer, own))}
    compare("parameter groups", groups, here)

    room: dict[str, Any] = {"model": copy.deepcopy(own), "optimizer": {}}
    for name, what, entry in [rest for part, *rest in saved if part == "optimizer"]:
        values = room["optimizer"].setdefault(name, {})
        if isinstance(entry, TensorStorageMetadata):
            # A moment is sharded as its parameter; a step is on the CPU.
            like = own[name] if what != "step" and entry.size == own[name].shape else torch.empty(entry.size)
            values[what] = torch.empty_like(like, dtype=entry.properties.dtype)
        else:
            values[what] = None  # and will be replaced
    return room, state


def adopt(tensors: dict[str, Any], state: dict[str, Any], model: Module, optimizer: Optimizer) -> None:
    """Gives model and optimizer what `make_room` made room for, and `load` has filled."""
    names = chain(*_names(model, optimizer, tensors["model"]))
    # A parameter that never had a gradient has no state, in the run that saved it as here.
    own = {i: tensors["optimizer"][name] for i, name in enumerate(names) if name in tensors["optimizer"]}
    places = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    groups = [{**group, "params": some} for group, some in zip(state["groups"], places, strict=True)]
    set_model_state_dict(model, tensors["model"])
    optimizer.load_state_dict({"state": own, "param_groups": groups})


def random_state() -> dict[str, Any]:
    """Of torch's generators on this rank."""
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if on_gpu else None}


def set_random_state(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["cpu"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


def compare(of_what: str, there: Json, here: Json) -> None:
    """Raises CheckpointError naming what a checkpoint says otherwise than this run."""
    pairs = [(name, there.get(name, "absent"), here.get(name, "absent")) for name in {**there, **here}]
    if differences := [f"{name} is {that} there, {this} here" for name, that, this in pairs if that != this]:
        raise CheckpointError(f"made with other {of_what}: {first_few(differences)}")


def _kind(value: Any) -> str:
    """dtype and whole shape of a tensor, here or in a checkpoint."""
    if isinstance(value, TensorStorageMetadata):
        return f"{value.properties.dtype} {list(value.size)}"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else "an object"


def first_few(texts: list[str]) -> str:
    """The first of them, for a message."""
    return "; ".join([*texts[:5], f"and {len(texts) - 5} more"] if len(texts) > 5 else texts)
