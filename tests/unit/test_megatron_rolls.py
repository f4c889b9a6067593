"""What the drop-in for Megatron-LM answers, counts and leaves: without a model and without ranks."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout
from overlap_mtp import megatron as drop_in
from overlap_mtp.megatron import prefetch, settings
from overlap_mtp.megatron.forward import Entry, _sent_under_decoder
from overlap_mtp.megatron.layouts import LeftToMegatronError, layout_of
from overlap_mtp.megatron.prefetch import Mark, Prefetch, _marked, can_roll, mark_of
from overlap_mtp.megatron.rolls import patched_roll, running

from megatron_ranks import UNINSTALLS

pytestmark = UNINSTALLS


def with_mark(tensor: torch.Tensor, known_to: object, name: str, depth: int) -> torch.Tensor:
    return _marked(tensor, tensor.detach(), Mark(cast(Prefetch, known_to), name, depth, tensor._version))


def test_a_marked_tensor_that_nobody_holds_can_be_cloned():
    """As in `roll_tensor(labels)[0].clone()`."""

    def marked() -> torch.Tensor:
        return with_mark(torch.arange(4), None, "labels", 1)

    cloned = marked().clone()
    assert cloned.tolist() == [0, 1, 2, 3]
    mark = mark_of(cloned.clone())
    assert mark is not None
    assert (mark.name, mark.depth) == ("labels", 1)
    written = marked()
    written.fill_(5)
    assert written.clone().tolist() == [5] * 4
    assert mark_of(written.clone()) is None
    cloned.fill_(5)
    assert mark_of(cloned) is None


def test_a_marked_tensor_can_be_copied_and_saved():
    file, marked = io.BytesIO(), with_mark(torch.arange(4), FakePrefetch(), "labels", 1)
    torch.save(marked, file)
    file.seek(0)
    for one in (copy.deepcopy(marked), torch.load(file, weights_only=False)):
        assert (one.tolist(), mark_of(one)) == ([0, 1, 2, 3], None)
        one.fill_(7)
        assert (one.clone().tolist(), mark_of(one.clone())) == ([7] * 4, None)
    assert mark_of(marked.clone()) is not None


class FakePrefetch:
    """Answers the first roll of a tensor."""

    cp_group, packed, reason = "group", "documents", ""

    def __getstate__(self) -> None:
        raise TypeError("a process group cannot be pickled")

    def was_written(self, _name: str) -> bool:
        return False

    def answer(self, mark: Mark) -> torch.Tensor | None:
        return None if mark.depth else with_mark(torch.arange(3.0), self, mark.name, 1)


def own_roll(tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None, return_sum=True):
    """In place of Megatron-LM's: the tensor as it is."""
    return tensor, (shifts, dims, cp_group, packed_seq_params, return_sum)


IN_FORWARD = {"cp_group": "group", "packed_seq_params": "documents"}
ANOTHER = "another cp_group or packed_seq_params than the model's"


@pytest.mark.parametrize(
    ("depth", "options", "reason"),
    [
        (0, {}, ""),
        (0, {"dims": 1}, ""),
        (0, {"dims": 0}, "another shift or dimension"),
        (0, {"shifts": -2}, "another shift or dimension"),
        (0, {"cp_group": "another"}, ANOTHER),
        (0, {"packed_seq_params": None}, ANOTHER),
        (1, {}, "more depths than the model has"),
        (None, {}, "a tensor that no forward has announced"),
    ],
)
def test_an_exchange_answers_what_it_knows_and_the_rest_is_counted(monkeypatch, depth, options, reason):
    monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings())
    tensor, options = torch.ones(1, 3), IN_FORWARD | options
    if depth is not None:
        tensor = with_mark(tensor, FakePrefetch(), "labels", depth)
    rolled, total = patched_roll(own_roll)(tensor, **options)
    assert dict(drop_in.status().fallbacks) == ({reason: 1} if reason else {})
    assert drop_in.status().answered == (not reason)
    if reason:
        wanted = {"shifts": -1, "dims": -1, "return_sum": True} | options
        assert rolled is tensor
        order = ("shifts", "dims", "cp_group", "packed_seq_params", "return_sum")
        assert total == tuple(wanted[name] for name in order)
    else:
        assert (rolled.tolist(), total) == ([0, 1, 2], None)


def test_only_loss_masks_are_summed_and_only_if_asked(monkeypatch):
    monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings())
    mask = with_mark(torch.ones(3), FakePrefetch(), "loss_mask", 0)
    roll = patched_roll(own_roll)
    assert roll(mask, **IN_FORWARD)[1].item() == 3
    assert roll(mask, return_sum=False, **IN_FORWARD)[1] is None


