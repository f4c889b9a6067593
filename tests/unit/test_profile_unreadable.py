"""Profiles that are odd, damaged or crafted are read as far as they make sense, or are an error that says why."""

import gzip
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from time import process_time

import numpy as np
import pytest

from overlap_mtp.profiling import ProfileError, json_stream, nsys, read, read_profile, report_on
from overlap_mtp.profiling import trace as profile_columns
from overlap_mtp.profiling.intervals import Nesting, covered, length, merge, merge_each, sum_each
from overlap_mtp.profiling.shrink import main
from overlap_mtp.profiling.trace import UNKNOWN

from handmade import Process, Span, Work, write_nsys
from small_traces import GEMM, NCCL, RANGE, event, report, trace


def test_absolute_times_keep_nanoseconds(tmp_path):
    start = "1661938466274408"
    text = json.dumps([event(GEMM, 1, 3), event(NCCL, 2, 4, 8)])
    for short, long in (("1", f"{start}.001"), ("2", f"{start}.002")):
        text = text.replace(f'"ts": {short},', f'"ts": {long},')
    (tmp_path / "a.json").write_text(text)
    (row,) = report(tmp_path / "a.json").rows
    assert (row.time_us, row.hidden_us) == (4, 2.999)


ODD = {"args": [None, [], 5], "name": [None, 5, [1]], "tid": [None], "dur": [None, -3]}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in ODD for value in ODD[field]])
def test_odd_values_are_read(tmp_path, field, value):
    odd = [{"name": "no phase"}, {**event("no time", 0, 1), "dur": 1}, {**RANGE, "cat": None}]
    del odd[1]["ts"]
    events = [*odd, event(GEMM, 1, 10, bytes=1 << 60), {**event(NCCL, 3, 3, 8), field: value}]
    found = report(trace(tmp_path / "a.json", *events))
    activities = found.timelines[0].profile.activities
    assert (activities.end >= activities.start).all()
    assert (activities.num_bytes == UNKNOWN).all()
    assert sum(total.communication_us for total in found.totals) == (0 if field in ("name", "dur") else 3)
    assert field != "dur" or "as no time" in " ".join(found.notes)


@pytest.mark.parametrize(
    "text",
    [
        '[{"ph":"X","cat":"kernel","name":"k","ts":' + "9" * 5000 + "}]",
        '[{"ph":"X","cat":"kernel","name":"k","ts":NaN}]',
        '[{"ph":"X","cat":"kernel","name":"k","ts":1e400}]',
        '[{"ph":"X","cat":"kernel","name":"k","ts":true}]',
        '{"traceEvents":[{"ph":"X","cat":"kernel","name":"k","ts":1}],"baseTimeNanoseconds":"soon"}',
        '[{"ph":"X","cat":"mtia_ccp_events","name":"k","ts":1,"dur":2}]',
        '{"schemaVersion":1,"distributedInfo":[1],"traceEvents":[]}',
        "[" * 100_000,
    ],
    ids=["digits", "nan", "infinite", "bool", "base", "mtia", "info", "deep"],
)
def test_what_cannot_be_read_is_an_error(tmp_path, text, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ProfileError, match=r"^a.json: "):
        read_profile(tmp_path / "a.json")
    monkeypatch.setattr("sys.argv", ["shrink", str(tmp_path / "a.json"), str(tmp_path / "b")])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith("error: a.json: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_blanks_and_control_characters(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 7)  # every value spans several pieces
    text = json.dumps([event(NCCL + "\t\x1b", 1.5, 3)]).replace("\\t", "\t")
    (tmp_path / "a.json").write_bytes((" " * 300 + text).encode(encoding))
    found = report(tmp_path / "a.json")
    assert found.rows[0].time_us == 3
    assert [*found.timelines[0].profile.names] == [NCCL + "\ufffd" * 2]


def test_text_that_goes_on_is_an_error(tmp_path, monkeypatch):
    path = trace(tmp_path / "a.json", event(NCCL, 1, 2), event("x" * 999, 3, 1))
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    monkeypatch.setattr(json_stream, "LONGEST_VALUE", 500)
    with pytest.raises(ProfileError, match="one of its values is longer than 500 characters"):
        read_profile(path)
    path.write_text(json.dumps([event(NCCL, 1, 2)]) + "]")
    with pytest.raises(ProfileError, match="something follows its end"):
        read_profile(path)


def test_a_device_is_no_profile():
    with pytest.raises(ProfileError, match="not a file on a disk"):
        read_profile(Path("/dev/null"))


def test_a_gzip_may_expand_as_profiles_do(tmp_path, monkeypatch):
    """A small one by any factor, and a large one by a factor that profiles do not reach."""
    path, text = tmp_path / "a.json", json.dumps([event(NCCL, 1, 2)] * 99)
    for least, data in ((read.LEAST_LIMIT_BYTES, text + " " * (1 << 22)), (1, text)):
        monkeypatch.setattr(read, "LEAST_LIMIT_BYTES", least)
        path.write_bytes(gzip.compress(data.encode()))
        assert len(data) < 100 * path.stat().st_size or least > 1
        assert read_profile(path).activities.start.size == 99


def test_a_gzip_that_expands_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "LEAST_LIMIT_BYTES", 1 << 20)
    for name, head in (("a.json", b"["), ("b", b"SQLite format 3\0")):
        (tmp_path / name).write_bytes(gzip.compress(head + b" " * (1 << 22)))
        with pytest.raises(ProfileError, match="expands more than"):
            read_profile(tmp_path / name)


KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"


def export(path, change="", *more, **fields):
    """An export of two kernels, changed by SQL."""
    work = [Work(GEMM, 1, 2, 9), Work(NCCL, 1, 3, 6, 8), *more]
    write_nsys(path, [Process(7, work=work, **fields)])
    with closing(sqlite3.connect(path)) as db:
        db.executescript(change)
    return path


def test_a_database_that_yields_more_rows_than_it_has_room_for(tmp_path, monkeypatch):
    """As a crafted one does whose pages lead to one another."""
    path = export(tmp_path / "a.sqlite")
    assert read_profile(path).activities.start.size == 2
    monkeypatch.setattr(nsys, "LEAST_ROW_BYTES", path.stat().st_size)
    with pytest.raises(ProfileError, match="yields more rows than it has room for"):
        read_profile(path)


def test_more_devices_than_can_be_real(tmp_path, monkeypatch):
    path = export(tmp_path / "a.sqlite", f"UPDATE {KERNELS} SET deviceId = rowid")
    assert len(report(path).timelines) == 2
    monkeypatch.setattr(profile_columns, "MOST_DEVICES", 1)
    with pytest.raises(ProfileError, match="2 devices: at most 1 are read"):
        read_profile(path)


@pytest.mark.parametrize("column", ["start", "streamId", "demangledName"])
@pytest.mark.parametrize("value", ["'soon'", "1e300", "x'00ff'"])
def test_values_of_odd_types_are_an_error(tmp_path, column, value):
    path = export(tmp_path / "a.sqlite", f"UPDATE {KERNELS} SET {column} = {value}")
    with pytest.raises(ProfileError, match=r"a\.sqlite: the SQLite file is damaged"):
        read_profile(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (f"UPDATE {KERNELS} SET start = NULL", "2 activities have no start"),
        (f"UPDATE {KERNELS} SET start = {1 << 61}, end = {(1 << 61) + 1}", "a time lies more than"),
        (f"UPDATE {KERNELS} SET start = -{1 << 62}", "a time lies more than"),
    ],
)
def test_times_that_are_none_are_an_error(tmp_path, change, words):
    with pytest.raises(ProfileError, match=words):
        read_profile(export(tmp_path / "a.sqlite", change))


def test_activities_that_end_before_they_begin_count_as_no_time(tmp_path):
    found = report(export(tmp_path / "a.sqlite", f"UPDATE {KERNELS} SET end = start - 1"))
    activities = found.timelines[0].profile.activities
    assert (activities.end == activities.start).all()
    assert "2 activities end before they begin, or have no end, and count as no time" in " ".join(found.notes)


@pytest.mark.parametrize(("rank", "label"), [("9" * 9, "rank " + "9" * 9), ("9" * 10, "process 7 device 0")])
def test_a_rank_of_ten_digits_is_none(tmp_path, rank, label):
    path = export(tmp_path / "a.sqlite", spans=[Span(f"trunk r{rank}", 0, 5)])
    assert [one.label for one in report(path).timelines] == [label]


