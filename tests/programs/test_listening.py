"""What a run listens on."""

from __future__ import annotations

import sys
from datetime import timedelta

import pytest
from listening import LOOPBACK, report

from harness.launch import run_on_ranks


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's tables")
@pytest.mark.parametrize("deadline", [None, timedelta(seconds=60)])
def test_a_run_on_one_host_listens_on_loopback_only(tmp_path, deadline):
    run_on_ranks(report, 2, "cpu", tmp_path, deadline=deadline)
    found = [(tmp_path / f"rank{rank}").read_text().split() for rank in (0, 1)]
    assert all(found), "gloo listens on each rank"
    assert {address for one in found for address in one} <= LOOPBACK
