"""Megatron-LM's own `roll_tensor`, from the installed megatron-core, with the interface of a roller.

Needs `pip install --no-deps megatron-core` beside torch, numpy and packaging, but neither Transformer Engine nor Apex.
Its dense form makes buffers on the current GPU, so on CPU a dense sequence goes through the packed form.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout
from overlap_mtp.exchange.spec import Batch
from overlap_mtp.schedules.roller import Rolls

CU_SEQLENS_ON = ("host", "device")  # a Python list, which is the fastest form on the host, or a tensor


def version() -> str | None:
    """Return the version of megatron-core, or None if it, or what its rolls import, is missing."""
    try:
        _import()
    except ImportError:
        return None
    return metadata.version("megatron-core")


def _import() -> tuple[Any, Any]:
    with warnings.catch_warnings():  # it warns that Apex and Transformer Engine are absent
        warnings.simplefilter("ignore")
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.transformer.multi_token_prediction import roll_tensor
    return roll_tensor, PackedSeqParams


class MegatronRoller:
    """Rolls every tensor by one token, depth after depth, as Megatron-LM's MTP block and its loss do.

    Its packed form takes the bounds of the padded documents and knows no padding: if the token ahead is padding, it
    returns what the padding holds. Messages travel on the default process group.
    """

    def __init__(self, cp_group: dist.ProcessGroup, where: str, device: torch.device) -> None:
        self._roll, self._params = _import()
        self._group, self._where, self._device = cp_group, where, device

    def argument(self, layout: SequenceLayout) -> Any:
        """Return the PackedSeqParams of a zigzag layout, or None if it is dense."""
        if not layout.is_packed and self._device.type == "cuda":
            return None
        bounds: Any = layout.cu_seqlens.tolist()
        if self._where == "device":
            bounds = torch.tensor(bounds, dtype=torch.int32, device=self._device)
        return self._params(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)

    def start(self, batch: Batch, argument: Any) -> Rolls:
        """As Roller.start, with what `argument` returned in place of the layout."""
        return _MegatronRolls(self, batch, argument)

    def roll(self, tensors: Batch, argument: Any) -> dict[str, torch.Tensor]:
        """Return the tensors rolled by one token."""
        return {
            name: self._roll(tensor, shifts=-1, dims=-1, cp_group=self._group, packed_seq_params=argument)[0]
            for name, tensor in tensors.items()
        }

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class _MegatronRolls(Rolls):
    def __init__(self, roller: MegatronRoller, batch: Batch, argument: Any) -> None:
        self._roller, self._argument = roller, argument
        self._rolled = [dict(batch)]

    def at(self, depth: int) -> dict[str, torch.Tensor]:
        while len(self._rolled) <= depth:
            self._rolled.append(self._roller.roll(self._rolled[-1], self._argument))
        return self._rolled[depth]
