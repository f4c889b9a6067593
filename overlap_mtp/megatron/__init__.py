"""Megatron-LM's own models, with the rolls of multi-token prediction prefetched. One line, before training:

    import overlap_mtp.megatron
    overlap_mtp.megatron.install()

Megatron-LM rolls each tensor of the MTP path when it needs it, by a blocking message for each depth and packed
document. All these tensors are known when the model's forward begins. `install` patches that entry: one exchange for
all depths leaves there and travels under the decoder. The rolls that come later are answered from it. What the exchange
does not know takes Megatron-LM's own path and is counted (`status`). Where Megatron-LM is right, results are equal to
the bit.

`python -m overlap_mtp.megatron pretrain_gpt.py ...` runs a script in this way, without a change to it.
"""

from overlap_mtp.megatron.install import install, uninstall
from overlap_mtp.megatron.settings import Settings, Status, close, reset_status, status

__all__ = ["Settings", "Status", "close", "install", "reset_status", "status", "uninstall"]