def test_names_that_are_no_text_are_read(tmp_path):
    """Bytes that are no UTF-8, in a text and as a blob."""
    for kind in ("TEXT", "BLOB"):
        path = export(tmp_path / kind, f"UPDATE StringIds SET value = CAST(x'6e63636cff' AS {kind})")
        assert set(read_profile(path).names) == {"nccl\ufffd"}


@pytest.mark.parametrize("known", ["demangledName", "shortName", "mangledName"])
def test_a_kernel_has_the_best_name_that_is_known(tmp_path, known):
    """The demangled one, else the short one, else the mangled one."""
    order = ["demangledName", "shortName", "mangledName"]
    change = f"ALTER TABLE {KERNELS} ADD mangledName;"
    for number, name in enumerate(order, 900):
        value = number if order.index(name) >= order.index(known) else "NULL"
        change += f"INSERT INTO StringIds VALUES ({number}, '{name}'); UPDATE {KERNELS} SET {name} = {value};"
    assert set(read_profile(export(tmp_path / "a.sqlite", change)).names) == {known}


def test_bytes_that_no_copy_has_are_not_believed(tmp_path):
    copies = [Work("Memcpy PtoP", 1, 3, 6, num_bytes=size) for size in (64, 1 << 60, -5)]
    path = export(tmp_path / "a.sqlite", "", *copies)
    assert read_profile(path).activities.num_bytes.tolist() == [UNKNOWN, UNKNOWN, 64, UNKNOWN, UNKNOWN]


def test_graph_nodes_that_are_copies_of_each_other(tmp_path):
    node = Work(NCCL, 1, 10, 20, graph_node=1)
    path = export(tmp_path / "a.sqlite", "", node, nodes=[(1, 2, 0.5), (2, 3, 0.6), (3, 1, 0.7)])
    assert report(path).totals[0].communication_us == 13


def test_virtual_tables_are_not_read(tmp_path):
    columns = "start, end, deviceId, streamId, correlationId"
    path = export(
        tmp_path / "a", f"DROP TABLE {KERNELS}; CREATE VIRTUAL TABLE {KERNELS} USING fts5({columns});"
    )
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"INSERT INTO {KERNELS} VALUES (1, 2, 0, 7, 1)")
        db.commit()
    with pytest.raises(ProfileError, match="was the GPU traced"):
        read_profile(path)


def test_views_are_not_read(tmp_path):
    path = write_nsys(tmp_path / "a.sqlite", [Process(7, work=[Work(NCCL, 1, 3, 6)])])
    with closing(sqlite3.connect(path)) as db:
        table = "CUPTI_ACTIVITY_KIND_KERNEL"
        db.executescript(f"ALTER TABLE {table} RENAME TO x; CREATE VIEW {table} AS SELECT * FROM x;")
    with pytest.raises(ProfileError, match="was the GPU traced"):
        read_profile(path)


def test_a_deep_nest_takes_no_quadratic_time():
    size = 100_000
    start = np.arange(size)
    nesting = Nesting(np.zeros(size, np.int64), start, 2 * size - start)
    times = np.full(size, 2 * size - 5)
    assert (nesting.innermost(np.zeros(size, np.int64), times) == 5).all()


def test_unions_of_groups_are_those_of_each():
    random = np.random.default_rng(0)
    group, start = random.integers(0, 5, 200), random.integers(0, 300, 200)
    end = start + random.integers(-2, 9, 200)
    of, begin, stop = merge_each(group, start, end)
    for one in range(5):
        union = merge(start[group == one], end[group == one])
        assert np.array_equal(np.stack(union), np.stack([begin[of == one], stop[of == one]]))
        assert sum_each(of, stop - begin, 5)[one] == length(union)
    assert covered((begin[:0], stop[:0]), begin, stop).sum() == 0


def test_many_range_names_take_no_longer_than_few(tmp_path):
    times = []
    for names in (8, 8000):
        spans = [Span(f"layer {i % names}", 10 * i, 10 * i + 5) for i in range(16_000)]
        work = [Work(NCCL, 10 * i + 1, 10 * i + 2, 10 * i + 4) for i in range(16_000)]
        profile = read_profile(write_nsys(tmp_path / str(names), [Process(7, spans, work)]))
        begin = process_time()
        assert len(report_on([profile]).rows) == names
        times.append(process_time() - begin)
    assert times[1] < 4 * times[0] + 0.5  # a pass over all kernels for each name takes several seconds
