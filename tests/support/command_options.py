"""The commands of experiments/ and the dataclasses of their options."""

from __future__ import annotations

import compare_modes
import comparison_report
import golden
import megatron_step
import megatron_tests
import parity
import roll_latency
import scaling_model
import soak
import sweep

from training.settings import RunSettings

OPTIONS = {
    "compare_modes": compare_modes.Options,
    "comparison_report": comparison_report.Options,
    "sweep": sweep.Options,
    "roll_latency": roll_latency.Options,
    "soak": soak.Options,
    "parity": parity.Options,
    "golden": golden.Options,
    "megatron_step": megatron_step.Options,
    "megatron_tests": megatron_tests.Options,
    "scaling_model": scaling_model.Options,
    "train": RunSettings,
}
