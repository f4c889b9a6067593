"""The page of a comparison in a real browser: two widths, no error in the console, and two pages of paper."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from compare.page import write_page
from harness.plots import COLOURS

from comparison_records import record_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODES = (
    "sync",
    "merged",
    "merged:process_group",
    "overlap",
    "overlap:process_group",
    "prefetch",
    "prefetch:symmetric",
)
RECORD = record_of(
    {mode: (1.9 - at / 10, 1.8 - at / 10, 2.0 - at / 10) for at, mode in enumerate((*MODES, "none"))}
)
TIMELINE = Path(__file__).parents[2] / "profiles/h4096-packed.png"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


def browse(page: Path, *options: str) -> str:
    """Open a page and return what the browser logs."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={page.parent}/browser", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_page_fits_windows_of_two_widths(tmp_path):
    """In frames, because a window of the browser is at least 500 pixels wide."""
    import matplotlib.image

    page, picture = write_page(RECORD, tmp_path / "page.html", TIMELINE), tmp_path / "picture.png"
    ask = "<script>console.log(`${document.documentElement.scrollWidth} of ${innerWidth}`)</script></body>"
    page.write_text(page.read_text().replace("</body>", ask))
    style = "border: 0; height: 1000px; float: left; width:"
    frames = "".join(f'<iframe src="page.html" style="{style} {width}px"></iframe>' for width in (400, 1200))
    (tmp_path / "frames.html").write_text(f'<!DOCTYPE html><body style="margin: 0">{frames}</body>')
    said = browse(tmp_path / "frames.html", f"--screenshot={picture}", "--window-size=1600,1000")
    assert sorted(re.findall(r"CONSOLE.*\] \"(.*?)\"", said)) == ["1200 of 1200", "400 of 400"]
    pixels = (255 * matplotlib.image.imread(picture)[..., :3]).round().astype(int)
    assert pixels.shape == (1000, 1600, 3)
    for part in (pixels[:, :400], pixels[:, 400:]):
        seen = {tuple(one) for one in part[::2, ::2].reshape(-1, 3).tolist()}
        for mode in ("sync", "merged", "overlap"):
            assert tuple(bytes.fromhex(COLOURS[mode][1:])) in seen, mode


def test_a_page_prints_on_two_pages(tmp_path):
    page, paper = write_page(RECORD, tmp_path / "page.html", TIMELINE), tmp_path / "page.pdf"
    assert "CONSOLE" not in browse(page, "--no-pdf-header-footer", f"--print-to-pdf={paper}")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) <= 2
