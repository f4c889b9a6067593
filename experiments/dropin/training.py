"""Does a training go the same way, bit for bit, with the drop-in as without it?"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from dropin.bits import deterministic
from dropin.model import MegatronModel
from dropin.modes import REFERENCE, has_host_bounds
from dropin.sizes import Problem
from dropin.subject import Subject
from harness.progress import with_progress
from harness.rounds import gather

FIRST_SEED = 500_000  # of the first step's batch: none of a timed round


def train_both(subject: Subject, documents: int, steps: int, optimizer: str) -> dict[str, Any] | None:
    """Train twice from the same weights, with Megatron-LM's rolls and with the drop-in. Collective.

    Each step has one batch of random tokens. Gradients are averaged over the cp group. The model ends with the
    weights that it had.

    Args:
        optimizer: "sgd" or "adam".

    Returns:
        On rank 0: `losses` by mode, a list of [loss, MTP loss of depth 1, ...] of rank 0 for each step; `equal_steps`,
        at how many steps all ranks' losses have the same bits; and whether all final `weights_equal`. None elsewhere.
    """
    model = subject.model
    initial = {name: tensor.cpu().clone() for name, tensor in _weights(model).items()}
    losses, weights = {}, {}
    for mode in (REFERENCE, "dropin"):
        subject.switch.to(mode)
        _restore(model, initial)
        with deterministic():
            losses[mode] = _train(subject, mode, documents, steps, optimizer)
        weights[mode] = {name: tensor.cpu().clone() for name, tensor in _weights(model).items()}
    _restore(model, initial)
    own, dropin = (weights[mode] for mode in (REFERENCE, "dropin"))
    equal = [torch.equal(a, b) for a, b in zip(losses[REFERENCE], losses["dropin"], strict=True)]
    everyone = gather((equal, all(torch.equal(own[name], dropin[name]) for name in own)))
    if everyone is None:
        return None
    return {
        "documents": documents,
        "steps": steps,
        "optimizer": optimizer,
        "equal_steps": sum(all(ranks) for ranks in zip(*(steps for steps, _ in everyone), strict=True)),
        "weights_equal": all(same for _, same in everyone),
        "losses": {mode: [one.tolist() for one in all_steps] for mode, all_steps in losses.items()},
    }


def _weights(model: MegatronModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.gpt.named_parameters()}


def _restore(model: MegatronModel, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in _weights(model).items():
        parameter.copy_(weights[name])


def _train(subject: Subject, mode: str, documents: int, steps: int, optimizer: str) -> list[torch.Tensor]:
    """Return the losses of each step, float32 [1 + depths]."""
    model = subject.model
    parameters = list(model.gpt.parameters())
    update = (
        torch.optim.SGD(parameters, lr=0.05)
        if optimizer == "sgd"
        else torch.optim.AdamW(parameters, lr=1e-4, fused=subject.device.type == "cuda")
    )
    losses = []
    for index in with_progress(range(steps), f"steps of {mode}", subject.console):
        batch = subject.batch(documents, FIRST_SEED + index)
        model.load(batch)
        loss = model.loss(batch, batch.packed_seq_params(has_host_bounds(mode)))
        loss.backward()  # type: ignore[no-untyped-call]
        _average_gradients(model, subject.problem)
        update.step()
        losses.append(torch.cat([loss.detach().float()[None], model.mtp_losses().float()]))
    model.gpt.zero_grad(set_to_none=True)
    return [one.cpu() for one in losses]


def _average_gradients(model: MegatronModel, problem: Problem) -> None:
    """Average over the cp group. Under sequence parallelism, add up what tp ranks found for their tokens."""
    for parameter in model.gpt.parameters():
        if parameter.grad is None:
            continue
        if problem.sequence_parallel and getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        dist.all_reduce(parameter.grad, group=model.cp_group)
        parameter.grad /= problem.cp
