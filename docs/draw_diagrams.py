"""Draw the diagrams of the pages: `python docs/draw_diagrams.py` writes schedules.svg and zigzag.svg beside it."""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT, LEFT = 800, 386, 100  # pixels; time begins at LEFT
TRUNK, LOSS, MTP = 170, 40, 96  # durations, in pixels
MESSAGES, PITCH, MESSAGE = 12, 8, 24  # in sync, small messages of a depth; the length of a packed one
GREY = {"trunk": "#9aa1ab", "loss": "#d3d7dc", "MTP depth 1": "#b4bac3", "MTP depth 2": "#b4bac3"}
RED, WAIT, INK = "#d62728", "#fbe3e3", "#24292f"
RANKS = ["#4878a8", "#e0a03c", "#5a9a68", "#a0679c"]  # the colour of what a rank holds
CHUNK, HALO = 72, 9  # pixels of a chunk, and of one token of a halo
ROWS = [
    ("sync", "a small message per tensor, document and depth: compute waits for each", MESSAGES * PITCH),
    ("merged", "one message per depth: compute waits for each", MESSAGE),
    ("prefetch", "one message for all depths, sent while the trunk computes: nothing waits", 0),
]


def box(x: float, y: float, width: float, height: float, fill: str, rest: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" {rest}/>'


def text(x: float, y: float, words: str, rest: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {rest}>{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, rest: str = "") -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}" {rest}/>'


def row(name: str, words: str, wait: int, y: int) -> list[str]:
    """One schedule: a heading, the compute track, and below it the exchange track."""
    compute, exchange = y + 16, y + 50
    found = [text(16, y + 4, f'<tspan font-weight="bold" font-size="15">{name}</tspan>')]
    found += [text(LEFT, y + 4, words, 'font-size="13"')]
    found += [text(16, compute + 19, "compute"), text(16, exchange + 15, "exchange")]
    found += [box(LEFT, exchange, WIDTH - LEFT - 20, 22, "#f4f5f7")]
    x = LEFT
    for block in ("trunk", "loss", "MTP depth 1", "loss", "MTP depth 2", "loss"):
        if block.startswith("MTP") and wait:
            found += [box(x, compute, wait, 30, WAIT, f'stroke="{RED}" stroke-dasharray="3 3"')]
            if name == "sync":
                found += [text(x + wait / 2, compute + 19, "waits", f'text-anchor="middle" fill="{RED}"')]
                found += [box(x + PITCH * n + 1, exchange + 2, 5, 18, RED) for n in range(MESSAGES)]
            else:
                found += [box(x + 1, exchange + 2, wait - 2, 18, RED)]
            x += wait
        width = {"trunk": TRUNK, "loss": LOSS}.get(block, MTP)
        found += [box(x, compute, width, 30, GREY[block], 'stroke="white"')]
        found += [text(x + width / 2, compute + 19, block, 'text-anchor="middle"')]
        x += width
    if not wait:
        found += [box(LEFT + 45, exchange + 2, 1.5 * MESSAGE, 18, RED)]
        found += [
            text(LEFT + 45 + 1.5 * MESSAGE + 8, exchange + 15, "has arrived long before depth 1 needs it")
        ]
    return [*found, line(x, compute - 5, x, exchange + 26, 'stroke-width="2"')]


def draw_zigzag() -> str:
    """One document on four ranks: who holds which chunk, and which tokens it needs from whom at two depths."""
    chunks, height = 2 * len(RANKS), 264
    owners = [min(chunk, chunks - 1 - chunk) for chunk in range(chunks)]
    parts = [text(16, 24, "one document, cut into eight chunks", 'font-size="13"')]

    def draw_chunk(chunk: int, y: int) -> list[str]:
        x, rank = LEFT + CHUNK * chunk, owners[chunk]
        label = 'text-anchor="middle" fill="white" font-weight="bold"'
        return [
            box(x, y, CHUNK, 26, RANKS[rank], 'stroke="white"'),
            text(x + CHUNK / 2, y + 17, str(chunk), label),
        ]

    for chunk in range(chunks):
        parts += draw_chunk(chunk, 36)
    for rank in range(len(RANKS)):
        y = 84 + 34 * rank
        parts += [text(16, y + 17, f"rank {rank}"), box(LEFT, y, CHUNK * chunks, 26, "#f4f5f7")]
        for chunk in (rank, chunks - 1 - rank):
            parts += draw_chunk(chunk, y)
        for chunk in (rank, chunks - 1 - rank):
            if chunk + 1 < chunks and owners[chunk + 1] != rank:  # its own next chunk needs no message
                x, owner = LEFT + CHUNK * (chunk + 1), RANKS[owners[chunk + 1]]
                parts += [box(x + HALO * n, y, HALO, 26, owner, f'stroke="{RED}"') for n in range(2)]
    y = height - 24
    parts += [box(LEFT + HALO * n, y - 13, HALO, 16, RANKS[1], f'stroke="{RED}"') for n in range(2)]
    words = "the tokens that two depths need after a chunk, in the colour of the neighbour that holds them"
    return svg(height, "Zigzag chunks of one document on four ranks", [*parts, text(LEFT + 26, y, words)])


def svg(height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    style = f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}"'
    background = box(0, 0, WIDTH, height, "white", 'rx="6"')
    return "\n".join([f"{head} {style}>", f"<title>{title}</title>", background, *parts, "</svg>\n"])


def draw_schedules() -> str:
    ideal, bottom = LEFT + TRUNK + 3 * LOSS + 2 * MTP, HEIGHT - 56
    parts = [line(ideal, 34, ideal, bottom - 6, 'stroke-dasharray="4 4" opacity="0.5"')]
    for number, (name, words, wait) in enumerate(ROWS):
        parts += row(name, words, wait, 24 + 102 * number)
    parts += [line(LEFT, bottom, WIDTH - 22, bottom), text(16, bottom + 4, "time")]
    parts += [f'<path d="M {WIDTH - 20} {bottom} l -9 -4 v 8 z" fill="{INK}"/>']
    legend = [(GREY["trunk"], "", "forward pass of one rank"), (RED, "", "message to a neighbour")]
    legend += [
        (WAIT, f'stroke="{RED}" stroke-dasharray="3 3"', "compute waits"),
        (INK, "", "end of the forward pass"),
    ]
    for n, (fill, rest, words) in enumerate(legend):
        x, width = LEFT + (0, 190, 370, 496)[n], 2 if fill == INK else 16
        parts += [box(x + 16 - width, bottom + 24, width, 14, fill, rest), text(x + 22, bottom + 36, words)]
    return svg(HEIGHT, "When the exchange happens under sync, merged and prefetch", parts)


DIAGRAMS = {"schedules.svg": draw_schedules, "zigzag.svg": draw_zigzag}

if __name__ == "__main__":
    for name, draw in DIAGRAMS.items():
        Path(__file__).with_name(name).write_text(draw())
