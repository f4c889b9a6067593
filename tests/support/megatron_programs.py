"""What happens to a model of Megatron-LM in the tests of the drop-in. Only ranks import this.

A program returns tensors. `megatron_models.compare` runs it twice, without and with the drop-in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction

from overlap_mtp import SequenceLayout, roll_reference
from overlap_mtp import megatron as drop_in
from overlap_mtp.layout import Kind
from overlap_mtp.megatron import settings
from overlap_mtp.megatron.prefetch import Prefetch

from cases import error_of
from megatron_models import Batch, Trial, attend, differences, plain, recorded, results, same_bits, trial_of
from megatron_ranks import DEPTHS, VOCAB, Case, Model

TENSORS = ("input_ids", "position_ids", "labels", "loss_mask", "padding_mask")


@contextlib.contextmanager
def after(module: torch.nn.Module, event: Callable[[], None]) -> Iterator[None]:
    """Let something happen after each forward of a module."""

    def hook(*_: Any) -> None:
        event()

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def write_in_place(trial: Trial, case: Case, name: str, layer: int) -> list[torch.Tensor]:
    """A decoder layer writes into a tensor of the caller, before Megatron-LM rolls it."""
    batch = Batch.of(case, 1)
    written = getattr(batch, name)
    with (
        after(trial.bare[0].decoder.layers[layer], lambda: written[..., 1::3].fill_(2)),
        torch.no_grad(),  # autograd keeps ids and positions, and would refuse the backward pass
    ):
        return [trial.forward(batch)]


def write_after_the_first_mtp_layer(trial: Trial, case: Case) -> list[torch.Tensor]:
    """The labels change when the ids are rolled once, and the labels not yet."""
    batch = Batch.of(case, 1)
    with after(trial.bare[0].mtp.layers[0], lambda: batch.labels[..., ::2].fill_(2)):
        output = trial.forward(batch)
    trial.loss(batch, output).backward()
    return [output.detach()]


def two_models(trial: Trial, case: Case) -> list[torch.Tensor]:
    """Forwards and backwards of two models in turn. The second has one MTP layer."""
    other = trial.another(mtp_num_layers=1)
    outputs = []
    for at in range(case.microbatches):
        batches = [Batch.of(case, 2 * at), Batch.of(replace(case, documents=3 * at), 2 * at + 1)]
        pair = [
            (model, batch, model.forward(batch)) for model, batch in zip((trial, other), batches, strict=True)
        ]
        for model, batch, output in pair:
            model.loss(batch, output).backward()
            outputs.append(output.detach())
    return [*outputs, *other.gradients().values()]


def a_model_within_a_model(trial: Trial, case: Case) -> list[torch.Tensor]:
    """A decoder layer calls another model, as a teacher is called in distillation."""
    other = trial.another()
    batch, outputs = Batch.of(case, 1), []

    def teach() -> None:
        with torch.no_grad():
            outputs.append(other.forward(Batch.of(case, 2)))
        attend(batch.layout, case)

    with after(trial.bare[0].decoder.layers[0], teach):
        output = trial.forward(batch)
    trial.loss(batch, output).backward()
    return [output.detach(), *outputs]


def a_forward_that_raises(trial: Trial, case: Case, where: str) -> list[torch.Tensor]:
    """Some forwards end with an error in the middle, on all ranks. Those after them are like all others."""

    def fail() -> None:
        raise ArithmeticError

    model = trial.bare[0]
    module = {"decoder": model.decoder.layers[0], "mtp": model.mtp.layers[0]}[where]
    outputs = []
    for at in range(case.microbatches):
        with after(module, fail), contextlib.suppress(ArithmeticError):
            trial.forward(Batch.of(case, 50 + at))
        outputs += plain(trial, replace(case, microbatches=1))
    return outputs


def changing_batches(trial: Trial, case: Case) -> list[torch.Tensor]:
    """Batches of other numbers of rows, tokens and documents come in turn, and again."""
    kinds = [
        replace(case, **one)
        for one in (
            {},
            {"rows": 2},
            {"documents": 3},
            {"tokens": 2 * case.tokens, "documents": 9},
            {"tokens": 2 * case.tokens},
            {"documents": 8},
        )
    ]
    outputs = []
    for kind in (*kinds, *kinds[::-1]):
        outputs += plain(trial, replace(kind, microbatches=1))
    return outputs


def in_inference_mode(trial: Trial, case: Case) -> list[torch.Tensor]:
    """Evaluation under torch.inference_mode, and a training step after it."""
    with torch.inference_mode():
        outputs = [trial.forward(Batch.of(case, 1)).clone()]
    with torch.no_grad():
        outputs.append(trial.forward(Batch.of(case, 2)))
    batch = Batch.of(case, 3)
    with torch.inference_mode():
        outputs.append(trial.forward(batch).clone())
    trial.bare[0].train()
    return [*outputs, *plain(trial, case)]


def of_a_group_of_its_own(trial: Trial, case: Case) -> list[torch.Tensor]:
    """A batch that names a context-parallel group of its own, as in dynamic context parallelism."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    batch = Batch.of(case, 1)
    packed = batch.packed_seq_params(cp_group=pairs[dist.get_rank() // 2])
    output = trial.forward(batch, packed_seq_params=packed)
    trial.loss(batch, output).backward()
    return [output.detach()]


def of_one_rank_alone(trial: Trial, case: Case) -> list[torch.Tensor]:
    """A batch that this rank holds alone, as in dynamic context parallelism: it names a size and no group."""
    batch = Batch.of(case, 1)
    output = trial.forward(batch, packed_seq_params=batch.packed_seq_params(local_cp_size=1))
    trial.loss(batch, output).backward()
    return [output.detach()]


def failures_of_another_kind() -> list[str]:
    """What is wrong if a GPU finds a failure in a kind of batch, and batches of another kind follow."""
    trial, said = trial_of(Model(cp=2)), []
    drop_in.close()  # so that there is one roller
    with drop_in.install():
        for number, documents in enumerate((3, 0)):
            batch = Batch.of(Case(Model(cp=2), documents=documents), 0)
            said.append(error_of(trial.forward, batch))
            if number == 0:
                (roller,) = settings._rollers[trial.cp_group].values()
                (transport,) = roller._transports.values()
                transport.error_flags[3] = 1  # as a kernel does that finds illegal bounds
        with contextlib.suppress(RuntimeError):  # again, as each forward from here on
            drop_in.close()
    return [] if said[0] == "nothing" and "bounds of a DeviceLayout are illegal" in said[1] else said


def for_inference(trial: Trial, case: Case) -> list[torch.Tensor]:
    """A forward that gets an inference context, in evaluation."""
    from megatron.core.inference.contexts import StaticInferenceContext

    context = StaticInferenceContext(case.rows, 4 * case.tokens)
    # Only the last token's logits are made otherwise, and Megatron-LM's MTP needs all.
    context.materialize_only_last_token_logits = False
    with torch.no_grad():
        return [
            trial.forward(Batch.of(case, 1), inference_context=context, runtime_gather_output=True).clone()
        ]


# Bodies that are no comparison


def callers_tensors_change(case: Case) -> list[str]:
    """What a forward and backward change in the caller's tensors."""
    trial, wrong = trial_of(case.model), []
    with drop_in.install():
        batch = Batch.of(case, 1)
        packed = batch.packed_seq_params()
        given = {name: getattr(batch, name) for name in TENSORS}
        if packed is not None:
            given["cu_seqlens"] = packed.cu_seqlens_q
        copies = {name: (one.clone(), one._version) for name, one in given.items()}
        output = trial.forward(batch, packed_seq_params=packed)
        trial.loss(batch, output).backward()
        for name, tensor in given.items():
            copy, version = copies[name]
            if not same_bits(tensor, copy) or tensor._version != version:
                wrong.append(f"{name} was written to")
            if vars(tensor):
                wrong.append(f"{name} has attributes {sorted(vars(tensor))}")
            if type(tensor.clone) is not type(torch.empty(0).clone):
                wrong.append(f"{name}.clone is another")
        if packed is not None and set(vars(packed)) != set(vars(batch.packed_seq_params())):
            wrong.append("packed_seq_params has other attributes")
    return wrong


def uninstall_between_microbatches(case: Case) -> tuple[list[str], list[int]]:
    """(what differs from Megatron-LM's own, rolls that were answered after each of four microbatches)."""
    trial, counts = trial_of(case.model), []

    def program(trial: Trial, case: Case) -> list[torch.Tensor]:
        outputs = []
        for at in range(case.microbatches):
            drop_in.uninstall() if at % 2 else drop_in.install()
            outputs += plain(trial, replace(case, microbatches=1))
            counts.append(drop_in.status().answered)
        return outputs

    def alone(trial: Trial, case: Case) -> list[torch.Tensor]:
        outputs = []
        for _ in range(case.microbatches):
            outputs += plain(trial, replace(case, microbatches=1))
        return outputs

    drop_in.uninstall()
    expected = results(trial, case, alone, is_recorded=False)
    found = results(trial, case, program, is_recorded=False)
    drop_in.uninstall()
    return differences(found, expected), counts


def uninstall_within_a_forward(case: Case) -> list[str]:
    """What differs if the drop-in is uninstalled between a forward's entry and its rolls."""
    trial = trial_of(case.model)
    drop_in.uninstall()
    expected = results(trial, case, plain, is_recorded=False)
    drop_in.install()
    with after(trial.bare[0].decoder.layers[0], drop_in.uninstall):
        found = results(trial, case, plain, is_recorded=False)
    drop_in.uninstall()
    return differences(found, expected)


def rolls_of_written_tensors(schedule: str) -> list[str]:
    """What differs from Megatron-LM's own rolls if something is written to after a copy of it was marked."""
    group, wrong = dist.group.WORLD, []
    assert group is not None
    labels = 100 * dist.get_rank() + torch.arange(8)[None]
    with drop_in.install(schedule=schedule):

        def roll(tensor: torch.Tensor) -> torch.Tensor:
            return multi_token_prediction.roll_tensor(tensor, cp_group=group)[0]

        once = roll(labels.clone())
        twice = roll(once.clone())

        def marked() -> torch.Tensor:
            settings = drop_in.Settings(schedule=schedule)
            prefetch = Prefetch({"labels": given}, {"labels": 2}, group, None, settings)
            prefetch.start()
            return prefetch.mark(given, "labels", 0)

        given = labels.clone()
        copy = marked().clone()
        given.fill_(7)
        if not same_bits(roll(copy), once):
            wrong.append("a clone of a tensor that was written to")
        given = labels.clone()
        tensor = marked()
        rolled = roll(tensor)
        copy = rolled.clone()
        rolled.fill_(7)
        if not same_bits(roll(tensor), once):
            wrong.append("a tensor whose roll was written to")
        if not same_bits(roll(copy), twice):
            wrong.append("a clone of a roll that was written to")
    return wrong


# Padding


def rolls_of_documents(
    case: Case,
    cu_seqlens: list[int],
    valid_lengths: list[int] | None,
    settings: dict[str, Any] | None,
    kind: Kind = "zigzag",
) -> dict[str, Any]:
    """Roll documents in a forward of a model, with the drop-in or (settings None) by Megatron-LM itself.

    Args:
        case: its `tokens` may be more than the documents have: a tail.
        cu_seqlens: bounds of the padded documents.
        valid_lengths: tokens of each that are not padding; None gives Megatron-LM no bounds of the padded documents.
        settings: of `install`.
        kind: how the tokens lie on the ranks.

    Returns:
        `wrong`: rolls by name and depth that differ from the reference; `rolled`: all of them; `fallbacks`.
    """
    drop_in.uninstall()
    trial = trial_of(case.model)
    trial.bare[0].train()
    cp, rank = case.model.cp, trial.cp_group.rank()
    layout = SequenceLayout.packed(cu_seqlens, cp, kind, valid_lengths, case.tokens * cp)
    draw = torch.Generator().manual_seed(1)
    shape = (case.rows, layout.seq_len)
    full = {name: torch.randint(1, VOCAB, shape, generator=draw) for name in TENSORS[:3]}
    full["loss_mask"] = torch.rand(shape, generator=draw)
    ends = torch.tensor(cu_seqlens, dtype=torch.int32)
    padded = None
    if valid_lengths is not None:
        padded, ends = ends, torch.tensor([0, *valid_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, padded, padded)
    local = {name: layout.shard(one, rank).contiguous() for name, one in full.items()}
    attend(layout, case)
    rolled: list[torch.Tensor] = []
    with contextlib.ExitStack() as stack:
        if settings is not None:
            stack.enter_context(drop_in.install(**settings))
        stack.enter_context(recorded(rolled))
        with torch.no_grad():
            trial.bare[0](
                local["input_ids"],
                local["position_ids"],
                None,
                labels=local["labels"],
                loss_mask=local["loss_mask"],
                packed_seq_params=packed,
            )
        status = drop_in.status()
        counts = (status.answered, dict(status.fallbacks))
    pairs = (("input_ids", "position_ids"), ("labels", "loss_mask"))
    order = [(name, depth) for pair in pairs for depth in range(1, DEPTHS + 1) for name in pair]
    assert len(rolled) == len(order), len(rolled)
    wrong = []
    for (name, depth), answer in zip(order, rolled, strict=True):
        expected = layout.shard(roll_reference(full[name], layout, depth, 0), rank)
        if not same_bits(answer, expected):
            wrong.append(f"{name} at depth {depth}: {int((answer != expected).sum())} of {answer.numel()}")
    return {"wrong": wrong, "rolled": rolled, "answered": counts[0], "fallbacks": counts[1]}
