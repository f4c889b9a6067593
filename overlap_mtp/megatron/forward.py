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
from overlap_mtp.megatron.rolls import running
from overlap_mtp.megatron.settings import Settings, raise_if_failed, status

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
        if _is_inference(self, functools.partial(entry.get, args, kwargs)):
            with running(lambda: "inference"):
                return entry.function(self, *args, **kwargs)
        begun = BegunForward(self, entry, args, kwargs, settings)
        with running(begun.send), _sent_under_decoder(begun.send, self, entry):
            return entry.function(self, *begun.args, **begun.kwargs)

    return forward


class BegunForward:
    """A forward that has begun: its arguments, and what it will roll of them.

    Its tensors go into the model as aliases. All else is left to `send`: at the entry the device may be idle, and would
    wait for the host.
    """

    def __init__(
        self, model: Any, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings
    ) -> None:
        self._model, self._entry, self._settings = model, entry, settings
        self._get = functools.partial(entry.get, args, kwargs)
        self._tensors = {name: one for name in ROLLED if (one := self._get(name)) is not None}
        if "loss_mask" not in self._tensors and self._get("output_processor") is None:
            like = self._labels()[0]
            if like is not None:
                self._tensors["loss_mask"] = torch.ones_like(like)  # as Megatron-LM makes it later
        # The marks will hang on them. A mark on the caller's tensor would outlive the forward.
        self._aliases = {name: one.detach() for name, one in self._tensors.items() if can_roll(one)}
        self.args, self.kwargs = entry.replaced(args, kwargs, self._aliases)
        self._reason: str | None = None  # None: not sent so far

    def send(self) -> str:
        """Mark what will be rolled and send it, at the first call. Return why there is no exchange, or ""."""
        if self._reason is None:
            self._reason = "an exchange that could not be sent"
            try:
                self._reason = self._send()
            except LeftToMegatronError as error:
                self._reason = str(error)
            self._tensors, self._aliases = {}, {}
        return self._reason

    def _send(self) -> str:
        if self._get("compute_mtp_loss") is False:
            return ""
        cp_group, packed = _cp_group(self._model), self._get("packed_seq_params")
        own_group, own_size = (getattr(packed, name, None) for name in ("cp_group", "local_cp_size"))
        size = None if own_group else own_size  # a batch that one rank holds alone has a size and no group
        if own_group not in (None, cp_group) or size not in (None, cp_group.size()):
            raise LeftToMegatronError(
                "a context-parallel group of the batch's own (dynamic context parallelism)"
            )
        status().forwards += 1
        depths = self._depths()
        if not depths:
            return ""
        tensors = {name: self._tensors[name] for name in depths}
        prefetch = Prefetch(tensors, depths, cp_group, packed, self._settings)
        prefetch.mark_aliases(self._aliases)
        prefetch.start()
        raise_if_failed(cp_group)  # now: this rank's message has left, so that its peers do not wait
        return prefetch.reason

    def _depths(self) -> dict[str, int]:
        """How far this pipeline stage rolls its tensors, by name, without those that an exchange cannot carry."""
        model, num_layers = self._model, self._model.config.mtp_num_layers
        depths: dict[str, int] = {}
        if _has_mtp(model):
            depths |= dict.fromkeys(("input_ids", "position_ids"), num_layers)
            # Under sequence parallelism it is cut over tensor-parallel ranks before it is rolled.
            if (
                rolls_padding_mask()
                and self._entry.model == "GPTModel"
                and not model.config.sequence_parallel
            ):
                depths["padding_mask"] = num_layers
        like, is_derived = self._labels()
        if like is not None:
            depths |= dict.fromkeys(("labels", "loss_mask"), num_layers)
        if is_derived:
            depths |= dict.fromkeys(("input_ids", "loss_mask"), num_layers + 1)
        return {name: depth for name, depth in depths.items() if name in self._aliases}

    def _labels(self) -> tuple[torch.Tensor | None, bool]:
        """(the labels of this stage, or the ids that they are derived from, or None; whether they are derived)."""
        model = self._model
        if not (
            getattr(model, "post_process", False) and (_has_mtp(model) or self._entry.model == "GPTModel")
        ):
            return None, False
        labels, ids = self._get("labels"), self._get("input_ids")
        # Without labels (reinforcement learning) megatron-core main takes the ids that follow.
        if labels is None and ids is not None and derives_labels():
            return ids, True
        return labels, False


def _has_mtp(model: Any) -> bool:
    return bool(getattr(model, "mtp_process", False))


@contextlib.contextmanager
def _sent_under_decoder(send: Callable[[], str], model: Any, entry: Entry) -> Iterator[None]:
    """Send the exchange in the middle of the decoder: by then the host should be ahead of the device.

    Or at the entry, if no layer will call a hook.
    """
    layers = getattr(getattr(model, "decoder", None), "layers", None)
    # A graph of a layer calls no hooks when it is replayed, and must not hold the exchange.
    has_graphs = getattr(model.config, "cuda_graph_impl", "none") != "none"
    if entry.name != "forward" or not layers or has_graphs:
        send()
        yield
        return

    def hook(*_: Any) -> None:  # what a hook returns would replace the layer's input
        send()

    handle = layers[len(layers) // 2].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


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
