"""Installing the drop-in in Megatron-LM and taking it out again, its settings, its report and its front."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout
from overlap_mtp import megatron as drop_in
from overlap_mtp.megatron import __main__ as front
from overlap_mtp.megatron import prefetch, settings
from overlap_mtp.megatron.layouts import LeftToMegatronError, layout_of
from overlap_mtp.megatron.prefetch import Mark, Prefetch, _marked, can_roll, mark_of
from overlap_mtp.megatron.rolls import no_exchange, patched_roll

from megatron_ranks import has_megatron, use_checkout

ROOT = Path(__file__).parents[2]
MTP = "megatron.core.transformer.multi_token_prediction"

pytestmark = pytest.mark.filterwarnings("ignore")  # Megatron-LM's, of what is not installed
needs_megatron = pytest.mark.skipif(not has_megatron(), reason="megatron-core is not installed")


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    yield
    drop_in.uninstall()
    drop_in.reset_status()


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
def test_install_is_a_context_manager(megatron):
    before = patches(megatron)
    with drop_in.install(padding="megatron"):
        assert drop_in.status().settings.padding == "megatron"
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


def test_a_marked_tensor_that_nobody_holds_can_be_cloned():
    """As in `roll_tensor(labels)[0].clone()`."""

    def marked() -> torch.Tensor:
        return _marked(torch.arange(4), cast(Prefetch, None), "labels", 1)

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
    file, marked = io.BytesIO(), _marked(torch.arange(4), cast(Prefetch, FakePrefetch()), "labels", 1)
    torch.save(marked, file)
    file.seek(0)
    for one in (copy.deepcopy(marked), torch.load(file, weights_only=False)):
        assert (one.tolist(), mark_of(one)) == ([0, 1, 2, 3], None)
        one.fill_(7)
        assert (one.clone().tolist(), mark_of(one.clone())) == ([7] * 4, None)
    assert mark_of(marked.clone()) is not None


class FakePrefetch:
    """Answers the first roll of a tensor."""

    cp_group, packed = "group", "documents"

    def __getstate__(self) -> None:
        raise TypeError("a process group cannot be pickled")

    def was_written(self, _name: str) -> bool:
        return False

    def answer(self, mark: Mark) -> torch.Tensor | None:
        return None if mark.depth else _marked(torch.arange(3.0), cast(Prefetch, self), mark.name, 1)


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
        tensor = _marked(tensor, cast(Prefetch, FakePrefetch()), "labels", depth)
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
    mask = _marked(torch.ones(3), cast(Prefetch, FakePrefetch()), "loss_mask", 0)
    roll = patched_roll(own_roll)
    assert roll(mask, **IN_FORWARD)[1].item() == 3
    assert roll(mask, return_sum=False, **IN_FORWARD)[1] is None


def test_a_roll_without_an_exchange_is_counted_by_the_reason_of_its_forward(monkeypatch):
    monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings())
    roll = patched_roll(own_roll)
    with no_exchange("inference"):
        roll(torch.ones(3))
        with no_exchange(""):
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


def test_unknown_tensors_are_rolled_exactly_if_the_settings_say_so(monkeypatch):
    tensor = torch.arange(1, 9)[None]
    padded = SimpleNamespace(
        cu_seqlens_q=torch.tensor([0, 3, 6]), cu_seqlens_q_padded=torch.tensor([0, 4, 8])
    )
    roll, exact = patched_roll(own_roll), [[2, 3, 0, 0, 6, 7, 0, 0]]

    def rolled(settings: dict[str, Any], **options: Any) -> Any:
        monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings(**settings))
        return roll(tensor, packed_seq_params=padded, **options)

    for dims in (-1, 1):
        found, total = rolled({"unknown": "exact"}, dims=dims)
        assert (found.tolist(), total.item()) == (exact, 18)
    assert rolled({"unknown": "exact"}, return_sum=False)[1] is None
    assert rolled({})[0] is tensor
    assert rolled({"unknown": "exact", "layout": "zigzag_stream"})[0] is tensor
    for options in ({"shifts": -2}, {"dims": 0}):
        assert rolled({"unknown": "exact"}, **options)[0] is tensor
    with no_exchange("inference"):
        assert rolled({"unknown": "exact"})[0] is tensor


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


def test_tensors_of_different_lengths_are_left_to_megatron(monkeypatch):
    monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings())
    tensors = {"labels": torch.ones(1, 4), "loss_mask": torch.ones(1, 8)}
    with pytest.raises(LeftToMegatronError, match=r"different lengths: \[4, 8\]"):
        Prefetch(tensors, {"labels": 1, "loss_mask": 1}, cast(dist.ProcessGroup, None), None)


def test_which_batches_share_a_roller(monkeypatch):
    """More documents than there is room for double the room. What is past an end is 0 in all tensors."""
    monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings(max_documents=4))
    roller_for = mock.Mock()
    monkeypatch.setattr(prefetch, "roller_for", roller_for)
    tensors = {name: torch.ones(1, 24) for name in ("labels", "padding_mask")}

    def asked_for(documents: int, labels: int = 2) -> tuple[Any, int, int]:
        packed = packed_params(torch.arange(0, 24 + 1, 24 // documents)) if documents else None
        group = cast(dist.ProcessGroup, SimpleNamespace(size=lambda: 1))
        made = Prefetch(tensors, {"labels": labels, "padding_mask": 2}, group, packed)
        assert made.answer(Mark(made, "labels", labels, 0)) is None  # no tensor is rolled further
        (_, kind, num_depths), options = roller_for.call_args
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
        return settings.roller_for(group, kind, num_depths, max_documents=4)

    group = FakeRoller()  # anything that can be referred to weakly
    made.clear()
    monkeypatch.setattr(settings, "make_roller", FakeRoller)
    monkeypatch.setattr(settings, "MAX_ROLLERS", 3)
    monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings())
    a, b, c = roller("a"), roller("b"), roller("c")
    assert (a.options, roller("a")) == ({"max_documents": 4}, a)
    roller("d")
    assert [one.is_closed for one in (a, b, c)] == [False, True, False]
    assert roller("a") is a is not roller("a", 3)
    assert c.is_closed
    monkeypatch.setattr(drop_in.status(), "settings", drop_in.Settings(schedule="merged"))
    assert roller("a") is not a
    drop_in.close()
    assert all(one.is_closed for one in made)
    assert roller("a") is made[-1]
    assert len(made) == 7


def test_status_says_that_nothing_is_installed():
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
    drop_in.install()
    assert (status.forwards, status.exchanges, status.answered, len(status.fallbacks)) == (0, 0, 0, 0)
    assert "100" not in str(status)  # no share of nothing


# Other processes


def python(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_COMPILE_DISABLE": "1", **variables}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


WITHOUT_MEGATRON = """
import sys

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "megatron":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import overlap_mtp, overlap_mtp.megatron
assert str(overlap_mtp.megatron.status()) == "overlap_mtp.megatron is not installed"
overlap_mtp.megatron.uninstall()
try:
    overlap_mtp.megatron.install()
