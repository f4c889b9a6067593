"""The rolls of one forward: an exchange, and the tensors that it answers for.

A tensor that the exchange knows is in the model as an alias with a mark: which prefetch, which name, which depth. A
roll of a marked tensor is answered from the exchange, and the answer is marked with the next depth. A clone of a marked
tensor is marked, too: Megatron-LM clones the labels before it rolls them. A tensor that was written to after it was
marked has another version, and is not answered. Nor are its clones: the exchange may read the tensor that was written.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from overlap_mtp.device_layout import DeviceLayout
from overlap_mtp.megatron.layouts import LeftToMegatronError, layout_of
from overlap_mtp.megatron.settings import Settings, roller_for, status
from overlap_mtp.schedules import Rolls
from overlap_mtp.tensors import INTEGER_VIEW

MARK = "_overlap_mtp_mark"
ZEROS = {"labels": 0, "padding_mask": 0}  # what Megatron-LM fills all tensors with


class Mark(NamedTuple):
    """What a tensor is to its prefetch."""

    prefetch: Prefetch
    name: str
    depth: int  # how far it is rolled
    version: int  # of the tensor when it was marked

    def __reduce__(self) -> tuple[Any, ...]:
        """Deep copies and files of a marked tensor have None for a mark: an exchange cannot leave its process."""
        return type(None), ()


class Prefetch:
    """The exchange of one forward. `start` sends it."""

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        depths: dict[str, int],
        cp_group: dist.ProcessGroup,
        packed: Any | None,
        settings: Settings,
    ) -> None:
        """Prepare the exchange.

        Args:
            tensors: of this rank, by name, [..., local_len] each.
            depths: how far each one will be rolled.
            cp_group: the ranks that share the sequence.
            packed: Megatron-LM's PackedSeqParams; None for a dense batch.
            settings: of the drop-in.
        """
        self.cp_group, self.packed, self.depths = cp_group, packed, depths
        self._settings = settings
        self.reason = ""  # why the batch is left to Megatron-LM
        # By name and depth, with their versions. Depth 0 is what the exchange reads.
        self._known = {name: [(tensor, tensor._version)] for name, tensor in tensors.items()}
        self._rolls: Rolls | None = None

    def start(self) -> None:
        """Send the exchange. If the batch is not one that we can roll, say why in `reason`."""
        try:
            self._rolls = self._send()
        except LeftToMegatronError as error:
            self.reason = str(error)

    def _send(self) -> Rolls:
        tensors = {name: known[0][0] for name, known in self._known.items()}
        settings, depths = self._settings, self.depths
        lengths = {tensor.shape[-1] for tensor in tensors.values()}
        if len(lengths) > 1:
            raise LeftToMegatronError(f"tensors of different lengths: {sorted(lengths)}")
        layout = layout_of(self.packed, lengths.pop(), self.cp_group.size(), settings)
        documents = 1 if self.packed is None else settings.max_documents + 1  # one for a tail
        while documents < layout.num_used_documents:
            documents *= 2
        num_depths = max(depths.values())
        shapes = tuple((name, tensor.dtype, tensor.shape[:-1]) for name, tensor in tensors.items())
        kind = (documents, shapes, tuple(depths.values()), isinstance(layout, DeviceLayout))
        options = {"max_documents": documents, "fills": ZEROS, "depths": depths}
        roller = roller_for(self.cp_group, settings, kind, num_depths, **options)
        rolls = roller.start(tensors, layout)
        status().exchanges += 1
        return rolls

    def mark_aliases(self, aliases: dict[str, torch.Tensor]) -> None:
        """Mark the aliases of its tensors that went into the model, by name. Call it before `start`."""
        for name, [(tensor, version)] in self._known.items():
            _marked(aliases[name], tensor, Mark(self, name, 0, version))

    def mark(self, tensor: torch.Tensor, name: str, depth: int) -> torch.Tensor:
        """Return an alias of a tensor of this prefetch, with its mark.

        It is an alias because the mark must not hang on the caller's tensor, nor on one that the prefetch itself
        holds: that cycle would keep the memory until the garbage collector runs.
        """
        return _marked(tensor.detach(), tensor, Mark(self, name, depth, tensor._version))

    def was_written(self, name: str) -> bool:
        """Whether a tensor, or one of its rolls so far, was written to: what is rolled from it may be wrong."""
        return any(tensor._version != version for tensor, version in self._known[name])

    def answer(self, mark: Mark) -> torch.Tensor | None:
        """Roll a marked tensor by one more. None if it is not rolled that far, or not by an exchange."""
        depth, known = mark.depth + 1, self._known[mark.name]
        if self._rolls is None or depth > self.depths[mark.name]:
            return None
        if depth == len(known):
            with torch.inference_mode(False):  # tensors of that mode have no versions
                rolled = self._rolls.at(depth)
            for name, tensor in rolled.items():
                self._known[name].append((tensor, tensor._version))
        return self.mark(known[depth][0], mark.name, depth)


def _marked(tensor: torch.Tensor, alias: torch.Tensor, mark: Mark) -> torch.Tensor:
    setattr(tensor, MARK, mark)
    if mark.name in ("labels", "input_ids"):  # Megatron-LM clones labels, which may be ids that it has rolled
        # Of another tensor with its memory: itself would be a cycle, and a weak reference dies with a temporary one.
        tensor.clone = partial(_clone, alias, mark)  # type: ignore[method-assign]
    return tensor


def _clone(alias: torch.Tensor, mark: Mark | None, *args: Any, **options: Any) -> torch.Tensor:
    """Clone a marked tensor, given its alias, with its mark if writes to the clone can be noticed."""
    copy = torch.clone(alias, *args, **options)  # `alias.clone` may be marked, too
    if mark is None or mark.version != alias._version or copy.is_inference():
        return copy
    return _marked(copy, copy.detach(), mark._replace(version=copy._version))


def mark_of(tensor: torch.Tensor) -> Mark | None:
    """The mark of a tensor that was not written to since it was marked, or None."""
    mark: Mark | None = getattr(tensor, MARK, None)
    return mark if mark is not None and mark.version == tensor._version else None


def can_roll(tensor: object) -> bool:
    """Whether an exchange can carry a tensor."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype in INTEGER_VIEW
        and not tensor.requires_grad
        and not tensor.is_inference()
        and tensor.numel() > 0
    )