def test_a_roll_without_an_exchange_is_counted_by_the_reason_of_its_forward(monkeypatch):
    monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings())
    roll = patched_roll(own_roll)
    with running(lambda: "inference"):
        roll(torch.ones(3))
        with running(str):
            roll(torch.ones(3))
            roll(torch.ones(3, requires_grad=True))
        roll(torch.ones(3))
    roll(torch.ones(3))
    assert dict(drop_in.status().fallbacks) == {
        "inference": 2,
        "a tensor that its forward does not know": 1,
        "a tensor that needs a gradient": 1,
        "a tensor that no forward has announced": 1,
    }


def test_the_first_roll_sends_if_no_layer_has(monkeypatch):
    monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings())
    labels, other = torch.ones(1, 3), torch.ones(1, 3)

    def send() -> str:
        with_mark(labels, FakePrefetch(), "labels", 0)
        return ""

    with running(send):
        assert patched_roll(own_roll)(labels, **IN_FORWARD)[0].tolist() == [0, 1, 2]
        patched_roll(own_roll)(other, **IN_FORWARD)
    assert drop_in.status().answered == 1
    assert dict(drop_in.status().fallbacks) == {"a tensor that its forward does not know": 1}


def test_unknown_tensors_are_rolled_exactly_if_the_settings_say_so(monkeypatch):
    tensor = torch.arange(1, 9)[None]
    padded = SimpleNamespace(
        cu_seqlens_q=torch.tensor([0, 3, 6]), cu_seqlens_q_padded=torch.tensor([0, 4, 8])
    )
    roll, exact = patched_roll(own_roll), [[2, 3, 0, 0, 6, 7, 0, 0]]

    def rolled(settings: dict[str, Any], **options: Any) -> Any:
        monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings(**settings))
        return roll(tensor, **{"packed_seq_params": padded, **options})

    for dims in (-1, 1):
        found, total = rolled({"unknown": "exact"}, dims=dims)
        assert (found.tolist(), total.item()) == (exact, 18)
    assert rolled({"unknown": "exact"}, return_sum=False)[1] is None
    assert rolled({})[0] is tensor
    for other in ({"layout": "zigzag_stream"}, {"padding": "megatron"}):
        assert rolled({"unknown": "exact", **other})[0] is tensor
    illegal = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 5, 9]), cu_seqlens_q_padded=None)
    assert rolled({"unknown": "exact"}, packed_seq_params=illegal)[0] is tensor
    for options in ({"shifts": -2}, {"dims": 0}):
        assert rolled({"unknown": "exact"}, **options)[0] is tensor
    with running(lambda: "inference"):
        assert rolled({"unknown": "exact"})[0] is tensor
    with running(lambda: ""):  # its exchange carries other tensors
        assert rolled({"unknown": "exact"})[0].tolist() == exact


def packed_params(bounds: Any, padded: Any = None) -> SimpleNamespace:
    return SimpleNamespace(cu_seqlens_q=bounds, cu_seqlens_q_padded=padded)


def test_batches_that_no_layout_fits_are_left_to_megatron():
    settings, bounds = drop_in.Settings(padding="megatron"), torch.tensor([0, 4, 8])
    for padded in (None, bounds):
        assert layout_of(packed_params(bounds, padded), 4, 2, settings) == SequenceLayout.packed([0, 4, 8], 2)
    for packed, reason in (
        (packed_params(bounds, bounds.clone()), "padded documents with padding='megatron'"),
        (packed_params(torch.tensor([0, 5, 8])), "document 0"),
        (packed_params(torch.tensor([0, 4, 12])), "seq_len must be at least"),
        (packed_params(None), "cu_seqlens_q"),
    ):
        with pytest.raises(LeftToMegatronError, match=reason):
            layout_of(packed, 4, 2, settings)
    for cp_size, kind in ((1, "contiguous"), (2, "zigzag_stream")):
        settings = drop_in.Settings(layout="zigzag_stream")
        assert layout_of(None, 4, cp_size, settings) == SequenceLayout.packed([0, 4 * cp_size], cp_size, kind)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(2, 3), True),
        (torch.ones(2, 3, requires_grad=True), False),
        (torch.ones(2, 3, dtype=torch.int16), False),
        (torch.ones(0, 3), False),
        ([1, 2], False),
    ],
)
def test_what_an_exchange_can_carry(tensor, expected):
    assert can_roll(tensor) == expected


def test_a_tensor_of_inference_mode_cannot_be_carried():
    with torch.inference_mode():
        assert not can_roll(torch.ones(3))


