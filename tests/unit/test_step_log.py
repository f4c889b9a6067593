"""The log has one record per step, whatever happened to the run."""

from __future__ import annotations

import shutil

import pytest

from overlap_mtp.training.step_log import RunInProgressError, StepLog, read_records


def test_a_restart_neither_repeats_nor_loses_a_step(tmp_path):
    path = tmp_path / "run" / "steps.jsonl"
    log = StepLog(path)
    for step in range(1, 7):
        log.write({"step": step, "loss": 1.0})
        assert read_records(path)[-1]["step"] == step, "a record is there as soon as it is written"
    with pytest.raises(RunInProgressError, match="is being written by another process"):
        StepLog(path, steps_done=1)
    log.write({"step": 7, "loss": 1.0})
    log.close()
    with path.open("a") as file:  # the run was killed here
        file.write('{"step": 8, "lo')
    log = StepLog(path, steps_done=5)
    for step in range(6, 10):
        log.write({"step": step, "loss": 2.0})
        log.sync()
    log.close()
    losses = [(record["step"], record["loss"]) for record in read_records(path)]
    assert losses == [(step, 1.0 if step <= 5 else 2.0) for step in range(1, 10)]


def test_steps_that_the_file_lacks_are_counted(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 4}\n')
    for steps_done, missing in ((6, 3), (0, 0)):
        log = StepLog(path, steps_done)
        assert log.missing == missing
        log.close()


def test_a_line_in_the_middle_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)


def test_a_log_that_is_deleted_under_a_run_goes_on(tmp_path):
    log = StepLog(tmp_path / "run" / "steps.jsonl")
    log.write({"step": 1})
    shutil.rmtree(tmp_path / "run")
    log.write({"step": 2})
    log.write({"step": 3})
    log.close()
    assert [one["step"] for one in read_records(log.path)] == [2, 3]
    assert log.missing == 1
