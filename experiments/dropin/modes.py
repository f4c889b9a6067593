"""Who rolls: Megatron-LM, the drop-in, or nobody. This imports neither of them, so that options are checked first."""

from __future__ import annotations

MODES = ("megatron", "megatron_host", "dropin", "dropin_host", "none")
BASELINE = "none"
REFERENCE = "megatron"


def modes_of(chosen: tuple[str, ...], documents: int) -> list[str]:
    """Return the modes that make sense for a number of documents, with the baseline. A dense batch has no bounds."""
    return [mode for mode in dict.fromkeys((*chosen, BASELINE)) if documents or not mode.endswith("_host")]


def has_host_bounds(mode: str) -> bool:
    """Return whether a mode leaves `cu_seqlens` in host memory."""
    return mode.endswith("_host")