except ImportError as error:
    assert "megatron" in str(error), error
else:
    sys.exit("it was installed")
print("done")
"""


def test_importing_needs_no_megatron():
    done = python("-c", WITHOUT_MEGATRON)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# A Megatron-LM of a few lines: importing the real one takes 6 s. It lies beside the script, as in a checkout.
LIKE_MEGATRON = {
    "megatron/core/__init__.py": "__version__ = '9.9'",
    "megatron/core/transformer/__init__.py": "",
    "megatron/core/transformer/multi_token_prediction.py": """
def roll_tensor(tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None):
    return tensor, tensor.sum()
class MultiTokenPredictionLayer:
    def _get_embeddings(self, input_ids):
        return roll_tensor(input_ids)
""",
    "megatron/core/models/__init__.py": "",
    "megatron/core/models/gpt/__init__.py": "",
    "megatron/core/models/gpt/gpt_model.py": """
from megatron.core.transformer.multi_token_prediction import roll_tensor
class GPTModel:
    def _postprocess(self, labels):
        return roll_tensor(labels)
    def forward(self, input_ids, position_ids, labels=None, packed_seq_params=None, *, loss_mask=None):
        return labels
""",
}
SCRIPT = """
import json, pickle, sys
import overlap_mtp.megatron
import __main__
from beside import VALUE
class Local: pass
pickle.loads(pickle.dumps(Local()))
settings = overlap_mtp.megatron.status().settings
print(json.dumps({"argv": sys.argv[1:], "name": __name__, "main": __main__.VALUE, "file": __file__,
                  "path": sys.path[0], "settings": settings and vars(settings)}))
