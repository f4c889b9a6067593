"""Installing the drop-in in Megatron-LM and taking it out again, its settings and its report."""

from __future__ import annotations

import sys
from functools import partial, wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from overlap_mtp import megatron as drop_in

from megatron_ranks import UNINSTALLS, needs_megatron, use_checkout

ROOT = Path(__file__).parents[2]
MTP = "megatron.core.transformer.multi_token_prediction"

pytestmark = UNINSTALLS


@pytest.fixture
def megatron() -> SimpleNamespace:
    """The parts of Megatron-LM that the drop-in changes."""
    use_checkout()
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer import multi_token_prediction

    return SimpleNamespace(mtp=multi_token_prediction, model=gpt_model.GPTModel)


def patches(megatron: SimpleNamespace) -> dict[str, Any]:
    """What is in the places that the drop-in may change."""
    found = {
        f"{name}.roll_tensor": vars(module)["roll_tensor"]
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and "roll_tensor" in vars(module) and name.startswith("megatron.")
    }
    return found | {name: vars(megatron.model)[name] for name in ("forward", "build_schedule_plan")}


def copy_of(function: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A module that did `from ... import roll_tensor`."""
    module = ModuleType(name)
    module.__dict__["roll_tensor"] = function
    monkeypatch.setitem(sys.modules, name, module)
    return module


@needs_megatron
def test_install_changes_rolls_and_entries_and_uninstall_restores_them(megatron):
    before = patches(megatron)
    drop_in.install()
    during = patches(megatron)
    assert f"{MTP}.roll_tensor" in during
    assert all(during[name] is not before[name] for name in before)
    assert drop_in.status().settings == drop_in.Settings()
    drop_in.uninstall()
    assert patches(megatron) == before
    assert drop_in.status().settings is None


@needs_megatron
def test_installing_twice_replaces_the_settings_and_one_uninstall_is_enough(megatron):
    before = patches(megatron)
    drop_in.install(schedule="sync")
    once = patches(megatron)
    drop_in.install(schedule="merged", max_documents=8)
    assert patches(megatron) == once
    assert drop_in.status().settings == drop_in.Settings(schedule="merged", max_documents=8)
    drop_in.uninstall()
    assert patches(megatron) == before
    drop_in.uninstall()
    assert patches(megatron) == before
    drop_in.install()
    assert patches(megatron)["forward"] is not before["forward"]


@needs_megatron
def test_uninstall_leaves_what_somebody_else_has_put_in_place(megatron):
    own = megatron.mtp.roll_tensor
    drop_in.install()
    foreign = partial(megatron.mtp.roll_tensor)
    megatron.mtp.roll_tensor = foreign
    try:
        drop_in.uninstall()
        assert megatron.mtp.roll_tensor is foreign
    finally:
        megatron.mtp.roll_tensor = own


@needs_megatron
def test_install_is_a_context_manager(megatron):
    before = patches(megatron)
    with drop_in.install(padding="megatron"):
        assert drop_in.status().settings.padding == "megatron"
        assert patches(megatron)["forward"] is not before["forward"]
    assert patches(megatron) == before
    with drop_in.install(layout="contiguous"):
        with drop_in.install(layout="zigzag_stream"):
            assert drop_in.status().settings.layout == "zigzag_stream"
        assert drop_in.status().settings.layout == "contiguous"
        assert patches(megatron)["forward"] is not before["forward"]
    assert patches(megatron) == before
    with pytest.raises(KeyError, match="body"), drop_in.install():
        raise KeyError("body")
    assert patches(megatron) == before


@needs_megatron
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "fast"}, "schedule must be one of .*prefetch.*, got 'fast'"),
        ({"schedule": "prepared"}, "schedule must be one of .*, got 'prepared'"),
        ({"transport": "pigeon"}, "transport must be one of .*auto.*, got 'pigeon'"),
        ({"padding": ""}, "padding must be one of exact, megatron, got ''"),
        ({"layout": "spiral"}, "layout must be one of .*zigzag_stream.*, got 'spiral'"),
        ({"max_documents": 0}, "max_documents must be .*1, got 0"),
    ],
)
def test_a_bad_setting_is_refused_and_changes_nothing(megatron, settings, message):
    before = patches(megatron)
    with pytest.raises(ValueError, match=message):
        drop_in.install(**settings)
    assert patches(megatron) == before
    assert drop_in.status().settings is None
    drop_in.install(schedule="sync")
    with pytest.raises(ValueError, match=message):
        drop_in.install(**settings)
    assert drop_in.status().settings == drop_in.Settings(schedule="sync")


def test_a_max_documents_that_is_no_number_is_refused_by_name():
    with pytest.raises((TypeError, ValueError), match=r"max_documents must be .*'many'"):
        drop_in.install(max_documents="many")


def test_a_setting_that_does_not_exist_is_refused_by_name():
    with pytest.raises(TypeError, match="speed"):
        drop_in.install(speed="high")


@needs_megatron
def test_copies_of_roll_tensor_in_other_modules_are_changed_and_restored(megatron, monkeypatch):
    def of_somebody_else() -> None: ...

    original = megatron.mtp.roll_tensor
    early = copy_of(original, monkeypatch, "imported_before_install")
    other = copy_of(of_somebody_else, monkeypatch, "has_a_roll_tensor_of_its_own")
    drop_in.install()
    assert early.roll_tensor is megatron.mtp.roll_tensor is not original
    late = copy_of(megatron.mtp.roll_tensor, monkeypatch, "imported_after_install")
    drop_in.install(schedule="sync")
    drop_in.uninstall()
    assert early.roll_tensor is late.roll_tensor is original
    assert other.roll_tensor is of_somebody_else


def no_sum(tensor, shifts=-1, dims=-1, cp_group=None): ...


def more(tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None, return_sum=True, wrap=False): ...


def in_another_order(tensor, dims=-1, shifts=-1, cp_group=None, packed_seq_params=None): ...


@needs_megatron
@pytest.mark.parametrize("roll", [no_sum, more, in_another_order])
def test_a_roll_tensor_of_another_signature_is_refused(megatron, monkeypatch, roll):
    monkeypatch.setattr(megatron.mtp, "roll_tensor", roll)
    assert_refused(megatron, "roll_tensor")


def without_a_loss_mask(
    self, input_ids, position_ids, attention_mask, labels=None, packed_seq_params=None
): ...


def with_other_names(self, tokens, position_ids, labels=None, packed_seq_params=None, *, loss_mask=None): ...


@needs_megatron
@pytest.mark.parametrize("forward", [without_a_loss_mask, with_other_names])
def test_a_forward_of_another_signature_is_refused(megatron, monkeypatch, forward):
    monkeypatch.setattr(megatron.model, "forward", forward)
    assert_refused(megatron, "GPTModel.forward")


@needs_megatron
def test_mtp_layers_that_do_not_roll_by_roll_tensor_are_refused(megatron, monkeypatch):
    def embeddings(self, input_ids, position_ids): ...

    monkeypatch.setattr(megatron.mtp.MultiTokenPredictionLayer, "_get_embeddings", embeddings)
    assert_refused(megatron, "MTP layers")


@needs_megatron
def test_a_roll_tensor_that_somebody_has_replaced_for_some_callers_is_refused(megatron, monkeypatch):
    """The others would go on with Megatron-LM's own rolls, and nobody would count them."""
    own = megatron.mtp.roll_tensor
    monkeypatch.setattr(
        megatron.mtp, "roll_tensor", wraps(own)(lambda *args, **options: own(*args, **options))
    )
    if hasattr(megatron.mtp, "process_mtp_loss"):  # all callers are in one module
        drop_in.install()
    else:
        assert_refused(megatron, "somebody has replaced")


@needs_megatron
def test_a_megatron_without_an_mtp_loss_of_its_own_is_refused(megatron, monkeypatch):
    if hasattr(megatron.mtp, "process_mtp_loss"):
        monkeypatch.setattr(megatron.mtp, "process_mtp_loss", lambda hidden_states: hidden_states)
    else:
        monkeypatch.setattr(megatron.model, "_postprocess", lambda self, hidden_states: hidden_states)
    assert_refused(megatron, "MTP loss")


def assert_refused(megatron: SimpleNamespace, what: str) -> None:
    import megatron.core as core

    before = patches(megatron)
    with pytest.raises(RuntimeError, match=what) as refused:
        drop_in.install()
    assert core.__version__ in str(refused.value)
    assert "0.16.1" in str(refused.value)
    assert patches(megatron) == before
    assert drop_in.status().settings is None


@needs_megatron
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_a_tensor_that_no_forward_knows_is_rolled_by_megatron_and_counted(megatron, dtype):
    tensor = torch.arange(12).reshape(2, 6).to(dtype)
    expected, total = megatron.mtp.roll_tensor(tensor.clone())
    with drop_in.install():
        rolled, found = megatron.mtp.roll_tensor(tensor.clone())
        assert torch.equal(rolled, expected)
        assert torch.equal(found, total)
        assert found.dtype == total.dtype
        rolled, _ = megatron.mtp.roll_tensor(tensor.clone(), shifts=-1, dims=1, return_sum=False)
        assert torch.equal(rolled, expected)
        assert megatron.mtp.roll_tensor(None) == (None, None)
        status = drop_in.status()
        assert (status.forwards, status.exchanges, status.answered) == (0, 0, 0)
        assert sum(status.fallbacks.values()) == 2


@needs_megatron
def test_a_copy_that_outlives_the_drop_in_rolls_like_megatron(megatron):
    drop_in.install()
    kept = megatron.mtp.roll_tensor
    drop_in.uninstall()
    tensor = torch.arange(6)
    assert kept(tensor)[0].tolist() == [1, 2, 3, 4, 5, 0]
    assert sum(drop_in.status().fallbacks.values()) == 0


def test_status_says_that_nothing_is_installed():
    drop_in.reset_status()
    assert str(drop_in.status()) == "overlap_mtp.megatron is not installed"


@needs_megatron
def test_status_shows_counts_and_reasons_and_install_resets_them(megatron):
    drop_in.install(schedule="merged")
    status = drop_in.status()
    status.forwards, status.exchanges, status.answered = 4, 3, 30
    status.fallbacks.update({"inference": 2, "a reason": 8})
    text = str(status)
    for part in (status.version, "schedule=merged", "padding=exact", "75.0 %", "inference", "a reason"):
        assert part in text
    assert text.index("8: a reason") < text.index("2: inference")
    drop_in.uninstall()
    assert "no longer installed" in str(status)
    assert "75.0 %" in str(status)
    drop_in.install()
    assert (status.forwards, status.exchanges, status.answered, len(status.fallbacks)) == (0, 0, 0, 0)
    assert "100" not in str(status)  # no share of nothing
