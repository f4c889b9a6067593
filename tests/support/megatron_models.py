"""Small models of Megatron-LM on CPU ranks, and their results with and without the drop-in.

Megatron-LM is imported here: only ranks import this, by `megatron_ranks.on_megatron`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import gpt_model
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import multi_token_prediction as mtp
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from dropin.model import GatheredAttention
from overlap_mtp import SequenceLayout
from overlap_mtp import megatron as drop_in
from overlap_mtp.model.attention import attention_plan

from megatron_ranks import DEPTHS, TOKENS, VOCAB, Case, Model, Outcome

HEAD_DIM = 4


@dataclass
class Batch:
    """What a rank holds of a batch. The tensors are [rows, tokens of a rank]."""

    case: Case
    layout: SequenceLayout
    cu_seqlens: list[int] | None
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    padding_mask: torch.Tensor

    @classmethod
    def of(cls, case: Case, seed: int) -> Batch:
        cp, rank = case.model.cp, parallel_state.get_context_parallel_rank()
        total, unit = case.tokens * cp, 2 * cp
        draw = np.random.default_rng(seed)
        bounds = None
        if case.documents:
            cuts = draw.choice(np.arange(1, total // unit), case.documents - 1, replace=False)
            bounds = [0, *(unit * np.sort(cuts)).tolist(), total]
        kind = "zigzag" if cp > 1 else "contiguous"
        layout = SequenceLayout.packed(bounds, cp, kind) if bounds else SequenceLayout.dense(total, cp, kind)
        stream = torch.from_numpy(draw.integers(1, VOCAB, (case.rows, total + 1)))
        mask = torch.from_numpy(draw.random((case.rows, total)) > 0.2).to(case.mask_dtype)
        pad = torch.from_numpy(draw.random((case.rows, total)) > 0.9)

        def held(full: torch.Tensor) -> torch.Tensor:
            mine = layout.shard(full, rank).contiguous()
            return torch.stack([mine, mine], -1)[..., 0] if case.is_views else mine

        positions = torch.from_numpy(layout.offsets(rank))[None].expand(case.rows, -1)
        if not case.is_views:
            positions = positions.contiguous()
        ids, labels = held(stream[:, :-1]), held(stream[:, 1:])
        return cls(case, layout, bounds, ids, positions, labels, held(mask), held(pad))

    def packed_seq_params(self, **options: Any) -> PackedSeqParams | None:
        if self.cu_seqlens is None:
            return None
        bounds = torch.tensor(self.cu_seqlens, dtype=torch.int32)
        longest = self.case.tokens * self.case.model.cp
        return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest, **options)


def attend(layout: SequenceLayout, case: Case) -> None:
    """Tell all attention layers of the next batch. They do not rotate: the model has learned positions."""
    rank, cpu = parallel_state.get_context_parallel_rank(), torch.device("cpu")
    dtype = torch.bfloat16 if case.model.wrapper == "float16" else torch.float32
    GatheredAttention.plan = attention_plan(layout, rank, case.rows, cpu, dtype)
    cos = torch.ones(1, layout.local_len, 1, HEAD_DIM, dtype=dtype)
    GatheredAttention.rope = cos, torch.zeros_like(cos)


class Trial:
    """Models on this rank: one, or one for each virtual pipeline stage."""

    def __init__(self, model: Model) -> None:
        self.model = model
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(model.tp, model.pp, model.vp, context_parallel_size=model.cp)
        seed_all()
        self.config = _config(model)
        self.cp_group = parallel_state.get_context_parallel_group()
        self.bare = [self._build(stage) for stage in range(model.vp or 1)]
        with torch.no_grad():
            for one in self.bare:
                for parameter in one.parameters():
                    root = min(dist.get_process_group_ranks(self.cp_group))
                    dist.broadcast(parameter.data, root, self.cp_group)
        self.chunks = [self._wrap(one) for one in self.bare]

    def another(self, **options: Any) -> Trial:
        """A further model on the same ranks, with other options of TransformerConfig."""
        other = object.__new__(Trial)
        changed = replace(self.model, options=(*self.model.options, *options.items()))
        other.model, other.config, other.cp_group = changed, _config(changed), self.cp_group
        torch.manual_seed(17 + parallel_state.get_tensor_model_parallel_rank())
        other.bare = other.chunks = [other._build(0)]
        return other

    def _build(self, stage: int) -> Any:
        model, config = self.model, self.config
        place: dict[str, Any] = {} if model.vp is None else {"vp_stage": stage}
        virtual = {} if model.vp is None else {"ignore_virtual": False, "vp_stage": stage}
        ends = {
            "pre_process": parallel_state.is_pipeline_first_stage(**virtual),
            "post_process": parallel_state.is_pipeline_last_stage(**virtual),
            "position_embedding_type": "learned_absolute",
            "max_sequence_length": 4 * TOKENS * model.cp,
            "vocab_size": VOCAB,
        }
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = GatheredAttention
        if model.hybrid:
            from megatron_hybrid import hybrid_model

            return hybrid_model(config, spec, ends)
        block = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, **place)
        return GPTModel(
            config=config, transformer_layer_spec=spec, mtp_block_spec=block, **ends, **place
        ).train()

    def _wrap(self, bare: Any) -> Any:
        if self.model.wrapper == "float16":
            return Float16Module(self.config, bare)
        if self.model.wrapper == "ddp":
            options = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=1000)
            wrapped = DistributedDataParallel(self.config, options, bare)
            self.config.no_sync_func = wrapped.no_sync
            return wrapped
        return bare

    def forward(self, batch: Batch, chunk: Any = None, **options: Any) -> torch.Tensor:
        """Call a model as training scripts do: a pipeline stage gets what it needs, and nothing else."""
        case, chunk = batch.case, self.chunks[0] if chunk is None else chunk
        bare = self.bare[self.chunks.index(chunk)]
        attend(batch.layout, case)
        ids: Any = batch.input_ids if bare.pre_process or bare.mtp_process or not case.has_labels else None
        positions = None if ids is None else batch.position_ids
        labels = batch.labels if bare.post_process and case.has_labels else None
        packed = options.pop("packed_seq_params", None) or batch.packed_seq_params()
        if case.has_padding_mask:
            options["padding_mask"] = batch.padding_mask
        if case.has_loss_mask and bare.post_process:
            options["loss_mask"] = batch.loss_mask
        if case.positional:
            return chunk(ids, positions, None, None, labels, None, packed, **options)
        return chunk(ids, positions, None, labels=labels, packed_seq_params=packed, **options)

    def loss(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        if not batch.case.has_labels:
            return output.float().square().mean()
        return (output.float() * batch.loss_mask).sum() / batch.loss_mask.sum()

    def gradients(self) -> dict[str, torch.Tensor]:
        for chunk in self.chunks:
            if isinstance(chunk, DistributedDataParallel):
                chunk.finish_grad_sync()
        named = [
            (f"{at}.{name}", one)
            for at, chunk in enumerate(self.chunks)
            for name, one in chunk.named_parameters()
        ]
        found = {name: getattr(one, "main_grad", None) for name, one in named}
        found |= {name: one.grad for name, one in named if found[name] is None}
        return {name: one.clone() for name, one in found.items() if one is not None}


def seed_all() -> None:
    seed = tensor_parallel.model_parallel_cuda_manual_seed
    has_option = "force_reset_rng" in inspect.signature(seed).parameters
    seed(3, **({"force_reset_rng": True} if has_option else {}))
    if hasattr(mtp, "_initialize_hidden_state_mixing_rng_tracker"):
        mtp._initialize_hidden_state_mixing_rng_tracker(parallel_state.get_data_parallel_group())
    torch.manual_seed(5)


def _config(model: Model) -> TransformerConfig:
    options = {
        "num_layers": model.num_layers,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": HEAD_DIM,
        "ffn_hidden_size": 24,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": model.wrapper == "float16",
        "params_dtype": torch.bfloat16 if model.wrapper == "float16" else torch.float32,
        "pipeline_dtype": torch.float32,
        "context_parallel_size": model.cp,
        "tensor_model_parallel_size": model.tp,
        "pipeline_model_parallel_size": model.pp,
        "virtual_pipeline_model_parallel_size": model.vp,
        "sequence_parallel": model.sequence_parallel,
        "mtp_num_layers": DEPTHS,
        "use_cpu_initialization": True,
        "batch_p2p_comm": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
    }
    return TransformerConfig(**{**options, **dict(model.options)})


@functools.lru_cache(maxsize=1)
def trial_of(model: Model) -> Trial:
    """The models of this kind. The last ones are kept: Megatron-LM's process groups are global."""
    return Trial(model)


