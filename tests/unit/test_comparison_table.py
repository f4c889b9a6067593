"""Tables of a comparison in the terminal: their width, and that no number is ever cut."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from compare.columns import NARROW, WIDE
from compare.report import markdown_of, read_record, show
from compare.sentence import sentence_of

from comparison_records import record_of

MODES = ("sync", "merged", "overlap:process_group", "prefetch:process_group", "prefetch:symmetric", "none")
RATIOS = {mode: (1.234 + at, 1.123 + at, 1.345 + at) for at, mode in enumerate(MODES)}
USUAL = record_of(RATIOS)
HUGE = record_of({mode: tuple(1234 * value for value in one) for mode, one in RATIOS.items()}, scale=98.7)


def shown(record: dict, width: int, wide: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(record, wide, console)
    return console.file.getvalue().splitlines()


def words_of(record: dict, columns: dict) -> set[str]:
    cells = {cell(mode, row) for mode, row in record["rows"].items() for cell in columns.values()}
    return {word for cell in cells for word in cell.split() if re.search(r"\d", word)}


def test_the_narrow_table():
    lines = shown(USUAL, 100)
    [line] = [line for line in lines if line.startswith("prefetch:process_group")]
    assert line.split() == ["prefetch:process_group", "42.34", "4.234", "[4.123,", "4.345]", "-", "4", "yes"]
    assert [line.split()[1:] for line in lines if line.startswith("prepared")] == [
        ["10.00", "1", "-", "4", "reference"]
    ]
    assert [line.split()[-1] for line in lines if line.startswith("none")] == ["-"]
    assert lines[-1] == sentence_of(USUAL)
    record = record_of(RATIOS, wrong={"sync": ("loss",)})
    assert [line.split()[-1] for line in shown(record, 100) if line.startswith("sync")] == ["NO"]


@pytest.mark.parametrize("record", [USUAL, HUGE], ids=["usual", "huge"])
@pytest.mark.parametrize("width", [200, 100, 80, 40])
def test_no_number_is_cut(record, width):
    """At 100 columns every schedule has one line; at 80 the usual numbers fit too."""
    *lines, _, _ = shown(record, width)
    text = "\n".join(lines)
    assert "…" not in text
    assert words_of(record, NARROW) <= set(text.split())
    assert width < 80 or (width == 80 and record is HUGE) or max(map(len, lines)) <= min(width, 100)
    if width >= 100:
        assert sum(line.startswith(MODES) for line in lines) == len(MODES)


@pytest.mark.parametrize("width", [200, 80])
def test_the_wide_table_has_the_rest(width):
    text = "\n".join(shown(HUGE, width, wide=True))
    assert words_of(HUGE, WIDE) <= set(text.split())
    assert width < 200 or all(heading in text for heading in WIDE)


def test_the_summary_of_a_sweep_keeps_its_columns():
    lines = markdown_of({"one": USUAL}).splitlines()
    assert lines[0] == (
        "| run | schedule | step ms (p10-p90) | / no exchange | step delta µs | stall µs | efficiency | tokens/s "
        "| host µs | messages | KB | loss | same rolls, loss |"
    )
    assert lines[2].startswith(
        "| one | sync | 12.34 (11.11-13.57) | 1.2340 [1.1230, 1.3450] | 2340 [1230, 3450] | - |"
    )
    assert lines[-2].endswith("| timing only |")
    assert lines[-1].endswith("| the reference |")


def test_all_columns_hold_gradients_where_they_were_compared():
    record = record_of(RATIOS)
    for row in record["rows"].values():
        row["gradients_equal"] = True
    record["rows"]["merged"]["gradients_equal"] = False
    _, _, sync, merged, *_ = markdown_of({"one": record}).splitlines()
    assert sync.endswith("| yes, yes, gradients yes |")
    assert merged.endswith("| yes, yes, gradients NO |")


def test_a_file_that_is_no_record(tmp_path):
    (tmp_path / "x.json").write_text('{"experiment": "soak"}')
    assert read_record(tmp_path / "x.json") is None
    nowhere = json.dumps({name: part for name, part in USUAL.items() if name != "where"})
    for content in ("", "{", '{"experiment": "compare_modes", "rows": {"sync": {}}}', nowhere):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=r"x\.json is not a record of a comparison"):
            read_record(tmp_path / "x.json")
