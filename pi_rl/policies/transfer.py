"""Rows of host memory on their way to a GPU: a stream of its own and two pinned staging buffers."""

from collections.abc import Mapping

import torch
from torch import Tensor

_DIRECT_BYTES = 1 << 16  # from this size a pinned row is copied by itself, without passing a staging buffer


class Transfer:
    """Copies rows to a GPU while it computes.

    Large rows of pinned memory go straight to the GPU. Others are gathered in one of two staging buffers, which is
    written again only after the GPU has read it. What arrives is new memory of the GPU, never a buffer.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._staging: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._events = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0

    def send(self, rows: Mapping[str, Tensor], indices: Tensor) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        """Starts copies of some rows; may be called from any one thread at a time.

        Args:
            rows: (N, …) each, in host memory.
            indices: (n,) int64 on the CPU.

        Returns:
            (n, …) each, and the event after which they are there; see :meth:`receive`.
        """
        self._turn = 1 - self._turn
        event = self._events[self._turn]
        event.synchronize()  # the copies that read this staging buffer two calls ago
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            sent = {name: self._send(name, source, indices) for name, source in rows.items()}
            event.record(self._stream)
        return sent, event

    def receive(self, sent: dict[str, Tensor], event: torch.cuda.Event) -> dict[str, Tensor]:
        """Makes the caller's stream wait for the copies."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        for tensor in sent.values():
            tensor.record_stream(stream)
        return sent

    def finish(self) -> None:
        """Waits until no copy reads host memory any more."""
        self._stream.synchronize()

    def _send(self, name: str, source: Tensor, indices: Tensor) -> Tensor:
        shape = (len(indices), *source.shape[1:])
        target = torch.empty(shape, dtype=source.dtype, device=self.device)
        if len(indices) and source.is_pinned() and source[0].nbytes >= _DIRECT_BYTES:
            for place, index in enumerate(indices.tolist()):
                target[place].copy_(source[index], non_blocking=True)
            return target
        staging = self._staging[self._turn]
        if name not in staging or len(staging[name]) < len(indices):
            staging[name] = torch.empty(shape, dtype=source.dtype, pin_memory=True)
        gathered = staging[name][: len(indices)]
        torch.index_select(source, 0, indices, out=gathered)
        return target.copy_(gathered, non_blocking=True)
