"""What a comparison's sentence says of costs, hidden shares and bits, and what it does not dare to say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compare.sentence import sentence_of, worth_of, wrong_bits

from comparison_records import record_of

RESULTS = Path(__file__).parents[2] / "experiments/results/step_time"
SYNC = {"sync": (1.86, 1.8, 1.95)}
PREFETCH = {"prefetch": (1.01, 0.98, 1.03)}
ALL = {"prefetch": (0.99, 0.95, 1.02)}
WITHOUT = "a step without any exchange"
SAME = "all schedules computed the same bits."


def test_the_sentence_to_repeat():
    assert sentence_of(record_of(SYNC | PREFETCH, ALL)) == (
        f"sync makes this step 1.86 times as long as {WITHOUT}; prefetch saves all of it; {SAME}"
    )


def test_few_rounds_say_nothing_of_times():
    record = record_of(SYNC | PREFETCH, ALL)
    record["settings"]["rounds"] = 5
    assert sentence_of(record) == (f"5 rounds are too few to compare step times (--rounds 6 or more); {SAME}")
    record["settings"]["rounds"] = 6
    assert sentence_of(record).startswith("sync makes this step 1.86 times")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((1.86, 1.7, 2.04), f"sync makes this step 1.86 times as long as {WITHOUT}"),
        ((1.86, 1.68, 2.04), f"sync makes this step between 1.68 and 2.04 times as long as {WITHOUT}"),
        ((1.9, 1.001, 9.0), f"sync makes this step between 1.00 and 9.00 times as long as {WITHOUT}"),
        ((1.05, 1.045, 1.055), f"sync makes this step 5.0 % longer than {WITHOUT}"),
        ((1.05, 1.001, 1.09), f"sync makes this step between 0.1 and 9.0 % longer than {WITHOUT}"),
        ((1.0, 0.95, 1.05), f"sync adds at most 5.0 % to {WITHOUT}, perhaps nothing"),
        ((1.002, 1.0, 1.004), f"sync adds at most 0.4 % to {WITHOUT}, perhaps nothing"),
        (
            (0.9, 0.8, 0.99),
            f"the step with sync is shorter than {WITHOUT}, which its exchange cannot explain",
        ),
        (
            (1.2, 0.94, 1.5),
            f"these 40 rounds cannot tell whether sync makes this step longer than {WITHOUT} "
            "(between 0.94 and 1.50 times as long)",
        ),
        (
            (1.2, 1.0, 1.5),
            f"these 40 rounds cannot tell whether sync makes this step longer than {WITHOUT} "
            "(between 1.00 and 1.50 times as long)",
        ),
    ],
)
def test_what_sync_costs(ratio, words):
    found = sentence_of(record_of({"sync": ratio} | PREFETCH, ALL))
    hidden = "; prefetch saves all of it" if ratio[1] > 1 else ""
    assert found == f"{words}{hidden}; {SAME}"


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ((0.97, 0.9, 1.0), "prefetch saves all of it"),
        ((0.98, 0.97, 0.996), "prefetch saves all of it"),
        ((1.1, 1.02, 1.2), "prefetch saves all of it"),
        ((0.98, 0.97, 0.99), "prefetch saves 98 % of it"),
        ((0.97, 0.89, 1.0), "prefetch saves at least 89 % of it"),
        ((0.6, 0.5, 0.7), "prefetch saves 60 % of it"),
        ((0.5, 0.2, 0.7), "prefetch saves between 20 and 70 % of it"),
        ((0.4, 0.1, 1.3), "prefetch saves at least 10 % of it"),
        ((0.3, -0.1, 0.8), "these rounds cannot tell how much of it prefetch saves"),
        ((0.3, 0.0, 1.8), "these rounds cannot tell how much of it prefetch saves"),
        ((-0.5, -0.9, -0.1), "prefetch saves none of it"),
        (None, "the record does not say how much of it prefetch saves"),
    ],
)
def test_what_prefetch_saves(share, words):
    assert sentence_of(record_of(SYNC | PREFETCH, {"prefetch": share})).split("; ")[1] == words


DOUBT = ", though sending early saves nothing that these rounds could tell"


@pytest.mark.parametrize(
    ("merged_ms", "share", "doubt"),
    [
        ([4.5, 5.5] * 4, ALL["prefetch"], DOUBT),  # around prefetch
        ([4.0] * 8, ALL["prefetch"], DOUBT),  # shorter than prefetch
        ([6.0] * 8, ALL["prefetch"], ""),
        ([5.0] * 5, ALL["prefetch"], ""),  # too few rounds
        ([5.0] * 8, (0.3, -0.1, 0.8), ""),  # perhaps there is nothing that merging could save
        ([5.0] * 8, None, ""),
    ],
)
def test_the_sentence_and_the_worth_agree_on_sending_early(merged_ms, share, doubt):
    modes = SYNC | {"batched": (1.01, 0.98, 1.03)} | PREFETCH
    record = record_of(modes, {"prefetch": share})
    rounds = len(merged_ms)
    record["times_ms"] |= {"sync": [9.0] * rounds, "batched": merged_ms, "prefetch": [5.0] * rounds}
    said = sentence_of(record).split("; ")[1]
    assert (DOUBT in said) == bool(doubt)
    assert said.endswith(doubt)
    if doubt:
        assert " saves nothing that these rounds" in str(worth_of(record)) or "costs" in str(worth_of(record))


def test_gradients_that_differ_are_said_first():
    record = record_of(SYNC | PREFETCH, ALL)
    record["rows"]["prefetch"]["gradients_equal"] = False
    assert wrong_bits(record) == {"prefetch": "gradients"}
    assert sentence_of(record).startswith("WRONG BITS in prefetch (gradients); ")


def test_bits_that_differ_are_said_first():
    rows, wrong = (
        SYNC | {"overlap": (1.0, 0.9, 1.1)} | PREFETCH,
        {"overlap": ("loss",), "sync": ("rolls", "loss")},
    )
    found = sentence_of(record_of(rows, ALL, wrong))
    assert found == (
        f"WRONG BITS in sync (rolls and loss), overlap (loss); sync makes this step 1.86 times as long as {WITHOUT}; "
        "prefetch saves all of it."
    )
    assert sentence_of(record_of(rows, ALL, {"prepared": ("rolls",)})).startswith(
        "WRONG BITS in prepared (rolls); "
    )
    rows |= {"none": (0.9, 0.8, 0.95)}  # rolls wrong tokens, as it should
    assert sentence_of(record_of(rows, ALL, {"none": ("rolls", "loss")})).endswith(SAME)


def test_schedules_that_did_not_run():
    assert sentence_of(record_of(SYNC)) == (
        f"sync makes this step 1.86 times as long as {WITHOUT}; prefetch did not run; "
        "both schedules computed the same bits."
    )
    no_sync = "sync did not run, so that nothing says what there is to save"
    assert sentence_of(record_of({"merged": (2.0, 1.9, 2.1)} | PREFETCH)) == (
        f"prefetch adds at most 3.0 % to {WITHOUT}, perhaps nothing; {no_sync}; {SAME}"
    )
    assert sentence_of(record_of({"merged": (2.0, 1.9, 2.1)})) == (
        f"merged makes this step 2.00 times as long as {WITHOUT}; {no_sync}; both schedules computed the same bits."
    )
    for alone in ({}, {"none": (1.0, 1.0, 1.0)}):
        assert sentence_of(record_of(alone)) == "No schedule ran that could be compared with prepared."


def test_the_first_transport_stands_for_its_schedule_and_is_named():
    modes = ("prefetch:process_group", "prefetch:symmetric")
    record = record_of(SYNC | dict.fromkeys(modes, PREFETCH["prefetch"]), {modes[0]: ALL["prefetch"]})
    assert "; prefetch:process_group saves all of it; " in sentence_of(record)
    record = record_of({"sync:process_group": (1.86, 1.8, 1.95)} | PREFETCH, ALL)
    assert sentence_of(record).startswith("sync:process_group makes this step 1.86 times")


def test_every_record_of_the_results_has_a_sentence():
    paths = list(RESULTS.glob("*/*/*.json"))
    for path in paths:
        sentence = sentence_of(json.loads(path.read_text()))
        assert sentence.endswith((SAME, SAME.replace("all", "both"))), path
        assert ". " not in sentence, path
    assert len(paths) > 30


def timed(modes: dict[str, list[float]], baseline: str = "prepared") -> dict:
    """A record of these step times, in ms."""
    record = record_of(dict.fromkeys(modes, (1.0, 1.0, 1.0)))
    if baseline != "prepared":
        record["rows"][baseline] = record["rows"].pop("prepared")
    record["times_ms"] = modes
    return record


def test_what_merging_and_overlapping_are_each_worth():
    ones = [float(n) for n in range(8)]  # rounds differ by more than the schedules do
    slow, merged, early = (
        [ms + one for one, ms in zip(ones, column, strict=True)]
        for column in ([30.0] * 8, [20.0] * 8, [19.5, 20.5] * 4)
    )
    modes = {"sync": slow, "batched:process_group": merged, "prefetch": slow, "prefetch:process_group": early}
    assert worth_of(timed(modes)) == (
        "One blocking message for everything (batched:process_group) in place of those of sync saves 10.0 ms of this "
        "step [10.0, 10.0]. Sending it early, so that it travels under compute (prefetch:process_group), then saves "
        "nothing that these rounds could tell [-0.50 ms, 0.50 ms]. In brackets: 95 % intervals."
    )
    modes["prefetch:process_group"] = slow
    words = worth_of(timed(modes))
    assert words is not None
    assert "(prefetch:process_group), then costs 10.0 ms of this step [10.0, 10.0]" in words


def test_stalls_say_more_than_steps_where_they_were_measured():
    modes = {"sync": [9.0] * 6, "merged": [5.0] * 6, "overlap": [4.0] * 6}
    record = timed(modes, baseline="none")
    for mode, forward, backward in (("sync", 9000.4, 1000.0), ("merged", 90.0, 80.0), ("overlap", 20.0, 1.0)):
        record["rows"][mode]["stall_us"] = {"value": forward}
        record["rows"][mode]["backward_stall_us"] = {"value": backward}
    assert str(worth_of(record)).endswith(
        "for 10,000 µs, 170 µs and 21 µs: the first two with the copies of the rolls, which the last one makes beside "
        "the compute."
    )
    record["rows"]["merged"] |= {"stall_us": None, "backward_stall_us": None}
    assert str(worth_of(record)).endswith("In brackets: 95 % intervals.")


def test_worth_is_that_of_one_transport_and_of_right_bits():
    modes = {mode: [9.0] * 6 for mode in ("sync", "batched", "batched:process_group", "prefetch:symmetric")}
    assert worth_of(timed(modes)) is None
    modes["prefetch:process_group"] = [9.0] * 6
    assert "(batched:process_group)" in str(worth_of(timed(modes)))
    record = timed({mode: [9.0] * 6 for mode in ("sync", "batched", "prefetch")})
    assert worth_of(record) is not None
    record["rows"]["prefetch"]["rolls_equal"] = False
    assert worth_of(record) is None


def test_activations_are_merged_and_overlapped_by_other_schedules():
    modes = {"sync": [9.0] * 6, "merged": [5.0] * 6, "overlap": [4.0] * 6}
    words = worth_of(timed(modes, baseline="none"))
    assert words is not None
    assert (
        "One blocking message for each depth (merged) in place of those of sync saves 4.00 ms of this step"
        in words
    )
    assert (
        "Sending one for all depths early, so that it travels under compute (overlap), then saves 1.00 ms"
        in words
    )
    assert worth_of(timed(modes)) is None  # of tokens: batched and prefetch did not run


@pytest.mark.parametrize("missing", ["sync", "batched", "prefetch"])
def test_without_one_of_the_three_nothing_is_said_of_their_worth(missing):
    modes = {mode: [9.0] * 6 for mode in ("sync", "batched", "prefetch") if mode != missing}
    assert worth_of(timed(modes)) is None


def test_few_rounds_say_nothing_of_worth():
    modes = ("sync", "batched", "prefetch")
    assert worth_of(timed({mode: [9.0] * 5 for mode in modes})) is None
    assert worth_of(timed({mode: [9.0] * 6 for mode in modes})) is not None
