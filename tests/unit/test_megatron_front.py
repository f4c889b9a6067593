"""`python -m overlap_mtp.megatron SCRIPT`, in processes and in this one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overlap_mtp import megatron as drop_in
from overlap_mtp.megatron import __main__ as front

from megatron_ranks import UNINSTALLS, needs_megatron, use_checkout

ROOT = Path(__file__).parents[2]

pytestmark = UNINSTALLS


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
