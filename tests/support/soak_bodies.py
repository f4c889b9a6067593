"""Soaks on the ranks of a test."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from harness.rounds import rank_console
from soaks.activations import ActivationSoak
from soaks.tokens import TokenSoak

from activation_mutants import MUTANTS

KINDS = {kind.carries: kind for kind in (TokenSoak, ActivationSoak)}


def wrong_words(group: dist.ProcessGroup, carries: str, transport: str, exchanges: int) -> int:
    """How many words of all ranks are wrong."""
    on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    found = KINDS[carries](group, device, transport).run(exchanges, rank_console())
    assert found["exchanges"] >= exchanges
    wrong: int = found["wrong_words"]
    return wrong


def wrong_words_with(group: dist.ProcessGroup, names: list[str]) -> list[int]:
    """The same of activations with each mutant."""
    found = []
    for name in names:
        with pytest.MonkeyPatch.context() as patched:
            MUTANTS[name][0](patched)
            found.append(wrong_words(group, "activations", "process_group", 20))
    return found
