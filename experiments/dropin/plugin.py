"""A plugin for pytest in a checkout of Megatron-LM: `megatron_tests.py` starts it. It changes no test.

The environment says what to do: the drop-in's settings as JSON in OVERLAP_MTP_DROP_IN, if it is to be installed; the
folder for the outcomes in OVERLAP_MTP_OUTCOMES; OVERLAP_MTP_ON_CPU and OVERLAP_MTP_PARTITION, if they are 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dropin.cpu import megatron_on_cpu
from dropin.without_te import megatron_without_te, partition_by_stand_in

DOWNLOADER = "tests.test_utils.python_scripts.download_unit_tests_dataset"
NEEDS_PARTITION = (
    "per-document CP partitioning needs transformer_engine"  # the reason why such tests are skipped
)
KEPT = 400  # characters of a failure that are kept


class Plugin:
    """Prepares Megatron-LM, notes the outcome of each test, and writes all of them at the end."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {}  # by test: the outcome, and how its failure ends
        self._stack = contextlib.ExitStack()

    def prepare(self) -> None:
        """Change what has to be changed before test modules are imported."""
        warnings.simplefilter("ignore")
        # Megatron-LM's conftest would download test data, which these tests do not use.
        downloader = ModuleType(DOWNLOADER)
        downloader.download_and_extract_asset = lambda **_: None  # type: ignore[attr-defined]
        sys.modules[DOWNLOADER] = downloader
        if os.environ.get("OVERLAP_MTP_ON_CPU") == "1":
            torch.set_num_threads(1)
            self._stack.enter_context(megatron_on_cpu())
        self._stack.enter_context(megatron_without_te())
        if settings := os.environ.get("OVERLAP_MTP_DROP_IN"):
            from overlap_mtp import megatron as drop_in

            drop_in.install(**json.loads(settings))

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Run the tests that need Transformer Engine for its partition of documents alone, with a stand-in."""
        if os.environ.get("OVERLAP_MTP_PARTITION") != "1":
            return
        for item in items:
            marks = [
                mark for mark in item.iter_markers("skipif") if mark.kwargs.get("reason") == NEEDS_PARTITION
            ]
            if marks:
                partition_by_stand_in()
                item.module.HAVE_TE = True
                for node in item.listchain():
                    node.own_markers = [mark for mark in node.own_markers if mark not in marks]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note an outcome: that of the test's body, or of a fixture that did not pass."""
        if report.when == "call" or report.outcome != "passed":
            test = report.nodeid.split("::", 1)[-1]
            text = "" if report.outcome == "passed" else str(report.longrepr)[-KEPT:]
            self.outcomes[test] = [report.outcome, text]

    def pytest_sessionfinish(self) -> None:
        """Write the outcomes, and what the drop-in did."""
        record: dict[str, Any] = {"outcomes": self.outcomes, "status": None}
        if os.environ.get("OVERLAP_MTP_DROP_IN"):
            from overlap_mtp import megatron as drop_in

            status = drop_in.status()
            record["status"] = {
                "answered": status.answered,
                "exchanges": status.exchanges,
                "fallbacks": dict(status.fallbacks),
            }
        rank = os.environ.get("RANK", "0")
        Path(os.environ["OVERLAP_MTP_OUTCOMES"], f"rank{rank}.json").write_text(json.dumps(record))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: Any) -> None:
    """Register the plugin before pytest imports a conftest or test module."""
    plugin = Plugin()
    plugin.prepare()
    early_config.pluginmanager.register(plugin, "overlap_mtp")
