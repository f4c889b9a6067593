"""Run a training script of Megatron-LM with the drop-in.

    torchrun --nproc-per-node 8 -m overlap_mtp.megatron pretrain_gpt.py ...

The environment variable OVERLAP_MTP_MEGATRON says how: "1", or nothing, installs with the default settings; "0" runs
the script as it is; "padding=megatron,transport=symmetric" are settings of `overlap_mtp.megatron.install`.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from dataclasses import fields
from pathlib import Path

from overlap_mtp.megatron import Settings, install, status

VARIABLE = "OVERLAP_MTP_MEGATRON"


def settings_from(text: str) -> dict[str, object] | None:
    """Read the value of the environment variable.

    Args:
        text: the value.

    Returns:
        The settings of `install`; None if it should not be installed.

    Raises:
        ValueError: if it is none of the values above.
    """
    if text.strip() in ("", "1"):
        return {}
    if text.strip() == "0":
        return None
    settings: dict[str, object] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ValueError(f'{VARIABLE} must be 0, 1 or "name=value,name=value", got {text!r}')
        settings[name] = int(value) if value.lstrip("-").isdigit() else value
    known = [one.name for one in fields(Settings)]
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(f"{VARIABLE} has no setting {unknown[0]!r}: the settings are {', '.join(known)}")
    return settings


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m overlap_mtp.megatron SCRIPT [its arguments]")
    sys.argv = sys.argv[1:]
    script = Path(sys.argv[0])
    if not script.is_file():
        sys.exit(f"{script} is not a file")
    sys.path[0] = str(script.resolve().parent)  # as `python SCRIPT` does; Megatron-LM may lie there
    try:
        settings = settings_from(os.environ.get(VARIABLE, ""))
        if settings is not None:
            install(**settings)  # type: ignore[arg-type]
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        sys.exit(f"overlap_mtp.megatron: {error}")
    if settings is not None and os.environ.get("RANK", "0") == "0":
        atexit.register(lambda: print(status(), file=sys.stderr))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