def test_tensors_of_different_lengths_are_left_to_megatron():
    tensors = {"labels": torch.ones(1, 4), "loss_mask": torch.ones(1, 8)}
    depths, group = {"labels": 1, "loss_mask": 1}, cast(dist.ProcessGroup, None)
    made = Prefetch(tensors, depths, group, None, drop_in.Settings())
    made.start()
    assert made.reason == "tensors of different lengths: [4, 8]"
    assert made.answer(Mark(made, "labels", 0, 0)) is None


@pytest.mark.parametrize(
    ("entry", "graphs", "layers", "expected"),
    [
        ("forward", "none", 1, ["entry", "start", "layer 0"]),
        ("forward", "none", 2, ["entry", "layer 0", "start", "layer 1"]),
        ("forward", "none", 3, ["entry", "layer 0", "start", "layer 1", "layer 2"]),
        ("forward", "local", 2, ["entry", "start", "layer 0", "layer 1"]),
        ("build_schedule_plan", "none", 2, ["entry", "start", "layer 0", "layer 1"]),
        ("forward", "none", 0, ["entry", "start"]),
    ],
)
def test_an_exchange_leaves_in_the_middle_of_the_decoder(entry, graphs, layers, expected):
    """Or at the entry, if no hook of a layer will be called."""
    done: list[str] = []

    class Layer(torch.nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            done.append(f"layer {self.number}")
            return x

    model = SimpleNamespace(
        config=SimpleNamespace(cuda_graph_impl=graphs),
        decoder=SimpleNamespace(layers=[Layer(number) for number in range(layers)]),
    )

    def send() -> str:
        done.append("start")
        return ""

    done.append("entry")
    with _sent_under_decoder(send, model, Entry(mock.Mock(), entry, "GPTModel", {})):
        for layer in model.decoder.layers:
            assert layer(expected) is expected
    assert done == expected
    assert not any(layer._forward_pre_hooks for layer in model.decoder.layers)


def test_which_batches_share_a_roller(monkeypatch):
    """More documents than there is room for double the room. What is past an end is 0 in all tensors."""
    chosen = drop_in.Settings(max_documents=4)
    roller_for = mock.Mock()
    monkeypatch.setattr(prefetch, "roller_for", roller_for)
    tensors = {name: torch.ones(1, 24) for name in ("labels", "padding_mask")}

    def asked_for(documents: int, labels: int = 2) -> tuple[Any, int, int]:
        packed = packed_params(torch.arange(0, 24 + 1, 24 // documents)) if documents else None
        group = cast(dist.ProcessGroup, SimpleNamespace(size=lambda: 1))
        made = Prefetch(tensors, {"labels": labels, "padding_mask": 2}, group, packed, chosen)
        made.start()
        assert made.answer(Mark(made, "labels", labels, 0)) is None  # no tensor is rolled further
        (_, _, kind, num_depths), options = roller_for.call_args
        assert options["fills"].items() >= {"labels": 0, "padding_mask": 0}.items()
        assert options["depths"] == {"labels": labels, "padding_mask": 2}
        return kind, num_depths, options["max_documents"]

    found = {documents: asked_for(documents) for documents in (0, 1, 2, 4, 6, 8, 12)}
    assert {documents: room for documents, (*_, room) in found.items()} == {
        **{0: 1, 1: 5, 2: 5, 4: 5},
        **{6: 10, 8: 10, 12: 20},
    }
    assert len({kind for kind, *_ in found.values()}) == 4
    assert asked_for(4, labels=3)[:2] == (mock.ANY, 3)
    assert asked_for(4, labels=1)[0] != found[4][0]


def test_the_roller_that_was_used_least_recently_makes_room(monkeypatch):
    made: list[Any] = []

    class FakeRoller:
        def __init__(self, *_: Any, **options: Any) -> None:
            self.options, self.is_closed = options, False
            made.append(self)

        def close(self) -> None:
            assert not self.is_closed
            self.is_closed = True

    def roller(kind: str, num_depths: int = 2) -> FakeRoller:
        return settings.roller_for(group, chosen, kind, num_depths, max_documents=4)

    chosen = drop_in.Settings()
    group = FakeRoller()  # anything that can be referred to weakly
    made.clear()
    monkeypatch.setattr(settings, "make_roller", FakeRoller)
    monkeypatch.setattr(settings, "MAX_ROLLERS", 3)
    a, b, _ = roller("a"), roller("b"), roller("c")
    assert (a.options, roller("a")) == ({"max_documents": 4}, a)
    roller("d")
    assert roller("a") is a is not roller("a", 3)
    assert roller("d") is made[3]
    assert roller("b") is not b
    assert not any(one.is_closed for one in made)  # a forward may still need what they have started
    chosen = drop_in.Settings(schedule="merged")
    assert roller("a") is not a
    drop_in.close()
    assert [one.is_closed for one in made] == [False, False, False, True, False, True, True]
    assert roller("a") is made[-1]
    assert len(made) == 8
