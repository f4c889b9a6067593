"""The log of steps: one record a step, whatever happened to the run."""

from __future__ import annotations

import json

import pytest

from overlap_mtp.training.step_log import RunInProgressError, StepLog, read_records


def steps(path) -> list[int]:
    return [record["step"] for record in read_records(path)]


def test_a_restart_neither_repeats_nor_loses_a_step(tmp_path):
    path = tmp_path / "steps.jsonl"
    log = StepLog(path)
    for step in range(1, 8):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with path.open("a") as file:  # the run was killed here
        file.write('{"step": 8, "lo')
    log = StepLog(path, steps_done=5)
    for step in range(6, 10):
        log.write({"step": step, "loss": 2.0})
        log.sync()
    log.close()
    assert steps(path) == list(range(1, 10))
    assert [record["loss"] for record in read_records(path)] == 5 * [1.0] + 4 * [2.0]


def test_steps_that_the_file_lacks_are_counted(tmp_path):
    path = tmp_path / "steps.jsonl"
    log = StepLog(path)
    assert log.missing == 0
    for step in (1, 2, 4):
        log.write({"step": step})
    log.close()
    log = StepLog(path, steps_done=6)
    assert log.missing == 3
    log.close()


def test_one_process_at_a_time_writes(tmp_path):
    path = tmp_path / "steps.jsonl"
    log = StepLog(path)
    log.write({"step": 1})
    with pytest.raises(RunInProgressError, match="is being written by another process"):
        StepLog(path, steps_done=1)
    log.write({"step": 2})
    log.close()
    assert steps(path) == [1, 2]
    StepLog(path, steps_done=2).close()


def test_a_record_is_there_as_soon_as_it_is_written(tmp_path):
    log = StepLog(tmp_path / "run" / "steps.jsonl")
    log.write({"step": 1})
    assert steps(log.path) == [1]


def test_a_line_in_the_middle_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1}\n{"step"\n' + json.dumps({"step": 3}) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)
