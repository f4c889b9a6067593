"""The boundary exchange of multi-token prediction under context parallelism, hidden under compute."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overlap_mtp.device_layout import DeviceLayout
    from overlap_mtp.documents import pad_documents
    from overlap_mtp.layout import SequenceLayout
    from overlap_mtp.model.mtp import MultiTokenPrediction
    from overlap_mtp.reference import roll_reference
    from overlap_mtp.schedules import SCHEDULES, Roller, Rolls, make_roller
    from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES, make_activation_roller
    from overlap_mtp.schedules.prepared import prepare, prepared_name
    from overlap_mtp.schedules.sync import roll_tensor
else:  # a type checker would take any name for one that `__getattr__` knows

    def __getattr__(name: str) -> object:
        """Import a public name or a module when it is first asked for: `overlap_mtp.profiling` must not need torch."""
        if name in _MODULES:
            value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
            return value
        if find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "ACTIVATION_SCHEDULES",
    "SCHEDULES",
    "DeviceLayout",
    "MultiTokenPrediction",
    "Roller",
    "Rolls",
    "SequenceLayout",
    "make_activation_roller",
    "make_roller",
    "pad_documents",
    "prepare",
    "prepared_name",
    "roll_reference",
    "roll_tensor",
]

_MODULES = {
    "ACTIVATION_SCHEDULES": "schedules.activations",
    "SCHEDULES": "schedules",
    "DeviceLayout": "device_layout",
    "MultiTokenPrediction": "model.mtp",
    "Roller": "schedules",
    "Rolls": "schedules",
    "SequenceLayout": "layout",
    "make_activation_roller": "schedules.activations",
    "make_roller": "schedules",
    "pad_documents": "documents",
    "prepare": "schedules.prepared",
    "prepared_name": "schedules.prepared",
    "roll_reference": "reference",
    "roll_tensor": "schedules.sync",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
