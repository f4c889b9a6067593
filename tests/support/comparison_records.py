"""Records of comparisons, made by hand."""

from __future__ import annotations

from typing import Any

Interval = tuple[float, float, float]  # value, low, high
ONE = (1.0, 1.0, 1.0)


def _estimate(one: Interval | None, unit: float = 1) -> dict[str, float] | None:
    return one and {part: unit * value for part, value in zip(("value", "low", "high"), one, strict=True)}


def record_of(
    ratios: dict[str, Interval],
    shares: dict[str, Interval] | None = None,
    wrong: dict[str, tuple[str, ...]] | None = None,
    scale: float = 1,
) -> dict[str, Any]:
    """Return a record of CPU ranks. Its baseline is its last row and takes 10 ms.

    Args:
        ratios: of each schedule to the baseline.
        shares: of the time that `sync` adds, how much each schedule hides.
        wrong: what of a schedule differs from the baseline: "rolls", "loss".
        scale: of all figures that have units.
    """
    rows, shares, wrong = {}, shares or {}, wrong or {}
    for mode, ratio in {**ratios, "prepared": ONE}.items():
        median_ms = 10 * scale * ratio[0]
        rows[mode] = {
            **{"median_ms": median_ms, "p10_ms": 0.9 * median_ms, "p90_ms": 1.1 * median_ms},
            "step_delta_us": _estimate(tuple(1e4 * scale * (value - 1) for value in ratio)),
            "ratio": _estimate(ratio),
            "efficiency": _estimate(shares.get(mode)),
            **{"tokens_per_s": 1e5 * scale, "host_us": 100.0 * scale},
            "stall_us": None if scale == 1 else _estimate((25.0, 20.0, 30.0), scale),
            **{"messages_per_step": 4.0 * scale, "bytes_per_step": 999.0 * scale, "loss": 5.12345},
            **{f"{what}_equal": what not in wrong.get(mode, ()) for what in ("rolls", "loss")},
        }
    return {
        "experiment": "compare_modes",
        "command": "python experiments/compare_modes.py --rounds 40",
        "where": {"date": "2026-11-27", "ranks": 2, "device": "CPU", "backend": "gloo", "torch": "2.13.0"},
        "transport": {mode: mode.partition(":")[2] for mode in rows},
        "settings": {
            "model": {"hidden_size": 64, "num_depths": 2},
            **{
                "seq_len": 512,
                "num_documents": 8,
                "forward_only": False,
                "rounds": 40,
                "data": "standard library",
            },
        },
        "rows": rows,
        "times_ms": {mode: [] for mode in rows},
    }
