"""What a comparison found, as one sentence that a person can repeat."""

from __future__ import annotations

from typing import Any

import numpy as np

from compare.columns import figure, stalls_of
from compare.comparison import ACTIVATIONS, SEED, TIMING_ONLY, TOKENS, Contest
from harness import statistics

WIDE = 0.4  # an interval wider than this part of the added time is given in place of its value
LEAST_ROUNDS = 6  # for an interval: with fewer, resampling them says too little
CLOSE = 0.05  # a ratio whose interval holds 1 and stays this close to it is as good as 1
SAVES_AT_LEAST = 0.9  # the least that the lower end of the saved share must be for "all of it"

Row = dict[str, Any]


def contest_in(result: dict[str, Any]) -> Contest:
    """Return what a record compares with what: `prepared` always runs among schedules of tokens."""
    return TOKENS if TOKENS.baseline in result["rows"] else ACTIVATIONS


def meaning_of(contest: Contest) -> str:
    """Return what the words of a sentence mean."""
    why = "whose loader rolls the batch" if contest is TOKENS else "whose rolls send nothing and are wrong"
    return (
        f"A step without any exchange is that of {contest.baseline}, {why}. Of the time that sync adds to it, "
        f"{contest.overlapped} saves a share, by merging messages and by sending early: it saves “all” if the 95 % "
        f"interval of this share begins at {100 * SAVES_AT_LEAST:.0f} % or above and reaches 100 %. If an interval is "
        "wide, its two ends are given."
    )


def sentence_of(result: dict[str, Any]) -> str:
    """Return what the record of a comparison says, in one sentence of up to three parts.

    1. What `sync` costs: the ratio of its step to the baseline's. If the ratio's 95 % interval holds 1, this part says
       that the difference is small (the interval is within `CLOSE` of 1) or that these rounds cannot tell. If the
       interval is wider than `WIDE` of the added time, it gives both ends.
    2. What `prefetch` (of activations: `overlap`) saves, if `sync` costs anything: its efficiency, which is the share
       of `sync`'s added time that its own step does not have. It saves "all of it" if the share's 95 % interval begins
       at `SAVES_AT_LEAST` or above and reaches 100 % (rounded to whole percent). If the interval begins at 0 or below,
       these rounds cannot tell. If it saves a share, but perhaps by its merged messages alone, this part says so: the
       steps of `batched` (of activations: `merged`) may be as short, as in `worth_of`.
    3. Whether all schedules computed the same bits: of rolls and loss, on CPU of gradients too. If not, this part comes
       first and names those that differ.

    With fewer than `LEAST_ROUNDS` rounds, it says so and then the third part. Without `sync`, the first part is about
    `prefetch`; without both, about the first schedule that ran. If a schedule ran over several transports, the first of
    them stands for it, and is named.

    Args:
        result: the record.
    """
    rows, contest = result["rows"], contest_in(result)
    compared = [mode for mode in rows if mode not in (contest.baseline, TIMING_ONLY)]
    if not compared:
        return f"No schedule ran that could be compared with {contest.baseline}."
    sync, early = _first(compared, "sync"), _first(compared, contest.overlapped)
    costs, rounds = sync or early or compared[0], result["settings"]["rounds"]
    parts = [_cost(costs, rows[costs]["ratio"], rounds)]
    if rounds < LEAST_ROUNDS:
        parts = [f"{rounds} rounds are too few to compare step times (--rounds {LEAST_ROUNDS} or more)"]
    elif sync is None:
        parts.append("sync did not run, so that nothing says what there is to save")
    elif early is None:
        parts.append(f"{contest.overlapped} did not run")
    elif rows[sync]["ratio"]["low"] > 1:
        parts.append(_share(early, rows[early]["efficiency"]) + _doubt(early, result))
    if wrong := wrong_bits(result):
        parts.insert(0, "WRONG BITS in " + ", ".join(f"{mode} ({what})" for mode, what in wrong.items()))
    else:
        parts.append(f"{'all' if len(compared) > 1 else 'both'} schedules computed the same bits")
    return "; ".join(parts) + "."


def wrong_bits(result: dict[str, Any]) -> dict[str, str]:
    """Return what differs from the reference in a record, by mode: rolls, loss, or (compared on CPU only) gradients."""
    found = {mode: _wrong(row) for mode, row in result["rows"].items() if mode != TIMING_ONLY}
    return {mode: what for mode, what in found.items() if what}


