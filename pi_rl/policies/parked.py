"""Weights that a checkpoint has and no computation uses: kept out of the way, and written back unchanged."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ParkedHead(nn.Module):
    """Stands for an unused linear layer without being one.

    Its weight appears in `state_dict()` and is taken from one by `load_state_dict`, but it is neither parameter nor
    buffer: no optimiser, distributed wrapper or `.to(device)` sees it, and it stays where the file put it (in host
    memory, or still on disk where the file is memory-mapped).

    Args:
        weight: The layer's weight, on the CPU or on the meta device.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.parked = weight.detach()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.parked

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        if name not in state_dict:
            missing_keys.append(name)
        elif state_dict[name].shape != self.parked.shape:
            error_msgs.append(f"{name}: shape {tuple(state_dict[name].shape)} instead of {tuple(self.parked.shape)}")
        else:
            given = state_dict[name].detach().to("cpu", self.parked.dtype)
            if self.parked.is_meta:
                self.parked = given
            elif not torch.equal(given, self.parked):  # else a checkpoint's file would stay mapped for nothing
                self.parked = given.clone()
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key != name)


def park_linear(owner: nn.Module, name: str) -> int:
    """Replaces an unused linear layer without bias by a `ParkedHead`.

    Args:
        owner: The module that has the layer.
        name: The layer's attribute.

    Returns:
        Bytes that no longer lie on the compute device.
    """
    layer = getattr(owner, name)
    if isinstance(layer, ParkedHead):
        return 0
    weight = layer.weight.detach()
    setattr(owner, name, ParkedHead(weight if weight.is_meta else weight.to("cpu", copy=False)))
    return weight.nbytes
