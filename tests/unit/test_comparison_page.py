"""The page of a comparison: well formed, on its own, complete, and safe whatever the record holds."""

from __future__ import annotations

import base64
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import comparison_report
import pytest

from compare.comparison import TOKENS
from compare.page import page_of
from compare.report import read_record
from compare.sentence import meaning_of, sentence_of, worth_of
from harness.command import write_record
from harness.plots import COLOURS, caption

from comparison_records import record_of

RESULTS = Path(__file__).parents[2] / "experiments/results/step_time"
PICTURE = Path(__file__).parents[2] / "docs/schedules.svg"
RATIOS = {"sync": (1.86, 1.8, 1.95), "prefetch:process_group": (1.01, 0.98, 1.03), "none": (0.9, 0.8, 0.95)}
RECORD = record_of(RATIOS, {"prefetch:process_group": (0.99, 0.95, 1.02)}, {"none": ("rolls", "loss")})
VOID = {"meta", "wbr", "img"}  # elements of HTML without an end


class Reader(HTMLParser):
    """Reads a page and fails if an element is left open or closed twice."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_page_has_every_part():
    page = page_of(RECORD, PICTURE)
    read = Reader(page)
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert read.texts["h1"] == ["What the boundary exchange costs"]
    assert read.texts["h2"] == [
        *(
            "Step time over that without any exchange",
            "Step times",
            "Timeline",
            "Bits",
            "Command",
            "Environment",
            "Settings",
        )
    ]
    for text in (f"{caption(RECORD)}, 2026-11-27", sentence_of(RECORD), meaning_of(TOKENS)):
        assert text in read.texts["p"]
    assert read.texts["code"] == ["python experiments/compare_modes.py --rounds 40"]
    facts = dict(zip(read.texts["dt"], read.texts["dd"], strict=True))
    assert facts.items() >= {"torch": "2.13.0", "num_depths": "2", "data": "standard library"}.items()
    rows = [text for text in read.texts["tr"] if text.startswith("prefetch")]
    assert rows == [
        "prefetch:process_group10.101.010 [0.980, 1.030]-4yes",
        "prefetch:process_groupequalequal5.12345",
    ]
    assert {cell["scope"] for cell in read.all("th")} == {"row", "col"}
    assert "Transports: prefetch:process_group over process_group." in read.texts["p"]
    assert "Timeline" not in Reader(page_of(RECORD)).texts["h2"]


def test_a_page_says_what_merging_and_overlapping_are_worth():
    record = record_of(dict.fromkeys(("sync", "batched", "prefetch"), (1.0, 1.0, 1.0)))
    record["times_ms"] = {"sync": [9.0] * 6, "batched": [5.0] * 6, "prefetch": [4.0] * 6}
    assert worth_of(record) in Reader(page_of(record)).texts["p"]


def test_the_bars_are_to_scale():
    read = Reader(page_of(RECORD))
    bars = [(bar["fill"], float(bar["width"].rstrip("%"))) for bar in read.all("rect")]
    assert [colour for colour, _ in bars] == [
        COLOURS[name] for name in ("sync", "prefetch", "none", "prepared")
    ]
    one = bars[-1][1]
    assert [width / one for _, width in bars] == pytest.approx([1.86, 1.01, 0.9, 1], abs=1e-3)
    lines = [line for line in read.all("line") if line["class"] == "interval" and line["x1"] != line["x2"]]
    ends = [float(line[end].rstrip("%")) / one for line in lines for end in ("x1", "x2")]
    assert ends == pytest.approx([1.8, 1.95, 0.98, 1.03, 0.8, 0.95], abs=1e-3)
    assert max(float(x.rstrip("%")) for line in lines for x in (line["x1"], line["x2"])) <= 100
    [drawing] = read.all("svg")
    assert drawing["role"] == "img"
    names = [name for attributes in (*read.all("title"), *read.all("desc")) if (name := attributes.get("id"))]
    assert drawing["aria-labelledby"].split() == names
    assert "sync: 1.860 [1.800, 1.950]; " in read.texts["desc"][0]


@pytest.mark.parametrize(
    "ratio",
    [(1.0, 1.0, 1.0), (0.5, -0.2, 0.9), (7.0, 6.0, 9.0), (40.0, 1.0, 2000.0), (1.004, 1.003, 1.005)],
)
def test_the_axis_holds_any_ratio(ratio):
    read = Reader(page_of(record_of({"sync": ratio})))
    marks = [float(text) for text in read.texts["text"][4:]]
    assert 2 <= len(marks) <= 7
    assert marks[0] == 0
    places = [value for line in read.all("line") for value in (line["x1"], line["x2"]) if value != "0"]
    assert all(0 <= float(place.rstrip("%")) <= 100 for place in places)


def test_a_page_needs_nothing_else():
    page = page_of(RECORD, PICTURE)
    read = Reader(page)
    assert not {"script", "link", "iframe", "object", "base", "a"} & {tag for tag, _ in read.elements}
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    [image] = read.all("img")
    kind, data = image.pop("src").split(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(data) == PICTURE.read_bytes()
    assert image["alt"].startswith("Timeline of a profile")
    page = page.replace(data, "")
    assert set(re.findall(r"\w+://[^\"]*", page)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, which nobody looks up
    assert not re.search(r"url\(|@import|src=\"(?!data:)|href", page)


def test_what_a_record_holds_is_escaped():
    bad = "<script>alert('x')</script> & \"quoted\" \udcff"
    record = record_of({**RATIOS, f"fast:{bad}": (1.0, 0.9, 1.1)})
    record["command"] = record["where"]["device"] = record["where"][bad] = record["settings"]["data"] = bad
    page = page_of(record)
    read = Reader(page)
    assert "<script" not in page
    assert not read.all("script")
    assert read.texts["code"] == [bad]
    assert bad in read.texts["dt"]
    assert any(bad in text for text in read.texts["title"])


def test_a_page_is_written_again_from_a_record(tmp_path, monkeypatch, capsys):
    path = write_record({**RECORD, "command": "a \udcff"}, tmp_path / "results.json")
    monkeypatch.setattr(sys, "argv", ["program", str(path), "--timeline", str(PICTURE), "--wide"])
    comparison_report.main()
    page = page_of({**RECORD, "command": "a \udcff"}, PICTURE)
    assert (tmp_path / "report.html").read_bytes() == page.encode(errors="xmlcharrefreplace")
    said = capsys.readouterr().out
    assert f"wrote {tmp_path}/report.html" in said.replace("\n", "")
    assert said.endswith(sentence_of(RECORD) + "\n")
    assert "efficiency" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none.json", "none.json"),
        ("other.json", "is not a record of a comparison: compare_modes writes results.json"),
        ("results.json --timeline picture.gif", "--timeline must be a .png or .svg, got picture.gif"),
        (
            "results.json --timeline none.png",
            "none.png is not a file: profiles/report.py --plot draws a timeline",
        ),
        ("results.json --out other.json", "out must be a folder"),
        ("", "record"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    write_record(RECORD, tmp_path / "results.json")
    write_record({"experiment": "soak"}, tmp_path / "other.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        comparison_report.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said, said


def test_wrong_bits_stand_out():
    page = Reader(page_of(record_of(RATIOS, wrong={"sync": ("rolls",)})))
    assert [p["class"] for p in page.all("p") if "sentence" in p["class"]] == ["sentence wrong"]
    assert sum(cell["class"] == "bad" for cell in page.all("td")) == 2  # NO, and DIFFERENT
    page = Reader(page_of(RECORD))
    assert [p["class"] for p in page.all("p") if "sentence" in p["class"]] == ["sentence"]


def test_gradients_are_shown_where_they_were_compared():
    record = record_of(RATIOS)
    text = page_of(record)
    assert "gradients" not in text
    for row in record["rows"].values():
        row["gradients_equal"] = True
    page = Reader(page_of(record))
    assert "schedulerollslossgradientslast loss" in page.texts["tr"]
    assert "syncequalequalequal5.12345" in page.texts["tr"]
    assert "nonetiming onlytiming onlytiming only5.12345" in page.texts["tr"]
    assert any(
        "all rolled tensors and all gradients on all ranks were compared" in p for p in page.texts["p"]
    )
    record["rows"]["sync"]["gradients_equal"] = False
    page = Reader(page_of(record))
    assert [p["class"] for p in page.all("p") if "sentence" in p["class"]] == ["sentence wrong"]
    assert "syncequalequalDIFFERENT5.12345" in page.texts["tr"]


def test_settings_that_are_0_are_shown_and_those_that_are_not_set_are_not():
    record = record_of(RATIOS)
    record["settings"] |= {"seed": 0, "profile": None, "compiled": False, "captured": True, "name": ""}
    read = Reader(page_of(record))
    facts = dict(zip(read.texts["dt"], read.texts["dd"], strict=True))
    assert (facts["seed"], facts["captured"]) == ("0", "yes")
    assert not {"profile", "compiled", "name"} & {*facts}


def test_a_record_of_a_sweep_has_a_page_of_its_own(tmp_path, monkeypatch):
    path = write_record(RECORD, tmp_path / "h4096-8-train.json")
    monkeypatch.setattr(sys, "argv", ["program", str(path)])
    comparison_report.main()
    assert (tmp_path / "h4096-8-train-report.html").read_text() == page_of(RECORD)


def test_every_record_of_the_results_has_a_page():
    for path in RESULTS.glob("*/*/*.json"):
        record = read_record(path)
        assert record is not None
        assert Reader(page_of(record)).texts["code"] == [record.get("command", "not recorded")]
