"""Full batches of activations, their rolls and gradients by the definition, row by row.

Gradients are sums of whole numbers, so they are exact in any order and dtype: everything is compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout
from overlap_mtp.layout import TAIL

from rank_pool import device_of
from strategies import same_bits

Tensors = dict[str, torch.Tensor]
Times = Callable[[int, str, int], int]  # (rank, name, depth) -> how often a rank's losses use these rolls
SEQ_DIM = {"BLH": 1, "LBH": 0, "LH": 0, "LH and LBH": 0}  # of each form of tensors


def once(rank: int, name: str, depth: int) -> int:
    return 1


def source_of(layout: SequenceLayout, depth: int) -> list[int]:
    """For each position, the position of the row that a roll puts there; -1 for 0. That is the definition."""
    source = [-1] * layout.seq_len
    for start, length in zip(layout.cu_seqlens[:-1].tolist(), layout.valid_lengths.tolist(), strict=True):
        if length == TAIL:
            source[start:] = range(start, layout.seq_len)
        for position in range(start, start + length - depth):
            source[position] = position + depth
    return source


@dataclass(frozen=True)
class Activations:
    """A full batch, sequence first, and the place of one rank, which holds `rows` of it.

    A rank's number is cp_rank * tp_size + tp_rank.
    """

    layout: SequenceLayout
    num_depths: int
    seq_dim: int
    tensors: Tensors  # [S, ...]
    weights: dict[
        tuple[str, int], torch.Tensor
    ]  # the gradients of the rolls at a depth; at 0 of the tensor itself
    cp_rank: int
    tp_rank: int
    tp_size: int
    device: torch.device

    @classmethod
    def of(
        cls,
        group: dist.ProcessGroup | None,
        layout: SequenceLayout,
        num_depths: int,
        form: str = "BLH",
        names: str = "ab",
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        tp_group: dist.ProcessGroup | None = None,
    ) -> Activations:
        generator = torch.Generator().manual_seed(seed)
        shapes = {}
        for n, name in enumerate(names):
            is_flat = form == "LH" or (form == "LH and LBH" and n == 0)
            shapes[name] = (layout.seq_len, *(() if is_flat else (2,)), 3 + 2 * n)
        tensors = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()
        }

        def whole(shape: tuple[int, ...]) -> torch.Tensor:
            sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
            return (sign * torch.randint(1, 5, shape, generator=generator)).to(dtype)

        weights = {
            (name, depth): whole(shape) for name, shape in shapes.items() for depth in range(num_depths + 1)
        }
        cp_rank = 0 if group is None else group.rank()
        tp = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
        return cls(
            layout, num_depths, SEQ_DIM[form], tensors, weights, cp_rank, *tp, device_of(group or tp_group)
        )

    @property
    def rank(self) -> int:
        return self.cp_rank * self.tp_size + self.tp_rank

    def rows_of(self, rank: int) -> np.ndarray:
        """The positions of the rows that a rank holds, in local order."""
        cp_rank, tp_rank = divmod(rank, self.tp_size)
        return self.layout.positions(cp_rank).reshape(self.tp_size, -1)[tp_rank]

    def holders(self) -> np.ndarray:
        """The rank that holds each position."""
        holders = np.empty(self.layout.seq_len, np.int64)
        for rank in range(self.layout.cp_size * self.tp_size):
            holders[self.rows_of(rank)] = rank
        return holders

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        """What this rank holds of a full tensor, as a roller takes it."""
        return full[self.rows_of(self.rank)].movedim(0, self.seq_dim).contiguous().to(self.device)

    def shards(self) -> Tensors:
        return {name: self.shard(tensor) for name, tensor in self.tensors.items()}

    def weight(self, name: str, depth: int) -> torch.Tensor:
        return self.shard(self.weights[name, depth])

    def rolled(self, name: str, depth: int) -> torch.Tensor:
        """The full roll."""
        full = self.tensors[name]
        known = torch.cat([full, torch.zeros_like(full[:1])])
        return known[source_of(self.layout, depth)]  # -1: the last row

    def gradient(self, name: str, times: Times = once) -> torch.Tensor:
        """The full gradient of a tensor if all losses are sums of rolls and tensors times their weights."""
        full = self.tensors[name]
        total = torch.zeros_like(torch.cat([full, full[:1]]), dtype=torch.float64)
        for depth in range(self.num_depths + 1):
            sources = source_of(self.layout, depth) if depth else [*range(self.layout.seq_len)]
            often = torch.tensor([times(rank, name, depth) for rank in self.holders().tolist()])
            weights = self.weights[name, depth].double() * often.view(-1, *[1] * (full.dim() - 1))
            total.index_add_(0, torch.tensor(sources) % len(total), weights)  # -1: the last row
        return total[:-1].to(full.dtype)

    def wrong_rolls(self, rolled: list[Tensors]) -> list[str]:
        """The rows of this rank's rolls, by depth, that are wrong."""
        holders, wrong = self.holders(), []
        for depth, tensors in enumerate(rolled, start=1):
            source = source_of(self.layout, depth)
            if sorted(tensors) != sorted(self.tensors):
                wrong.append(f"names {sorted(tensors)} at depth {depth}")
            for name, tensor in tensors.items():
                for row in self._wrong_rows(tensor, self.rolled(name, depth)):
                    comes = "0" if source[row] < 0 else f"row {source[row]} of rank {holders[source[row]]}"
                    where = "stays" if source[row] < 0 or holders[source[row]] == self.rank else "arrives"
                    wrong.append(f"{where}: row {row} of {name} at depth {depth}, which is {comes}")
        return wrong

    def wrong_gradients(self, gradients: Tensors, times: Times = once) -> list[str]:
        """The rows of this rank's gradients that are wrong."""
        holders, wrong = self.holders(), []
        users = self._users()
        for name, gradient in gradients.items():
            for row in self._wrong_rows(gradient, self.gradient(name, times)):
                others = sorted({int(holders[at]) for at in users[row]} - {self.rank})
                where = f"returns: from ranks {others}, the" if others else "stays: the"
                wrong.append(f"{where} gradient of row {row} of {name}")
        return wrong

    def num_boundary_rows(self) -> tuple[int, int]:
        """How many of this rank's rows others use, and how many of its rolled rows, at any depth, are others'."""
        holders, users = self.holders(), self._users()
        mine = self.rows_of(self.rank)
        leave = sum(any(holders[at] != self.rank for at in users[row]) for row in mine)
        arrive = 0
        for depth in range(1, self.num_depths + 1):
            source = source_of(self.layout, depth)
            arrive += sum(source[row] >= 0 and holders[source[row]] != self.rank for row in mine)
        return leave, arrive

    def _users(self) -> list[list[int]]:
        """For each position, the positions of all rolls that hold its row."""
        users: list[list[int]] = [[] for _ in range(self.layout.seq_len)]
        for depth in range(1, self.num_depths + 1):
            for at, source in enumerate(source_of(self.layout, depth)):
                if source >= 0:
                    users[source].append(at)
        return users

    def _wrong_rows(self, got: torch.Tensor, full: torch.Tensor) -> Iterator[int]:
        want = self.shard(full).cpu()
        if got.shape != want.shape or got.dtype != want.dtype:
            raise AssertionError(f"{got.dtype} {list(got.shape)} in place of {want.dtype} {list(want.shape)}")
        rows = zip(got.detach().cpu().movedim(self.seq_dim, 0), want.movedim(self.seq_dim, 0), strict=True)
        mine = self.rows_of(self.rank)
        if not same_bits(got.detach().cpu(), want):
            yield from (int(mine[at]) for at, pair in enumerate(rows) if not same_bits(*pair))
