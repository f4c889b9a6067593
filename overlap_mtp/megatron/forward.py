"""The entry of a model's forward: what it will roll, and one exchange for it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from overlap_mtp.megatron.layouts import LeftToMegatronError
from overlap_mtp.megatron.prefetch import Prefetch, can_roll
from overlap_mtp.megatron.rolls import no_exchange
from overlap_mtp.megatron.settings import Settings, status

Tensors = dict[str, torch.Tensor]
ROLLED = ("input_ids", "position_ids", "labels", "loss_mask", "padding_mask")


@dataclass(frozen=True)
class Entry:
    """A function where a forward begins: `GPTModel.forward` and its like."""

    function: Callable[..., Any]
    name: str  # of the function
    model: str  # name of its class
    position: dict[str, int]  # of the parameters that can be given by position, without self

    @classmethod
    def of(cls, function: Callable[..., Any], name: str, model: str) -> Entry:
        parameters = list(inspect.signature(function).parameters.values())[1:]
        by_position = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY]
        return cls(function, name, model, {name: at for at, name in enumerate(by_position)})

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        """The argument of this name, or None."""
        at = self.position.get(name, len(args))
        return args[at] if at < len(args) else kwargs.get(name)

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Tensors
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors in place of what was given."""
        by_position, by_name = list(args), dict(kwargs)
        for name, tensor in tensors.items():
            at = self.position.get(name, len(args))
            if at < len(args):
                by_position[at] = tensor
            else:
                by_name[name] = tensor
        return tuple(by_position), by_name


def patched_forward(entry: Entry) -> Callable[..., Any]:
    """Wrap a function where a forward begins: it prefetches the rolls of its tensors."""

    @functools.wraps(entry.function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = status().settings
        if settings is None or not getattr(self.config, "mtp_num_layers", None):
            return entry.function(self, *args, **kwargs)
        prefetch, reason = None, ""
        try:
            prefetch = _prefetch(self, entry, functools.partial(entry.get, args, kwargs), settings)
        except LeftToMegatronError as error:
            reason = str(error)
        if prefetch is None:
            with no_exchange(lambda: reason):
                return entry.function(self, *args, **kwargs)
        args, kwargs = entry.replaced(args, kwargs, prefetch.aliases())
        with no_exchange(lambda: prefetch.reason), _sent_under_decoder(prefetch, self, entry):
            return entry.function(self, *args, **kwargs)

    return forward


@contextlib.contextmanager
def _sent_under_decoder(prefetch: Prefetch, model: Any, entry: Entry) -> Iterator[None]:
    """Send the exchange once the host has launched the first layer of the decoder.

    At the entry the device may be idle, and would wait for the host to send.
    """
    layers = getattr(getattr(model, "decoder", None), "layers", None)
    # A graph of a layer calls no hooks when it is replayed, and must not hold the exchange.
    has_graphs = getattr(model.config, "cuda_graph_impl", "none") != "none"
    if entry.name != "forward" or not layers or has_graphs:
        prefetch.start()
        yield
        return
    hook = layers[0].register_forward_hook(lambda *_: prefetch.start())
    try:
        yield
    finally:
        hook.remove()


def _prefetch(model: Any, entry: Entry, get: Callable[[str], Any], settings: Settings) -> Prefetch | None:
    """Prepare the exchange of a forward; None if it rolls nothing that one can carry."""
    if _is_inference(model, get):
        raise LeftToMegatronError("inference")
    if get("compute_mtp_loss") is False:
        return None
    cp_group = _cp_group(model)
    packed = get("packed_seq_params")
    if packed is not None and getattr(packed, "cp_group", None) not in (None, cp_group):
        raise LeftToMegatronError("a context-parallel group of the batch's own (dynamic context parallelism)")
    status().forwards += 1
    tensors, depths = _rolled_here(model, entry, get)
    known = {name: tensor for name, tensor in tensors.items() if can_roll(tensor)}
    if not known:
        return None
    return Prefetch(known, {name: depths[name] for name in known}, cp_group, packed, settings)


def _rolled_here(
    model: Any, entry: Entry, get: Callable[[str], Any]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The tensors that this pipeline stage rolls, by name, and how far."""
    num_layers = model.config.mtp_num_layers
    tensors: dict[str, Any] = {}
    depths = dict.fromkeys(ROLLED, num_layers)
    has_mtp = getattr(model, "mtp_process", False)
    if has_mtp:
        tensors = {name: get(name) for name in ("input_ids", "position_ids")}
        # Under sequence parallelism it is cut over tensor-parallel ranks before it is rolled.
        if rolls_padding_mask() and entry.model == "GPTModel" and not model.config.sequence_parallel:
            tensors["padding_mask"] = get("padding_mask")
    if getattr(model, "post_process", False) and (has_mtp or entry.model == "GPTModel"):
        labels, loss_mask, ids = get("labels"), get("loss_mask"), get("input_ids")
        # Without labels (reinforcement learning) megatron-core main takes the ids that follow.
        derived = labels is None and ids is not None and derives_labels()
        if derived:
            tensors["input_ids"] = ids
            depths["input_ids"] = depths["loss_mask"] = num_layers + 1
        like = ids if derived else labels
        if like is not None and loss_mask is None and get("output_processor") is None:
            loss_mask = torch.ones_like(like)  # as Megatron-LM makes it later
        if like is not None:
            tensors |= {"labels": labels, "loss_mask": loss_mask}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, depths


@functools.cache
def derives_labels() -> bool:
    from megatron.core.transformer import multi_token_prediction

    return hasattr(multi_token_prediction, "process_mtp_loss")


@functools.cache
def rolls_padding_mask() -> bool:
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    return "padding_mask" in inspect.signature(MultiTokenPredictionLayer._get_embeddings).parameters


def _is_inference(model: Any, get: Callable[[str], Any]) -> bool:
    if not model.training and (get("inference_context") is not None or get("inference_params") is not None):
        return True
    inference = _inference_mode()
    return inference is not None and bool(inference.is_active())


@functools.cache
def _inference_mode() -> Any | None:
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:
        return None
    return InferenceMode


def _cp_group(model: Any) -> dist.ProcessGroup:
    cp_group = getattr(model, "cp_group", None)
    if not isinstance(cp_group, dist.ProcessGroup):
        raise LeftToMegatronError("a model without a context-parallel group")
    return cp_group
