"""The interface that all schedules share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from overlap_mtp.device_layout import DeviceLayout, Layout
from overlap_mtp.exchange.group import ExchangeGroup, Traffic
from overlap_mtp.exchange.plan import fingerprint_of
from overlap_mtp.exchange.row_spec import RowSpec
from overlap_mtp.exchange.spec import Batch, ExchangeSpec, RollOptions, check_documents
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.agreement import agree, compare_microbatches

Tokens = dict[str, torch.Tensor]
Spec = ExchangeSpec | RowSpec
MARKS = 128  # of a microbatch: one for each of its exchanges, and these for one in its place
CHANGED, REFUSED = 126, 127  # a microbatch of another kind; one that was refused


class Rolls(ABC):
    """The rolled tensors of one microbatch."""

    @abstractmethod
    def at(self, depth: int) -> Tokens:
        """Return every tensor of the batch shifted left by `depth`.

        It waits for the exchange if the schedule has one, on the current stream (CUDA) or on the host (CPU). Nothing
        overwrites the tensors: they belong to this microbatch. Until the last depth was taken, do not write into them
        or into those given to `start`: what follows may be rolled from them.

        Args:
            depth: from 1 to num_depths.

        Returns:
            The tensors by name, of the same dtypes and shapes, without those whose own depth is smaller.

        Raises:
            ValueError: if there is no such depth.
            RuntimeError: if a peer was late or rolled by another layout (the ranks are then out of step, and the cp
                group is of no further use), or if `start` was inside of a CUDA graph's capture and this is not.
        """

    def set_replay_layout(self, layout: SequenceLayout) -> None:
        """Give exchanges that were captured in a CUDA graph the layout of the replays to come.

        It copies on the current stream without waiting for the device.

        Args:
            layout: of the same kind and length, with at most max_documents documents.

        Raises:
            RuntimeError: if nothing was captured.
            ValueError: if the layout is of another kind or length.
        """
        raise RuntimeError(
            "only rolls with an exchange that was captured in a CUDA graph take another layout"
        )


class ChainedRolls(Rolls):
    """Depth k + 1 is depth k rolled by one, when it is asked for."""

    def __init__(self, roller: Roller, batch: Tokens, roll: Callable[[Tokens], Tokens]) -> None:
        self._roller = roller
        self._roll = roll
        self._rolled = [batch]  # by depth; the batch itself at 0

    def at(self, depth: int) -> Tokens:
        self._roller.check_depth(depth)
        while len(self._rolled) <= depth:
            self._rolled.append(self._roll(self._roller.at_depth(self._rolled[-1], len(self._rolled))))
        return dict(self._rolled[depth])


@dataclass(frozen=True)
class RollerConfig:
    """What `make_roller` was asked for."""

    schedule: str
    group: ExchangeGroup
    transport: str  # "" if the schedule has none
    options: RollOptions
    ignore_index: int
    check_layouts: bool  # of sync alone


class Roller(ABC):
    """Rolls the tensors of one microbatch after the other by one schedule. `make_roller` makes one."""

    is_overlapped = False  # whether its exchanges run beside the current stream
    reads_device_bounds = False  # whether it takes a DeviceLayout on GPUs

    def __init__(self, config: RollerConfig) -> None:
        self.name, self.options, self.num_depths = config.schedule, config.options, config.options.num_depths
        self.max_documents = config.options.max_documents
        self.ignore_index, self.check_layouts = config.ignore_index, config.check_layouts
        self.traffic = Traffic()
        self._group = config.group
        self._number = self._group.num_rollers  # all ranks make the rollers of a cp group in the same order
        self._group.num_rollers += 1
        # The first mark of the last microbatch, started or refused after the first use. Ranks whose exchanges have
        # different marks are out of step.
        self.mark = self._number * MARKS * 2**16
        self._spec: Spec | None = None  # of the last batch that could be started: all ranks agreed on it
        self._spec_of: Callable[[Batch, Layout], Spec] = partial(
            ExchangeSpec.of,
            group=self._group,
            schedule=self.name,
            transport=config.transport,
            options=self.options,
        )
        self._kind: list[object] = []  # of the last batch that has a spec
        self._known: Spec  # which this is
        self._is_closed = False

    def start(self, batch: Batch, layout: Layout, ready: torch.cuda.Event | None = None) -> Rolls:
        """Start what the schedule can start. On CUDA it does not wait for the device.

        But prepared, sync and all schedules of activations wait to read the bounds of a DeviceLayout.

        All ranks of the cp group call this in the same order with the same layout. At first use, and whenever names,
        dtypes, batch size or kind of layout change, the ranks agree on them, which blocks. If two kinds of batch
        alternate, use a roller for each. Use a roller from one stream at a time, or from streams that wait for each
        other. Join all exchanges before you replay a graph that holds one.

        Args:
            batch: this rank's tensors by name, [..., local_len] each (for example [B, local_len]) and on one device;
                bool, uint8, int8, int32, int64, float16, bfloat16, float32 or float64. `labels` must be able to hold
                the roller's `ignore_index`. Names with None are left out. Of activations: as `make_activation_roller`.
            layout: of the batch. Only schedules that pack, on GPUs, use a DeviceLayout as it is.
            ready: a CUDA event after which the batch, and the bounds of a DeviceLayout, may be read. Default: after all
                work queued on the current stream. An earlier event lets an overlapped exchange begin in the middle of a
                long kernel, but not once a graph holds an exchange, nor over symmetric memory when memory for rolls is
                new. If the batch belongs to another stream, keep it alive, or record this stream and the end of the
                exchange on it, until the rolls are joined.

        Returns:
            The rolls.

        Raises:
            ValueError: if something is illegal or the ranks differ. At first use all ranks raise. Later only the rank
                with the illegal batch does, and ranks that get tokens from it raise RuntimeError at this exchange or
                the next. With contiguous layouts only the rank right below it raises; if the last rank has a batch
                of another kind, it waits until the process group gives up. With `sync` and no `check_layouts`, its
                peers wait until then, too.
            RuntimeError: if the roller is closed, or a peer was late, out of step or rolled by another layout. Make a
                new cp group and new rollers then. If ranks start rollers with messages of other sizes in another order,
                gloo ends the process.
        """
        self.check_open()
        try:
            if isinstance(batch, Mapping) and any(tensor is None for tensor in batch.values()):
                batch = {name: tensor for name, tensor in batch.items() if tensor is not None}
            if isinstance(layout, DeviceLayout) and not (
                self.reads_device_bounds and layout.cu_seqlens.is_cuda
            ):
                layout = layout.on_host()
            spec = self._find_spec(batch, layout)
            is_new = spec != self._spec
            if is_new:
                self._check(spec)
        except Exception as error:
            if self._spec is None:
                agree(self._group, self.name, None, str(error))
            else:
                self._refuse()
            raise
        if is_new:
            if self._spec is not None:
                self._announce_change()
            more = {"number of the roller": self._number, "check_layouts": self.check_layouts}
            agree(self._group, self.name, spec, more=more)
            self._adopt(spec, layout)
            self._spec = spec
        self.mark += MARKS
        if ready is not None and not self.is_overlapped:
            torch.cuda.current_stream().wait_event(ready)
        return self._start(batch, layout, ready)

    def _find_spec(self, batch: Batch, layout: Layout) -> Spec:
        """The spec of a batch. Mostly it is that of the last one, and need not be made."""
        kind: list[object] = [type(layout)]
        try:
            kind += [layout.kind, layout.is_packed, layout.seq_len, layout.cp_size]
            kind.append(layout.cu_seqlens.device if isinstance(layout, DeviceLayout) else None)
            for name, tensor in batch.items():
                kind += [name, type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout]
        except Exception:  # `_spec_of` says what is wrong
            kind = []
        if kind and kind == self._kind:
            check_documents(layout, self.max_documents)
        else:
            self._known, self._kind = self._spec_of(batch, layout), kind
        return self._known

    @property
    def transport(self) -> str:
        """The transport in use, or the one asked for before the first `start`; "" if the schedule has none."""
        return ""

    def _refuse(self) -> None:
        """Tell the peers, which start this microbatch, that this rank cannot."""
        if self.check_layouts:
            self.mark += MARKS
            with contextlib.suppress(RuntimeError):  # the refused batch's own error says more
                self._compare(self.mark + REFUSED)

    def _announce_change(self) -> None:
        """Find out whether all ranks have another kind of batch: only then can they agree on it."""
        if self.check_layouts:
            try:
                self._compare(self.mark + CHANGED)
            except RuntimeError:
                self.mark += MARKS  # as those of the peers, which have started another microbatch
                raise

    def compare(self, layout: SequenceLayout, mark: int) -> None:
        """Raise RuntimeError on all ranks if another rank is about to exchange something else (`check_layouts`)."""
        if self.check_layouts:
            self._compare(fingerprint_of(layout.checksum, layout.batch, mark))

    def _compare(self, word: int) -> None:
        """Raise RuntimeError on all ranks if another rank has another word."""
        assert self._spec is not None
        compare_microbatches(self._group, word, self._spec.device)

    @abstractmethod
    def _start(self, batch: Batch, layout: Layout, ready: torch.cuda.Event | None) -> Rolls: ...

    def _check(self, spec: Spec) -> None:  # noqa: B027 - most schedules roll whatever has a spec
        """Raise ValueError if the schedule needs other tensors."""

    def _adopt(self, spec: Spec, layout: Layout) -> None:  # noqa: B027 - most have nothing to make
        """Make what batches of a new spec need. Collective."""

    def raise_if_failed(self) -> None:  # noqa: B027 - most schedules find out when they roll
        """Say if a peer was late or rolled by another layout. It never waits. Of `sync` it does nothing.

        `start` and the first `at` of an exchange do the same for their kind of batch. Replays of a CUDA graph call
        neither, so call it now and then. It knows what the device has found so far: wait for the device first if no
        weight may change by wrong rolls. It raises at each call until the roller is closed: no later rolls are right.

        Raises:
            RuntimeError: if so, now or before.
        """

    def close(self) -> None:
        """Free the buffers when the device is done with them. The exchange group stays, for the next roller.

        Replay no graph that holds an exchange of this roller afterwards.

        Raises:
            RuntimeError: as `raise_if_failed`, if nothing has raised it before.
        """
        self._is_closed = True

    def check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this roller is closed")

    def at_depth(self, tokens: Tokens, depth: int) -> Tokens:
        """A copy of `tokens` without those that are not rolled so far."""
        depths = self.options.depths
        if not depths:
            return dict(tokens)
        return {name: tensor for name, tensor in tokens.items() if depths.get(name, depth) >= depth}

    def check_depth(self, depth: int) -> None:
        if not 1 <= depth <= self.num_depths:
            raise ValueError(f"depth must be in [1, {self.num_depths}] (num_depths), got {depth}")


def detached(batch: Batch) -> Tokens:
    """The batch outside of any autograd graph, sorted by name as on all ranks."""
    return {
        name: batch[name].detach() if batch[name].requires_grad else batch[name] for name in sorted(batch)
    }