def worth_of(result: dict[str, Any]) -> str | None:
    """Return what merging the messages and what overlapping them is worth: the time that each saves of a step.

    Merging is the way from `sync` to `batched`, whose only message blocks as well, and overlapping that from there to
    `prefetch` over the same transport. Of activations they lead to `merged`, which has a message for each depth, and to
    `overlap`. Times are medians of the differences in the same rounds, with 95 % intervals.

    Args:
        result: the record.

    Returns:
        The sentences; None if one of the three did not run, if bits are wrong, or if there are fewer than
        `LEAST_ROUNDS` rounds.
    """
    contest, times, rows = contest_in(result), result["times_ms"], result["rows"]
    pairs = [  # over the same transport
        (mode, early)
        for mode in times
        if mode.partition(":")[0] == contest.merging
        and (early := mode.replace(contest.merging, contest.overlapped)) in times
    ]
    sync = _first(list(times), "sync")
    if sync is None or not pairs or len(times[sync]) < LEAST_ROUNDS:
        return None
    merged, early = pairs[0]
    if any(_wrong(rows[mode]) for mode in (sync, merged, early)):
        return None
    of_tokens = contest is TOKENS
    return (
        f"One blocking message for {'everything' if of_tokens else 'each depth'} ({merged}) in place of those of sync "
        f"{_saved(times[sync], times[merged])}. Sending {'it' if of_tokens else 'one for all depths'} early, so that "
        f"it travels under compute ({early}), then {_saved(times[merged], times[early])}. In brackets: 95 % intervals."
        + _stalls([stalls_of(rows[mode]) for mode in (sync, merged, early)], of_tokens)
    )


def _saved(before: list[float], after: list[float]) -> str:
    saved, verb = np.array(before) - np.array(after), "saves"
    found = statistics.median(saved, SEED)
    if found.high < 0:
        found, verb = statistics.median(-saved, SEED), "costs"
    most = max(abs(found.low), abs(found.high))
    value, low, high = (figure(one, most, digits=3) for one in (found.value, found.low, found.high))
    if found.low > 0:
        return f"{verb} {value} ms of this step [{low}, {high}]"
    return f"saves nothing that these rounds could tell [{low} ms, {high} ms]"


def _stalls(stalls: list[list[dict[str, float]]], of_tokens: bool) -> str:
    if {len(one) for one in stalls} not in ({1}, {2}):  # not measured
        return ""
    first, second, third = (f"{sum(part['value'] for part in one):,.0f} µs" for one in stalls)
    copies = (
        ""
        if of_tokens
        else ": the first two with the copies of the rolls, which the last one makes beside the compute"
    )
    return f" The three hold up the compute stream for {first}, {second} and {third}{copies}."


def _first(modes: list[str], schedule: str) -> str | None:
    """Return the first mode of a schedule, over whatever transport."""
    return next((mode for mode in modes if mode.partition(":")[0] == schedule), None)


def _cost(mode: str, ratio: dict[str, float], rounds: int) -> str:
    value, low, high = ratio["value"], ratio["low"], ratio["high"]
    without = "a step without any exchange"
    if low > 1:
        wide = high - low > WIDE * (value - 1)
        if value < 1.1:
            percent = f"between {100 * (low - 1):.1f} and {100 * (high - 1):.1f}"
            return f"{mode} makes this step {percent if wide else f'{100 * (value - 1):.1f}'} % longer than {without}"
        times = f"between {low:.2f} and {high:.2f}" if wide else f"{value:.2f}"
        return f"{mode} makes this step {times} times as long as {without}"
    if high < 1:
        return f"the step with {mode} is shorter than {without}, which its exchange cannot explain"
    if low >= 1 - CLOSE and high <= 1 + CLOSE:
        return f"{mode} adds at most {100 * (high - 1):.1f} % to {without}, perhaps nothing"
    return (
        f"these {rounds} rounds cannot tell whether {mode} makes this step longer than {without} "
        f"(between {low:.2f} and {high:.2f} times as long)"
    )


def _share(mode: str, share: dict[str, float] | None) -> str:
    if share is None:
        return f"the record does not say how much of it {mode} saves"
    value, low, high = (100 * share[part] for part in ("value", "low", "high"))
    if low >= 100 * SAVES_AT_LEAST and round(high) >= 100:
        return f"{mode} saves all of it"
    if high <= 0:
        return f"{mode} saves none of it"
    if low <= 0:
        return f"these rounds cannot tell how much of it {mode} saves"
    if round(high) >= 100:
        return f"{mode} saves at least {low:.0f} % of it"
    if high - low > 100 * WIDE:
        return f"{mode} saves between {low:.0f} and {high:.0f} % of it"
    return f"{mode} saves {value:.0f} % of it"


def _doubt(mode: str, result: dict[str, Any]) -> str:
    """Return what to add to a share that merging messages, without sending early, may save as well."""
    contest, times, share = contest_in(result), result["times_ms"], result["rows"][mode]["efficiency"]
    merged = times.get(mode.replace(contest.overlapped, contest.merging), [])
    if share is None or share["low"] <= 0 or len(merged) < LEAST_ROUNDS:
        return ""
    saved = statistics.median(np.array(merged) - np.array(times[mode]), SEED)
    return ", though sending early saves nothing that these rounds could tell" if saved.low <= 0 else ""


def _wrong(row: Row) -> str:
    return " and ".join(what for what in ("rolls", "loss", "gradients") if not row.get(f"{what}_equal", True))