Program = Callable[[Trial, Case], list[torch.Tensor]]


def train(trial: Trial, case: Case) -> list[torch.Tensor]:
    """Microbatches by Megatron-LM's own schedule: forward and backward, 1F1B or interleaved."""
    outputs = []

    def step(batches: Iterator[Batch], chunk: Any, *_: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        output = trial.forward(batch, chunk)
        outputs.append(output.detach().clone())

        def loss_of(of_batch: torch.Tensor) -> tuple[Any, ...]:
            loss = trial.loss(batch, of_batch)
            report = {"loss": loss.detach()}
            if trial.config.calculate_per_token_loss:
                return (of_batch * batch.loss_mask).sum(), batch.loss_mask.sum().int(), report
            return loss, report

        return output, loss_of

    # Ranks that share no sequence have batches of their own.
    first = 100 * (1 + parallel_state.get_data_parallel_rank())
    batches = [Batch.of(case, first + i) for i in range(case.microbatches)]
    iterators = [iter(batches) for _ in trial.chunks]
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if case.model.vp else iterators[0],
        model=trial.chunks if case.model.vp else trial.chunks[0],
        num_microbatches=case.microbatches,
        seq_length=case.tokens * case.model.cp,
        micro_batch_size=case.rows,
        forward_only=case.is_eval,
    )
    return outputs


