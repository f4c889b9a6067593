"""Patch Megatron-LM, and take the patches back."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any, Literal

from overlap_mtp.layout import Kind
from overlap_mtp.megatron.forward import Entry, patched_forward
from overlap_mtp.megatron.rolls import patched_roll
from overlap_mtp.megatron.settings import Settings, reset_status, status

MTP = "megatron.core.transformer.multi_token_prediction"
# Where a model's forward begins. The second is a part of megatron-core main only, the third of older versions only.
MODELS = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel"),
    ("megatron.core.models.hybrid.hybrid_model", "HybridModel"),
    ("megatron.core.models.mamba.mamba_model", "MambaModel"),
)
ENTRIES = ("forward", "build_schedule_plan")
ROLL_PARAMETERS = ["tensor", "shifts", "dims", "cp_group", "packed_seq_params"]
ENTRY_PARAMETERS = {"self", "input_ids", "position_ids", "labels", "packed_seq_params", "loss_mask"}

_undo: list[tuple[Any, str, Any, Any]] = []  # (owner, name, what it was before, what we put there)


class Installed:
    """What `install` returns. As a context manager it ends as it began: not installed, or with other settings."""

    def __init__(self, before: Settings | None) -> None:
        self._before = before

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            uninstall()
        else:
            status().settings = self._before


def install(
    *,
    schedule: str = "prefetch",
    transport: str = "auto",
    padding: Literal["exact", "megatron"] = "exact",
    layout: Kind = "zigzag",
    max_documents: int = 128,
    unknown: Literal["megatron", "exact"] = "megatron",
) -> Installed:
    """Let Megatron-LM's models prefetch their rolls. Call it on all ranks, before or after models are made.

    Calling it again replaces the settings.

    Args:
        schedule: how rolls are carried: "prefetch" (one exchange for all depths, under the decoder), "overlap",
            or those that block: "batched", "merged" and "sync".
        transport: as in `overlap_mtp.make_roller`.
        padding: of packed documents that are padded (`cu_seqlens_q` differs from `cu_seqlens_q_padded`): "exact"
            rolls each document within its valid tokens; "megatron" leaves such batches to Megatron-LM, which gives
            its bits, also where they are wrong.
        layout: how batches are cut over context-parallel ranks: "zigzag" (each document by itself),
            "zigzag_stream" (the whole stream, documents of any length) or "contiguous". Megatron-LM's batches do not
            say it.
        unknown: who rolls tensors that no forward has announced, for example in calls of your own: "megatron", or
            "exact" for `overlap_mtp.roll_tensor`, which blocks, too, but is right for padded documents. Tensors that
            need a gradient, other shifts or dimensions, other settings of `padding` and `layout`, and documents that
            it cannot roll are left to Megatron-LM.
        max_documents: room for packed documents. More double it, which the ranks agree on once.

    Returns:
        A context manager. At its end the settings are those of before, or nothing is installed, as before.

    Raises:
        ImportError: if megatron-core is missing.
        RuntimeError: if this version of it does not roll as the drop-in expects. Nothing is patched then.
        ValueError: if a setting is illegal.
    """
    before, chosen = status().settings, Settings(schedule, transport, padding, layout, max_documents, unknown)
    if not _undo:
        try:
            mtp = importlib.import_module(MTP)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"overlap_mtp.megatron needs megatron-core, but the module {error.name} is missing: "
                "pip install 'megatron-core>=0.16.1' (with --no-deps beside a torch of your own)"
            ) from error
        entries = list(_entries())
        version = importlib.import_module("megatron.core").__version__
        _check(mtp, entries, version)
        status().version = version
        original = mtp.roll_tensor
        roll = patched_roll(original)
        for module in _holders(original):
            _set(module, "roll_tensor", roll)
        for owner, name in entries:
            entry = Entry.of(getattr(owner, name), name, owner.__name__)
            _set(owner, name, patched_forward(entry))
    status().settings = chosen
    reset_status()
    return Installed(before)


def uninstall() -> None:
    """Take all patches back. Exchanges under way are still joined by the forwards that started them."""
    while _undo:
        owner, name, before, ours = _undo.pop()
        if vars(owner).get(name) is ours:  # and not what somebody else has put there since
            setattr(owner, name, before)
        if name == "roll_tensor":
            for module in _holders(ours):  # that imported it in the meantime
                setattr(module, name, before)
    status().settings = None


def _entries() -> Iterator[tuple[type, str]]:
    """(class, name) of each function where a forward begins."""
    for path, name in MODELS:
        try:
            model = getattr(importlib.import_module(path), name)
        except (ImportError, AttributeError):
            continue
        for entry in ENTRIES:
            # A MambaModel of older versions has no MTP; one of newer versions inherits.
            if entry in vars(model) and "loss_mask" in inspect.signature(vars(model)[entry]).parameters:
                yield model, entry


def _holders(roll: Callable[..., Any]) -> list[ModuleType]:
    """All modules that hold `roll_tensor`: `from ... import` makes references of its own."""
    modules = [one for one in list(sys.modules.values()) if isinstance(one, ModuleType)]
    return [module for module in modules if vars(module).get("roll_tensor") is roll]


def _check(mtp: ModuleType, entries: list[tuple[type, str]], version: str) -> None:
    """Raise RuntimeError unless megatron-core has the functions that we patch, and rolls by them."""
    problems = []
    roll = list(inspect.signature(mtp.roll_tensor).parameters) if hasattr(mtp, "roll_tensor") else []
    if roll[:5] != ROLL_PARAMETERS or roll[5:] not in ([], ["return_sum"]):
        problems.append(f"roll_tensor({', '.join(roll)})")
    for owner, name in entries:
        parameters = inspect.signature(vars(owner)[name]).parameters
        missing = ENTRY_PARAMETERS - parameters.keys()
        if missing:
            problems.append(f"{owner.__name__}.{name} without {', '.join(sorted(missing))}")
    if ("GPTModel", "forward") not in [(owner.__name__, name) for owner, name in entries]:
        problems.append("no GPTModel.forward with a loss_mask")
    gpt = getattr(importlib.import_module(MODELS[0][0]), "GPTModel", None)
    loss = getattr(mtp, "process_mtp_loss", None) or getattr(gpt, "_postprocess", None)
    layer = getattr(mtp, "MultiTokenPredictionLayer", None)
    embeddings = getattr(layer, "_get_embeddings", None)
    for what, function in (("its MTP layers do", embeddings), ("its MTP loss does", loss)):
        function = function and inspect.unwrap(function)
        code = getattr(function, "__code__", None)
        if code is None or "roll_tensor" not in code.co_names:
            problems.append(f"{what} not roll by roll_tensor")
        elif getattr(function, "__globals__", {}).get("roll_tensor", mtp.roll_tensor) is not mtp.roll_tensor:
            problems.append(f"{what} not roll by {MTP}.roll_tensor: somebody has replaced one of the two")
    if problems:
        raise RuntimeError(
            f"overlap_mtp.megatron does not know this megatron-core, which says that it is {version}: "
            f"{'; '.join(problems)}. It supports 0.16.1 and versions that roll in the same way. Nothing was patched: "
            "train without `install`"
        )


def _set(owner: Any, name: str, value: Any) -> None:
    _undo.append((owner, name, vars(owner)[name], value))
    setattr(owner, name, value)
