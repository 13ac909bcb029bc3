"""Counts what a computation would need: bytes alive on a device, and FLOPs, without doing it.

Under :class:`Meter` the project's own code runs on tensors that have a shape, a type and a device but no content
(PyTorch's fake tensors). Every storage that an operation makes is followed until it is freed, as a caching allocator
would, so that the plan of a model is the model's own code and cannot drift from it.
"""

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALLOCATION_UNIT = 512  # bytes; PyTorch's CUDA allocator rounds every tensor up to it
_aten = torch.ops.aten
_NUMBERS = re.compile(r"\.\d+")
_WRAPPERS = ("policy.policy.model.", "paligemma_with_expert.")
_ANSWER = "planned_answer"


@dataclass
class Live:
    """A storage that is alive at the peak.

    Attributes:
        label: Module that made it (or what it was registered as) and the operation.
        nbytes: Its size.
    """

    label: str
    nbytes: int


@dataclass
class Count:
    """What one phase needed.

    Attributes:
        flops: Floating-point operations of matrix products, convolutions and attention (2 per multiply-add).
        recomputed: The part of them that repeats a forward pass inside the backward pass.
        operations: Operations that made a tensor: about as many kernels as a GPU would be given.
        before: Bytes that were alive when the phase began.
        peak: Most bytes that were alive during it.
        after: Bytes that were alive when it ended.
        largest: The storages alive at the peak that the phase itself made, grouped by label, largest first.
    """

    flops: int = 0
    recomputed: int = 0
    operations: int = 0
    before: int = 0
    peak: int = 0
    after: int = 0
    largest: list[Live] = field(default_factory=list)

    @property
    def temporary(self) -> int:
        """Bytes that the phase needs beside what was there before it."""
        return self.peak - self.before


class Meter(TorchDispatchMode):
    """Follows storages on one device and adds up FLOPs, inside a ``FakeTensorMode`` or alone on real tensors.

    A fake tensor's content is unknown. Where the code asks for it, ``all()`` answers True and everything else 0, which
    is what the project's checks of their inputs expect.

    Args:
        device: Type of the device whose bytes are counted, "cuda" or "cpu".
        model: Its modules' names become labels.
        unit: Every storage is rounded up to a multiple of this many bytes.
    """

    def __init__(self, device: str, model: nn.Module | None = None, *, unit: int = 1) -> None:
        super().__init__()
        self.device_type, self.unit = device, unit
        self.live: int = 0
        self._names = {} if model is None else {id(part): _short(name) for name, part in model.named_modules()}
        self._stack: list[str] = []
        self._known: dict[int, int] = {}
        self._events: list[tuple[int, int, str]] = []
        self._flops = self._recomputed = self._operations = 0
        self._backward = False
        self._hooks = ExitStack()

    def __enter__(self) -> "Meter":
        self._hooks.callback(register_module_forward_pre_hook(self._enter_module).remove)
        self._hooks.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()
        super().__exit__(*exception)

    def register(self, tensors: Mapping[str, Tensor]) -> int:
        """Counts tensors that exist already, by name; returns the bytes that were new."""
        before = self.live
        for name, tensor in tensors.items():
            self._follow(tensor, name)
        return self.live - before

    @contextmanager
    def phase(self) -> Iterator[Count]:
        """Counts what happens in the block."""
        count = Count(before=self.live)
        first, flops, recomputed, operations = len(self._events), self._flops, self._recomputed, self._operations
        yield count
        count.flops, count.recomputed = self._flops - flops, self._recomputed - recomputed
        count.operations = self._operations - operations
        count.after = self.live
        count.peak, count.largest = self._peak(first, count.before)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Marks a backward pass: modules that run in it repeat a forward pass."""
        self._backward = True
        try:
            yield
        finally:
            self._backward = False

    def _peak(self, first: int, before: int) -> tuple[int, list[Live]]:
        """The most bytes alive since an event, and what had been made since then and was alive at that moment."""
        live = peak = before
        at = first
        for index in range(first, len(self._events)):
            live += self._events[index][1]
            if live > peak:
                peak, at = live, index + 1
        made: dict[int, Live] = {}
        for key, change, label in self._events[first:at]:
            if change > 0:
                made[key] = Live(label, change)
            else:
                made.pop(key, None)
        groups: dict[str, int] = {}
        for storage in made.values():
            label = _NUMBERS.sub(".*", storage.label)  # the same tensor of all layers is one entry
            groups[label] = groups.get(label, 0) + storage.nbytes
        ordered = sorted(groups.items(), key=lambda entry: -entry[1])
        return peak, [Live(label, nbytes) for label, nbytes in ordered]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _aten._local_scalar_dense.default and _unknown(args[0]):
            return getattr(args[0], _ANSWER, False if args[0].dtype == torch.bool else 0)
        if func is _aten.equal.default and any(map(_unknown, args)):
            return True
        output = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self._add_flops(flop_registry[packet](*args, **kwargs, out_val=output))
        if packet is _aten.all and isinstance(output, FakeTensor):
            setattr(output, _ANSWER, True)
        label = f"{self._stack[-1] if self._stack else ''} {packet.__name__}".strip()
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._follow(leaf, label)
        return output

    def _add_flops(self, flops: int) -> None:
        self._flops += flops
        if self._backward and self._stack:
            self._recomputed += flops

    def _follow(self, tensor: Tensor, label: str) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._operations += 1
        nbytes = -(-storage.nbytes() // self.unit) * self.unit
        self._known[key] = nbytes
        self._change(key, nbytes, label)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._change(key, -self._known.pop(key), "")

    def _change(self, key: int, nbytes: int, label: str) -> None:
        self.live += nbytes
        self._events.append((key, nbytes, label))

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        self._stack.append(self._names.get(id(module), type(module).__name__))

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._stack.pop()


def _short(name: str) -> str:
    """A module's name without what all names have."""
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def _unknown(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


@contextmanager
def gpu_attention() -> Iterator[None]:
    """Sends ``scaled_dot_product_attention`` to the kernel that a GPU would choose, whatever the fake device.

    With an additive or boolean mask that is the memory-efficient kernel; with grouped heads it is plain arithmetic,
    which keeps the matrix of weights. The name in PyTorch is replaced for the time of the block: a mode of functions
    would be off inside a backward pass, where checkpointed layers run again.
    """
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        attn_mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(dtype)
    if enable_gqa and query.shape[1] != key.shape[1]:
        return _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def planning(*, gpu: bool) -> Iterator[FakeTensorMode]:
    """Tensors without content.

    They pretend to be on the CPU: autograd does not run for a GPU that is not there. What a GPU would do otherwise is
    the attention kernel; the rest of the operations make the same tensors.

    Args:
        gpu: Choose the kernels of a GPU.

    Yields:
        The fake mode, for :func:`without_content`.
    """
    with ExitStack() as stack:
        if gpu:
            stack.enter_context(gpu_attention())
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def without_content(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces the parameters and buffers of a module by fake ones, in place.

    Args:
        module: Built on the meta device, or anywhere: only shapes, types and what trains are read.
        mode: Of :func:`planning`.
    """
    made: dict[int, Tensor] = {}  # a tensor under two names stays one

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = FakeTensor(mode, torch.empty_like(tensor, device="meta"), torch.device("cpu"))
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for part in module.modules():
        held: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