def plain(trial: Trial, case: Case) -> list[torch.Tensor]:
    """Microbatches one by one: forward and, in training, backward."""
    outputs = []
    for at in range(case.microbatches):
        batch = Batch.of(case, 10 + at)
        output = trial.forward(batch)
        if output.requires_grad:
            trial.loss(batch, output).backward()
        outputs.append(output.detach().clone())
    return outputs


def recorded(rolled: list[torch.Tensor]) -> contextlib.ExitStack:
    """Note what `roll_tensor` answers in Megatron-LM's models."""
    stack = contextlib.ExitStack()
    original = mtp.roll_tensor

    def roll_tensor(*args: Any, **options: Any) -> Any:
        answer = original(*args, **options)
        rolled.append(torch.Tensor.clone(answer[0]))
        return answer

    for module in (mtp, gpt_model):
        if hasattr(module, "roll_tensor"):  # main's gpt_model has none
            stack.enter_context(mock.patch.object(module, "roll_tensor", roll_tensor))
    return stack


def results(trial: Trial, case: Case, program: Program, is_recorded: bool = True) -> dict[str, torch.Tensor]:
    """Everything that a program computes, by name; the rolled tensors, too, if `is_recorded`.

    In evaluation, Megatron-LM computes the MTP losses and drops them: only the rolled tensors show a difference.
    """
    mtp.MTPLossLoggingHelper.tracker.clear()
    for chunk in trial.chunks:
        chunk.zero_grad(set_to_none=True)
        if isinstance(chunk, DistributedDataParallel):
            chunk.zero_grad_buffer()
        chunk.train(not case.is_eval)
    seed_all()
    rolled: list[torch.Tensor] = []
    with recorded(rolled) if is_recorded else contextlib.nullcontext():
        found = {f"output {at}": one for at, one in enumerate(program(trial, case))}
    found |= {f"roll {at}": one for at, one in enumerate(rolled)}
    tracked = mtp.MTPLossLoggingHelper.tracker.items()
    found |= {f"logged {name}": one.clone() for name, one in tracked if isinstance(one, torch.Tensor)}
    return found | {f"gradient {name}": one for name, one in trial.gradients().items()}


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or not same_bits(found[name], expected[name])
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor[None].view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def compare(case: Case, name: str = "", *arguments: Any) -> Outcome:
    """Run a program by Megatron-LM itself and with the drop-in, and compare all results bit for bit.

    The program is `train`, or the function of this name in `megatron_programs`.
    """
    program: Program = train
    if name:
        function = getattr(importlib.import_module("megatron_programs"), name)
        program = lambda trial, case: function(trial, case, *arguments)  # noqa: E731
    trial = trial_of(case.model)
    drop_in.uninstall()
    expected = results(trial, case, program)
    with drop_in.install(**case.settings), mock.patch.object(torch, "roll", wraps=torch.roll) as rolls:
        found = results(trial, case, program)
        status = drop_in.status()
        counts = (status.forwards, status.exchanges, status.answered, status.fallbacks.copy())
    gradients = sum(name.startswith("gradient") for name in expected)
    return Outcome(differences(found, expected), gradients, *counts, rolls.call_count)
