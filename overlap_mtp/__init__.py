"""The boundary exchange of multi-token prediction under context parallelism, hidden under compute."""

from overlap_mtp.device_layout import DeviceLayout
from overlap_mtp.documents import pad_documents
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.mtp import MultiTokenPrediction
from overlap_mtp.reference import roll_reference
from overlap_mtp.schedules import SCHEDULES, Roller, Rolls, make_roller
from overlap_mtp.schedules.prepared import prepare, prepared_name
from overlap_mtp.schedules.sync import roll_tensor

__version__ = "0.1.0"

__all__ = [
    "SCHEDULES",
    "DeviceLayout",
    "MultiTokenPrediction",
    "Roller",
    "Rolls",
    "SequenceLayout",
    "make_roller",
    "pad_documents",
    "prepare",
    "prepared_name",
    "roll_reference",
    "roll_tensor",
]
