"""The mesh of data-, context- and tensor-parallel ranks, and which rank holds which part of the model.

rank = (dp_rank * cp_size + cp_rank) * tp_size + tp_rank: the ranks of a tp group are neighbours.
Parameters are split over tp (DTensor) and sharded over dp x cp (FSDP2), where gradients are summed.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from overlap_mtp.layout import Kind, length_unit
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.moe import MoE


@dataclass(frozen=True)
class ParallelDims:
    """The number of ranks in each dimension of the mesh."""

    dp: int = 1  # ranks that share no sequence
    cp: int = 1  # ranks that share a sequence
    tp: int = 1  # ranks that share each tensor

    def __post_init__(self) -> None:
        for name in ("dp", "cp", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    @property
    def world(self) -> int:
        return self.dp * self.cp * self.tp

    def check(self, config: ModelConfig, seq_len: int, kind: Kind, world_size: int) -> None:
        """Check that the dimensions suit the model, the sequence and the number of ranks.

        Args:
            config: the model.
            seq_len: tokens of a sequence, over all cp ranks.
            kind: how the cp ranks share a sequence.
            world_size: number of ranks.

        Raises:
            ValueError: naming the two numbers that disagree.
        """
        self.check_world(world_size)
        self.check_model(config)
        self.check_length(seq_len, kind)

    def check_world(self, world_size: int) -> None:
        """Check only the number of ranks."""
        if self.world != world_size:
            raise ValueError(
                f"dp * cp * tp must be the number of ranks: {self.dp} * {self.cp} * {self.tp} = {self.world}, got "
                f"{world_size} ranks"
            )

    def check_length(self, seq_len: int, kind: Kind) -> None:
        """Check only the length of a sequence."""
        if seq_len < 1:
            raise ValueError(f"seq_len must be >= 1, got {seq_len}")
        _divides("seq_len", seq_len, f"{'2 * ' if kind == 'zigzag' else ''}cp", length_unit(self.cp, kind))
        self.check_local_length(seq_len // self.cp)

    def check_local_length(self, local_len: int) -> None:
        """Check only the tokens of a cp rank: sequence parallelism splits them again."""
        _divides("seq_len / cp", local_len, "tp", self.tp)

    def check_model(self, config: ModelConfig) -> None:
        """Check only the model."""
        for name in ("num_kv_heads", "ffn_size", "vocab_size"):
            _divides(name, getattr(config, name), "tp", self.tp)


def _divides(what: str, value: int, name: str, size: int) -> None:
    if value % size:
        raise ValueError(f"{what} must be a multiple of {name} = {size}, got {value}")


@dataclass(frozen=True)
class ParallelMesh:
    """The device mesh, and this rank's groups and ranks in it."""

    mesh: DeviceMesh  # (dp, cp, tp)
    dims: ParallelDims

    @classmethod
    def make(cls, dims: ParallelDims, device_type: str, timeout: timedelta | None = None) -> ParallelMesh:
        """Make the mesh and its process groups. Collective over all ranks.

        Args:
            dims: number of ranks in each dimension.
            device_type: "cpu" or "cuda".
            timeout: of collectives over the mesh. Default: torch's own, not that of the default group.

        Raises:
            ValueError: if there are not exactly dims.world ranks.
        """
        dims.check_world(dist.get_world_size())
        mesh = init_device_mesh(device_type, (dims.dp, dims.cp, dims.tp), mesh_dim_names=("dp", "cp", "tp"))
        parallel = cls(mesh, dims)
        if timeout is not None:
            for group in parallel.groups:
                _set_pg_timeout(timeout, group)
        return parallel

    @cached_property
    def cp_group(self) -> dist.ProcessGroup:
        return self.mesh["cp"].get_group()

    @cached_property
    def tp_group(self) -> dist.ProcessGroup:
        return self.mesh["tp"].get_group()

    @cached_property
    def shard_mesh(self) -> DeviceMesh:
        """dp x cp: parameters are sharded and gradients summed over it."""
        return self.mesh["dp", "cp"]._flatten("dp_cp")

    @cached_property
    def data_group(self) -> dist.ProcessGroup:
        """dp x cp: token counts and losses are summed over it."""
        return self.shard_mesh.get_group()

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The groups of all collectives of a step, except for the rolls' own exchange."""
        return [self.data_group, self.cp_group, self.tp_group]

    @property
    def dp_rank(self) -> int:
        return self.mesh.get_local_rank("dp")

    @property
    def cp_rank(self) -> int:
        return self.mesh.get_local_rank("cp")


