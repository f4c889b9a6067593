"""Who rolls: Megatron-LM, the drop-in, or nobody. This imports neither of them, so that options are checked first."""

from __future__ import annotations

from typing import Any

MODES = ("megatron", "megatron_host", "dropin", "dropin_host", "none")
BASELINE = "none"
REFERENCE = "megatron"
AGAIN = f"{REFERENCE} again"  # its own step once more


def modes_of(chosen: tuple[str, ...], documents: int) -> list[str]:
    """Return the modes that make sense for a number of documents, with the baseline. A dense batch has no bounds."""
    return [mode for mode in dict.fromkeys((*chosen, BASELINE)) if documents or not mode.endswith("_host")]


def has_host_bounds(mode: str) -> bool:
    """Return whether a mode leaves `cu_seqlens` in host memory."""
    return mode.endswith("_host")


def is_equal(row: dict[str, Any]) -> bool:
    """Return whether the bits of a mode, a row of `compare_bits`, are those of the reference."""
    return bool(row["loss"] and row["mtp_losses"] and row["equal_gradients"] == row["gradients"])
