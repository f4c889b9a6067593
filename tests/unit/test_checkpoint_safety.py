"""Crafted checkpoints: no code in them runs, and no file outside of their folder is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from overlap_mtp.training.checkpoint import CheckpointError, Checkpoints
from overlap_mtp.training.checkpoint_record import file_marks
from overlap_mtp.training.safe_reader import ALLOWED, MetadataUnpickler

Parts = tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]


class Payload:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class Oddity(torch.optim.SGD):
    """An optimizer with a state that is no tensor, which torch saves as a pickle."""

    def __init__(self, parameters, state: object) -> None:
        super().__init__(parameters, lr=0.1)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["note"] = state


def parts(state: object = None) -> Parts:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = Oddity(model.parameters(), state) if state else torch.optim.AdamW(model.parameters())
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


@pytest.fixture
def saved(tmp_path) -> Path:
    return Checkpoints(tmp_path / "run").save(1, *parts(), {"samples": 3}, {})


def mend(path: Path, change: Callable[[dict], object] = lambda run: None) -> None:
    """Make the checks of a changed checkpoint pass: they are no secret."""
    record = json.loads((path / "run.json").read_text())
    for name in record["run"]["files"]:
        record["run"]["files"][name] = file_marks(path / name)
    change(record["run"])
    record["crc32"] = zlib.crc32(json.dumps(record["run"]).encode())
    (path / "run.json").write_text(json.dumps(record))


def refusal(path: Path, some: Parts) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(path.parent).load(*some, {})
    return str(caught.value)


def payloads(mark: Path) -> dict[str, Payload]:
    return {
        "os.system": Payload(os.system, f"touch {mark}"),
        "builtins.eval": Payload(eval, f"open({str(mark)!r}, 'w')"),
        "torch.load": Payload(torch.load, str(mark)),
        "a class of ours": Payload(Checkpoints, mark),
    }


@pytest.mark.parametrize("what", payloads(Path()))
@pytest.mark.parametrize("name", [".metadata", "state.pt"])
def test_a_payload_does_not_run(saved, tmp_path, what, name):
    mark = tmp_path / "mark"
    payload = payloads(mark)[what]
    torch.save(payload, saved / name) if name == "state.pt" else (saved / name).write_bytes(
        pickle.dumps(payload)
    )
    mend(saved)
    assert "which no checkpoint needs" in refusal(saved, parts()) or name == "state.pt"
    assert not mark.exists()


def test_a_payload_inside_of_good_metadata_does_not_run(saved, tmp_path):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data["more"] = Payload(os.system, f"touch {tmp_path / 'mark'}")
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    mend(saved)
    assert "posix.system, which no checkpoint needs" in refusal(saved, parts())
    assert not (tmp_path / "mark").exists()


def test_a_payload_among_the_saved_objects_does_not_run(tmp_path):
    good, bad = 7, Payload(os.system, f"touch {tmp_path / 'mark'}")
    path = Checkpoints(tmp_path / "good").save(1, *parts(good), {}, {})
    loaded = parts(8)
    Checkpoints(path.parent).load(*loaded, {})
    for values in loaded[1].state.values():
        assert values["note"] == good
    path = Checkpoints(tmp_path / "bad").save(1, *parts(bad), {}, {})
    assert "system" in refusal(path, parts(good))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../other", "", "..", "link"])
def test_names_in_run_json_stay_inside_of_the_folder(saved, name):
    (saved.parent / "other").write_text("secret")
    (saved / "link").symlink_to("../other")
    mend(saved, lambda run: run["files"].update({name: [6, 1]}))
    said = refusal(saved, parts())
    assert f"it names {name!r}, which is not a file of its folder" in said
    assert str(zlib.crc32(b"secret")) not in said


@pytest.mark.parametrize("name", ["../other", "unlisted"])
def test_metadata_names_only_files_that_were_checked(saved, name):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    (saved / name).write_bytes((saved / "__0_0.distcp").read_bytes())
    first = next(iter(metadata.storage_data))
    metadata.storage_data[first] = replace(metadata.storage_data[first], relative_path=name)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    mend(saved)
    assert f".metadata names {name!r}, which is not in run.json" in refusal(saved, parts())


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.update(files=["state.pt"]),
        lambda run: run.update(progress=None),
        lambda run: run.pop("layout"),
        lambda run: run["files"].pop("state.pt"),
        lambda run: run["files"].pop(".metadata"),
    ],
)
def test_a_run_json_of_another_form_is_refused(saved, change):
    mend(saved, change)
    assert "run.json is half-written or damaged" in refusal(saved, parts())


def test_metadata_of_another_kind_is_refused(saved):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for other in ({"state": 1}, replace(metadata, storage_data=None)):
        (saved / ".metadata").write_bytes(pickle.dumps(other))
        mend(saved)
        assert "does not describe a checkpoint" in refusal(saved, parts())


def test_the_unpickler_gives_nothing_that_does_anything():
    """Classes of plain values, and one function that looks up a layout by its name."""
    assert {module.partition(".")[0] for module, _ in ALLOWED} == {"torch", "collections", "pathlib"}
    assert [name for (_, name), one in ALLOWED.items() if not isinstance(one, type)] == ["_get_layout"]


def test_the_unpickler_knows_dtypes_and_nothing_else_of_torch():
    assert MetadataUnpickler(io.BytesIO(pickle.dumps(torch.bfloat16))).load() is torch.bfloat16
    with pytest.raises(pickle.UnpicklingError, match=r"torch\.load, which no checkpoint needs"):
        MetadataUnpickler(io.BytesIO(b"ctorch\nload\n.")).load()