def parallelize(model: GPT, parallel: ParallelMesh, compute_dtype: torch.dtype | None = None) -> GPT:
    """Split and shard a model over the mesh, in place.

    Args:
        model: the whole model, the same on all ranks.
        parallel: the mesh.
        compute_dtype: dtype of parameters in forward and backward (bfloat16 on GPUs). Parameters and their gradients
            keep their own dtype.

    Returns:
        The same model.

    Raises:
        ValueError: if tp does not divide the model.
    """
    parallel.dims.check_model(model.config)
    # Nothing here changes a block's output in place, and the norm of a step may take two messages.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in ("_redistribute", "_collective_utils"):
        logging.getLogger(f"torch.distributed.tensor.{module}").setLevel(logging.ERROR)
    if parallel.dims.tp > 1:
        _split_tensors(model, parallel.mesh["tp"])
    # A block's inputs have the right dtype already, except for masks: their sum must stay what was counted.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32 if compute_dtype else None,
        cast_forward_inputs=False,
    )
    for block in (*model.layers, *model.mtp.depths, model):
        shard = fully_shard(block, mesh=parallel.shard_mesh, mp_policy=policy)
        shard.set_gradient_divide_factor(1.0)  # sum: losses are divided by the tokens of all ranks already
        shard.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    return model


def _split_tensors(model: GPT, mesh: DeviceMesh) -> None:
    """Apply tensor and sequence parallelism: between blocks each rank holds a part of the tokens."""
    model.tp_group = model.mtp.activations.tp_group = mesh.get_group()
    layer: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(use_local_output=True),
        "attention.qkv_proj": ColwiseParallel(input_layouts=Shard(1)),
        "attention.out_proj": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(use_local_output=True),
    }
    if model.config.num_experts:
        layer["ffn"] = SplitExperts()
    else:
        layer |= {
            "ffn": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
            "ffn.gate_proj": ColwiseParallel(),
            "ffn.up_proj": ColwiseParallel(),
            "ffn.down_proj": RowwiseParallel(output_layouts=Shard(1)),
        }
    depth: dict[str, ParallelStyle] = {
        "enorm": SequenceParallel(use_local_output=True),
        "hnorm": SequenceParallel(use_local_output=True),
        "eh_proj": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        **{f"layer.{name}": style for name, style in layer.items()},
    }
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
        **{f"layers.*.{name}": style for name, style in layer.items()},
        **{f"mtp.depths.*.{name}": style for name, style in depth.items()},
    }
    parallelize_module(model, mesh, plan)


class SplitExperts(ParallelStyle):
    """Split the inner width of every expert over the ranks; keep the router whole on each rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, MoE)
        placements = {"gate_proj": Shard(1), "up_proj": Shard(1), "down_proj": Shard(2)}
        for name, parameter in list(module.named_parameters()):
            split = distribute_tensor(parameter.data, device_mesh, [placements.get(name, Replicate())])
            setattr(module, name, nn.Parameter(split))
        module.mesh = device_mesh
        return module


def split_loss(parallel: ParallelMesh | None) -> AbstractContextManager[None]:
    """Return a context for forward and backward, in which the loss takes logits that are split over tp ranks."""
    return loss_parallel() if parallel is not None and parallel.dims.tp > 1 else nullcontext()