import torch
from megatron.core.models.gpt import gpt_model
gpt_model.roll_tensor(torch.ones(3))
sys.exit(3)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    for name, text in {**LIKE_MEGATRON, "pretrain.py": SCRIPT, "beside.py": "VALUE = 7"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "pretrain.py"


def test_the_front_runs_a_script_with_the_drop_in(script, tmp_path):
    arguments = ["-m", "overlap_mtp.megatron", "checkout/pretrain.py", "--lr", "1", "-m", ""]
    choice = "schedule=sync, max_documents=16"
    done = python(*arguments, cwd=tmp_path, OVERLAP_MTP_MEGATRON=choice, RANK="0")
    assert done.returncode == 3, done.stderr  # what the script ends with
    seen = json.loads(done.stdout)
    assert seen["argv"] == ["--lr", "1", "-m", ""]
    assert (seen["name"], seen["main"]) == ("__main__", 7)
    assert (seen["file"], seen["path"]) == ("checkout/pretrain.py", str(script.parent))
    assert seen["settings"] == vars(drop_in.Settings(schedule="sync", max_documents=16))
    assert "overlap_mtp.megatron on megatron-core 9.9: schedule=sync" in done.stderr
    assert "1: a tensor that no forward has announced" in done.stderr


@needs_megatron
def test_the_front_installs_in_the_real_megatron(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "from megatron.core.models.gpt.gpt_model import GPTModel\n"
        "from overlap_mtp.megatron import status\n"
        "print(hasattr(GPTModel.forward, '__wrapped__'), status().settings is not None)\n"
    )
    use_checkout()
    path = os.pathsep.join([str(ROOT), os.environ.get("MEGATRON_CHECKOUT", "")])
    before = "import typing, typing_extensions; typing.override = typing_extensions.override\n"
    (tmp_path / "sitecustomize.py").write_text(before)  # for main on Python 3.11
    path = os.pathsep.join([str(tmp_path), path])
    done = python("-m", "overlap_mtp.megatron", str(script), PYTHONPATH=path, OVERLAP_MTP_MEGATRON="1")
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr
    assert "rolls      0" in done.stderr


# The front in this process


@pytest.fixture
def run_front(script, monkeypatch, capsys):
    """Run the front as `python -m overlap_mtp.megatron ...` would; installing is replaced by a note."""
    noted = SimpleNamespace(installed=None, at_exit=[])

    def install(**settings: Any) -> None:
        noted.installed = drop_in.Settings(**settings)

    def run(*arguments: str, **variables: str) -> SimpleNamespace:
        for name in ("RANK", "OVERLAP_MTP_MEGATRON"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(front, "install", install)
        monkeypatch.setattr(front.atexit, "register", noted.at_exit.append)
        monkeypatch.setattr(sys, "argv", ["overlap_mtp/megatron/__main__.py", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        noted.end = None
        try:
            front.main()
        except SystemExit as end:
            noted.end = end.code
        noted.text = capsys.readouterr().out
        return noted

    script.write_text("import sys\nprint('ran', sys.argv)\n")
    return run


@pytest.mark.parametrize("value", [None, "", "1", " 1 "])
def test_the_front_installs_with_the_default_settings(run_front, script, value):
    variables = {} if value is None else {"OVERLAP_MTP_MEGATRON": value}
    done = run_front(str(script), "a", "b", **variables)
    assert done.end is None
    assert done.installed == drop_in.Settings()
    assert done.text == f"ran {[str(script), 'a', 'b']}\n"
    assert len(done.at_exit) == 1  # the report


def test_the_front_runs_the_script_alone_if_the_variable_is_0(run_front, script):
    done = run_front(str(script), OVERLAP_MTP_MEGATRON="0")
    assert (done.end, done.installed, done.at_exit) == (None, None, [])
    assert done.text.startswith("ran ")


def test_only_rank_0_reports_at_the_end(run_front, script):
    done = run_front(str(script), RANK="3")
    assert done.installed == drop_in.Settings()
    assert done.at_exit == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "OVERLAP_MTP_MEGATRON must be 0, 1 or .*'yes'"),
        ("2", "OVERLAP_MTP_MEGATRON must be"),
        ("padding=", "OVERLAP_MTP_MEGATRON must be"),
        ("padding=wrong", "padding must be one of exact, megatron, got 'wrong'"),
        ("padding=exact,", "OVERLAP_MTP_MEGATRON must be"),
        ("max_documents=0", "max_documents must be"),
        ("max_documents=many", "max_documents must be .*'many'"),
        ("speed=high", "speed"),
    ],
)
def test_a_bad_value_of_the_variable_ends_the_front_before_the_script(run_front, script, value, message):
    done = run_front(str(script), OVERLAP_MTP_MEGATRON=value)
    assert done.text == ""
    assert isinstance(done.end, str)
    assert re.search(message, done.end), done.end


@pytest.mark.parametrize("arguments", [(), ("--lr", "1"), ("nowhere.py",)])
def test_a_missing_script_is_said(run_front, arguments):
    done = run_front(*arguments)
    assert isinstance(done.end, str)
    assert "nowhere.py is not a file" in done.end or done.end.startswith("usage: ")
    assert done.installed is None
