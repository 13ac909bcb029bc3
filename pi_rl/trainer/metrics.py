"""Metrics of one iteration, reduced correctly over minibatches and processes."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

MAXIMA = ("policy/ratio_max", "policy/ratio_error_first")


class MetricStore:
    """Collects weighted means and maxima until they are logged.

    A mean is kept as (sum of value x weight, sum of weights), so unequal minibatches and processes weigh as they
    should; names in ``MAXIMA`` are reduced by the maximum. Values stay on a GPU until :meth:`drain`, for reading
    one would wait for it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, float]] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float], weight: float) -> None:
        """Adds one minibatch's values.

        Args:
            values: Scalars by name.
            weight: Number of samples they are the mean of; with 0 only the names count, which have to be the same on
                all processes.
        """
        for name, value in values.items():
            scalar = torch.as_tensor(value).detach()
            scalar = (scalar if scalar.is_cuda else scalar.cpu()).double()
            if name in MAXIMA:
                scalar = scalar if weight else torch.full_like(scalar, -torch.inf)
                known = self._maxima.get(name, scalar)
                self._maxima[name] = torch.maximum(known, scalar)
            else:
                total, weights = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + scalar * weight, weights + weight)

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Reduces over all processes and forgets; every process must have added the same names."""
        reduced: dict[str, float] = {}
        if self._sums:
            names = sorted(self._sums)
            totals = torch.stack([self._sums[name][0].cpu() for name in names])
            weights = torch.tensor([self._sums[name][1] for name in names], dtype=torch.float64)
            pairs = all_reduce(accelerator, torch.stack([totals, weights], 1), "sum")
            reduced.update({name: float(pair[0] / pair[1]) for name, pair in zip(names, pairs, strict=True)})
        if self._maxima:
            names = sorted(self._maxima)
            peaks = all_reduce(accelerator, torch.stack([self._maxima[name].cpu() for name in names]), "max")
            reduced.update({name: float(peak) for name, peak in zip(names, peaks, strict=True)})
        self._sums, self._maxima = {}, {}
        return reduced


def all_reduce(accelerator: Accelerator, values: Tensor, operation: str) -> Tensor:
    """Sum or maximum of a tensor over all processes, reduced on the accelerator's device.

    Args:
        accelerator: Knows the processes.
        values: Any shape; the same on every process.
        operation: "sum" or "max".
    """
    if accelerator.num_processes == 1:
        return values
    moved = values.to(accelerator.device)
    reduced = moved.clone()
    reduce_op = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}[operation]
    torch.distributed.all_reduce(reduced, op=reduce_op)
    return reduced.to(values.device)
