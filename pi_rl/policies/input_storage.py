"""Chooses where the inputs of the policy wait for the update, by what one observation really takes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi_rl.policies.flow_policy import Prefix
from pi_rl.policies.observation_store import ObservationStore
from pi_rl.policies.prefix_cache import PrefixStore
from pi_rl.policies.row_memory import TIERS
from pi_rl.policies.storage_budget import Budget, measure_budget

RECOMPUTE = "recompute"
STORAGES = ("auto", *TIERS, RECOMPUTE)


class InputStorage:
    """Opens the store of a run at its first observation.

    "auto" takes the first tier that holds an iteration's prefixes on every process: device, host, disk; where none
    does, and where prefixes are live, observations are kept and encoded again. Processes agree, for encoding in the
    update is a collective computation where the VLM is sharded.

    Args:
        storage: One of ``STORAGES``.
        live: Whether prefixes depend on trained weights.
        folder: Of the file of "disk"; None leaves that tier out.
        processes: Processes of this machine, which share its memory and disk.
        reserve: Bytes that the update will allocate on the device beside activations.
        agree: Elementwise maximum of a vector over all processes; None for one process.
        report: Called once with what was chosen and one line that says why.

    Raises:
        ValueError: If `storage` is unknown, or would keep prefixes that the next update makes wrong.
    """

    def __init__(
        self,
        storage: str = "device",
        *,
        live: bool = False,
        folder: str | Path | None = None,
        processes: int = 1,
        reserve: int = 0,
        agree: Callable[[Tensor], Tensor] | None = None,
        report: Callable[[str, str], None] | None = None,
    ):
        if storage not in STORAGES:
            raise ValueError(f"prefix_storage={storage!r} is unknown; use one of {', '.join(STORAGES)}.")
        if live and storage in TIERS:
            raise ValueError(
                f"prefix_storage={storage!r} keeps prefixes, and with a trained VLM (LoRA or train_vlm) every update "
                "makes the stored ones wrong; use auto or recompute, which keep observations and encode them again."
            )
        self.storage = storage
        self.live = live
        self.folder = None if folder is None else Path(folder)
        self.processes = processes
        self.reserve = reserve
        self._agree = agree or (lambda values: values)
        self._report = report

    def open(self, batch: Mapping[str, Any], prefix: Prefix, capacity: int) -> PrefixStore | ObservationStore:
        """An empty store for observations like these.

        Args:
            batch: Preprocessed observations, not empty.
            prefix: Their prefix.
            capacity: Observations of one iteration on this process.
        """
        if self.storage in TIERS and not self.live:
            return PrefixStore(self.storage, capacity=capacity, folder=self.folder)
        sizes = [bytes_per_observation(prefix), bytes_per_observation(batch)]
        budget = self._budget(prefix.pad_mask.device)
        tier, observations = self._choose([size * capacity for size in sizes], budget)
        if self._report is not None:
            size = sizes[0] if tier != RECOMPUTE else sizes[1]
            self._report(tier, choice_line(tier, observations, capacity, size, budget))
        if tier == RECOMPUTE:
            return ObservationStore(capacity, observations, folder=self.folder)
        return PrefixStore(tier, capacity=capacity, folder=self.folder)

    def _budget(self, device: torch.device) -> Budget:
        return measure_budget(device, self.folder or Path.cwd(), processes=self.processes, reserve=self.reserve)

    def _choose(self, demands: list[float], budget: Budget) -> tuple[str, str]:
        """(tier, tier of the observations), the first that every process has room for."""
        usable = TIERS if self.folder is not None else TIERS[:2]
        lacks = torch.tensor([[float(demand > budget.of(tier)) for tier in usable] for demand in demands])
        prefixes, observations = self._agree(lacks).tolist()
        kept_at = next((tier for tier, lack in zip(usable, observations, strict=True) if not lack), "host")
        if not self.live and self.storage != RECOMPUTE:
            for tier, lack in zip(usable, prefixes, strict=True):
                if not lack:
                    return tier, kept_at
        return RECOMPUTE, kept_at


def bytes_per_observation(inputs: Prefix | Mapping[str, Any]) -> int:
    """Bytes that a stored row takes: of a prefix, or of a preprocessed batch, images as bytes where that fits."""
    if isinstance(inputs, Prefix):
        return inputs.nbytes // len(inputs)
    probe = ObservationStore()
    rows = probe.append(inputs)
    return probe.nbytes // len(rows)


def choice_line(tier: str, observations: str, capacity: int, size: int, budget: Budget) -> str:
    """One line that says what was chosen, with the numbers behind it."""
    where = tier if tier != RECOMPUTE else f"{tier} (observations: {observations})"
    room = ", ".join(f"{name} {_amount(budget.of(name))}" for name in TIERS)
    total = f"{capacity:,} observations x {_amount(size)} = {_amount(capacity * size)}"
    return f"prefix store: {where}, {total}; room: {room}"


def _amount(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.3g} MB"
