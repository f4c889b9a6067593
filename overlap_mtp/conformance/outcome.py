"""What came of a case: on one rank, and on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Result = Literal["right", "wrong", "refused", "hung", "crashed"]
RESULTS: tuple[Result, ...] = get_args(Result)
SHOWN = 6  # positions listed in a report
LEFT_OVER = "all values are right, but afterwards a message is left unread or a receive is still open"

# The point in a case where something was found: batch and depth. Ranks report the same points.
Step = tuple[int, int]


@dataclass(frozen=True)
class Difference:
    """Where a rank's rolled tensor of one batch and depth is not the reference's."""

    cp_rank: int
    row: int
    position: int  # in the full sequence
    expected: float | bool
    actual: float | bool
    positions: tuple[int, ...]  # the first that are wrong, in any row
    num_positions: int  # that are wrong, in any row
    num_wrong: int  # tokens
    num_tokens: int  # that were compared


@dataclass(frozen=True)
class RankResult:
    """What one rank saw of a case.

    `lost` says that this rank did not finish: its worker waited too long ("hung") or ended ("crashed").
    """

    cp_rank: int
    differences: dict[Step, Difference] = field(default_factory=dict)
    # Other than values: dtype, shape, a changed input, a sum.
    faults: dict[Step, str] = field(default_factory=dict)
    error: str = ""  # the exception that the roll raised
    lost: Literal["", "hung", "crashed"] = ""
    waited: bool = False  # it hung, but only after another rank had already failed
    text: str = ""  # how the worker ended
    is_in_step: bool = True  # whether the process group still carries messages as it should


@dataclass
class Outcome:
    """What came of a case on all ranks.

    `positions` are the wrong ones at the first wrong depth of the first wrong batch, at most six; `row`, `position`,
    `expected` and `actual` tell of the first of them in global order.
    """

    case: str
    result: Result
    detail: str = ""
    batch: int | None = None
    depth: int | None = None
    cp_rank: int | None = None
    row: int | None = None
    position: int | None = None
    expected: float | bool | None = None
    actual: float | bool | None = None
    positions: tuple[int, ...] = ()
    num_wrong: int = 0
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        return self.result == "right"

    def as_dict(self) -> dict[str, Any]:
        """The fields for a JSON file. Infinities become text, which JSON has no number for."""
        record = dict(vars(self), positions=list(self.positions))
        for name in ("expected", "actual"):
            value = record[name]
            if isinstance(value, float) and value - value != 0:
                record[name] = str(value)
        return record


def outcome_of(case: str, results: Sequence[RankResult]) -> Outcome:
    """Put together what the ranks saw of a case.

    Args:
        case: its name.
        results: of all ranks.

    Returns:
        The outcome. A crash says more than an exception, and that more than a rank that waited for the one that raised
        it; then come differences, those of the first batch and depth first.
    """
    crashed = [one for one in results if one.lost == "crashed"]
    if crashed:
        return Outcome(case, "crashed", f"{_on(crashed, results)}: {crashed[0].text}")
    refused = [one for one in results if one.error]
    hung = [one for one in results if one.lost == "hung"]
    if refused and all(one.waited for one in hung):
        waiting = ", and others waited for it" if hung else ""
        return Outcome(case, "refused", f"{_on(refused, results)}{waiting}: {refused[0].error}")
    if hung:
        return Outcome(case, "hung", _on(hung, results))
    steps = sorted({step for one in results for step in (*one.differences, *one.faults)})
    if steps:
        return _wrong(case, results, steps[0])
    astray = [one for one in results if not one.is_in_step]
    return (
        Outcome(case, "wrong", f"{LEFT_OVER}, {_on(astray, results)}") if astray else Outcome(case, "right")
    )


def _wrong(case: str, results: Sequence[RankResult], step: Step) -> Outcome:
    batch, depth = step
    where = f"depth {depth}" + f", batch {batch + 1}" * bool(batch)
    faults = [(one.cp_rank, one.faults[step]) for one in results if step in one.faults]
    differences = [one.differences[step] for one in results if step in one.differences]
    if not differences:
        cp_rank, text = faults[0]
        return Outcome(case, "wrong", f"{where}, rank {cp_rank}: {text}", batch, depth, cp_rank)
    first = min(differences, key=lambda one: (one.position, one.row))
    positions = tuple(sorted({at for one in differences for at in one.positions}))[:SHOWN]
    num_wrong = sum(one.num_wrong for one in differences)
    is_cut = sum(one.num_positions for one in differences) > len(positions)
    listed = " ".join(map(str, positions)) + " ..." * is_cut
    detail = (
        f"{where}: {num_wrong} of {first.num_tokens * len(results)} tokens, at {listed}; first on rank "
        f"{first.cp_rank}, row {first.row}, position {first.position}: expected {first.expected}, got {first.actual}"
    )
    if faults:
        detail += f"; and {faults[0][1]}"
    return Outcome(
        *(case, "wrong", detail, batch, depth, first.cp_rank, first.row, first.position),
        *(first.expected, first.actual, positions, num_wrong),
    )


def _on(some: Sequence[RankResult], everyone: Sequence[RankResult]) -> str:
    if len(some) == len(everyone):
        return "on all ranks"
    return f"on {'rank' if len(some) == 1 else 'ranks'} {', '.join(str(one.cp_rank) for one in some)}"
