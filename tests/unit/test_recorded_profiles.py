"""The profiles recorded in profiles/: what must hold for each of them."""

import gzip
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from overlap_mtp.profiling import nsys, read_profile, report_on

EXPORTS = sorted((Path(__file__).parents[2] / "profiles").glob("*.sqlite.gz"))
READ = {*nsys.TABLES.values(), nsys.CALLS, nsys.RANGES, nsys.NODES, "StringIds", "META_DATA_EXPORT"}


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_a_recorded_profile_adds_up_and_shows_what_it_was_recorded_for(path):
    found = report_on([read_profile(path)])
    assert found.notes == ()
    devices = [one.label for one in found.timelines]
    assert devices == [f"rank {rank}" for rank in range(len(devices))]
    assert len(devices) > 1
    for row in found.rows:
        assert row.launches > 0
        assert row.time_us > 0
        assert row.peer_wait_us is None or row.peer_wait_us >= 0
        if row.kind != "local":
            assert row.hidden_us + row.exposed_us == pytest.approx(row.time_us)
            assert 0 <= row.hidden_fraction <= 1
    kinds = [{(row.schedule, row.kind) for row in found.rows if row.device == device} for device in devices]
    assert all(kind == kinds[0] for kind in kinds)

    schedules = {one.name: one for one in found.schedules}
    assert all(one.step_ms > 0 for one in found.schedules if one.steps)
    assert schedules["prepared"].exchange_hidden is None
    assert schedules["prefetch"].exchange_hidden > 0.5 > 0.1 > schedules["sync"].exchange_hidden
    sends = [row for row in found.rows if row.range == "send-recv"]
    launches = {name: sum(row.launches for row in sends if row.schedule == name) for name in schedules}
    assert launches["sync"] > launches["prefetch"] > 0


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_a_recorded_export_holds_only_what_is_read(path):
    with closing(sqlite3.connect(":memory:")) as db:
        db.deserialize(gzip.decompress(path.read_bytes()))
        assert {row[0] for row in db.execute("SELECT name FROM sqlite_master")} <= READ
        metadata = db.execute("SELECT name FROM META_DATA_EXPORT").fetchall()
        texts = [row[0] for row in db.execute("SELECT value FROM StringIds")]
    assert metadata == [("EXPORT_SCHEMA_VERSION",)]
    assert not [text for text in texts if re.search(r"\w/\w", text)]
