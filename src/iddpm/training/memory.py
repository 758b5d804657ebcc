"""The storages that an operation makes and lets go, watched: how many bytes are alive in a step, and what for."""

import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

IMAGES = 1_000_003  # in the batch that is watched: a prime, so that only what grows with the images is divisible by it
# What a storage is for; buffers: FSDP's gathered weights and what it sends; copies: a kernel's own, gone when it is done.
ACTIVATION, GRADIENT, BUFFER, COPY = range(4)

# Operations as torch's FlopCounterMode counts them. That itself would keep activations that are to be recomputed, so only its
# formulas are used here; it has none for the CPU's attention.
ATEN = torch.ops.aten
FLOPS = flop_registry | {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*(x.shape for x in qkv[:3])),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda *gqkv, **_: sdpa_backward_flop_count(
        *(x.shape for x in gqkv[:4])
    ),
}
CONVOLUTION, CONVOLUTION_BACKWARD = ATEN.convolution.default, ATEN.convolution_backward.default


class Live(TorchDispatchMode):
    """Notes each storage that an operation makes, changes in size, or lets go: (number, bytes).

    With `copies`, also what a CPU's convolutions (oneDNN) take for themselves: all they read or write once more, as blocks.
    """

    def __init__(self, copies: bool = False) -> None:
        super().__init__()
        self.copies = copies
        self.events: list[tuple[int, int]] = []
        self.parts: list[int] = []  # of each storage, by its number
        self.calls: list[tuple[str, int]] = []  # collective operations, and the bytes of the largest tensor in each
        self.flops = 0
        self._known: dict[int, tuple[int, weakref.ref]] = {}
        self._sizes: list[int] = []

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Do not count what was there before."""
        for t in tensors:
            storage = _local(t).untyped_storage()
            self._known[storage._cdata] = (-1, weakref.ref(storage))

    def number(self, t: Tensor) -> int:
        """The number of a tensor's storage."""
        return self._known[_local(t).untyped_storage()._cdata][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        part = BUFFER if func is ATEN.empty.memory_format else ACTIVATION  # our networks make no empty tensors
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._note(t.untyped_storage(), part)
        if self.copies and func in (CONVOLUTION, CONVOLUTION_BACKWARD):
            image, result, weight = (args[0], out, args[1]) if func is CONVOLUTION else args[:3]
            if math.prod(weight.shape[2:]) > 1:  # of one pixel they are matrix products
                self._copy(image.nbytes + result.nbytes)
                self._copy(weight.nbytes)  # apart, since it does not grow with the images
        if count := FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        if func.namespace == "c10d":
            sizes = [t.untyped_storage().nbytes() for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
            self.calls.append((func._opname, max(sizes)))
        return out

    def _note(self, storage: torch.UntypedStorage, part: int) -> None:
        key = storage._cdata
        if key not in self._known:
            number, size = len(self.parts), storage.nbytes()
            self._known[key] = (number, weakref.ref(storage, lambda _: self._gone(key)))
            self.parts.append(part)
            self._sizes.append(size)
            self.events.append((number, size))

    def _copy(self, size: int) -> None:
        self.events += [(len(self.parts), size), (len(self.parts), -size)]
        self.parts.append(COPY)
        self._sizes.append(0)

    def _gone(self, key: int) -> None:
        number, _ = self._known.pop(key)
        if number >= 0:
            self.events.append((number, -self._sizes[number]))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        self._note(storage, BUFFER)
        number, size = self._known[storage._cdata][0], storage.nbytes()
        self.events.append((number, size - self._sizes[number]))
        self._sizes[number], self.parts[number] = size, BUFFER

    def profile(self) -> "Profile":
        """All that happened, by what grows with the images."""
        number, size = np.array(self.events, dtype=np.int64).T
        grows = size % IMAGES == 0
        return Profile(np.where(grows, 0, size), np.where(grows, size // IMAGES, 0), np.array(self.parts)[number])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what happens meanwhile. FSDP frees and restores weights by resizing their storages, past any dispatch."""
        resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            self._resized(storage)
            return out

        gc.disable()  # a collection would let cycles go at any moment
        torch.UntypedStorage.resize_ = noted  # type: ignore
        try:
            with self:
                yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore
            gc.enable()


def _local(t: Tensor) -> Tensor:
    """The part of a sharded tensor that is here; `to_local` would be an operation, and noted."""
    return getattr(t, "_local_tensor", t)


class Profile(NamedTuple):
    """The storages of a forward and backward pass, event by event."""

    constant: np.ndarray  # (events,) bytes
    each: np.ndarray  # (events,) bytes for each image
    part: np.ndarray  # (events,)

    def first_pass(self, images: int) -> int:
        """The most bytes at once in a pass that begins without gradients."""
        return int(np.cumsum(self.constant + self.each * images).max())

    def later_pass(self, images: int) -> int:
        """The most bytes at once where gradients are there from the start: each new one is added to them, then let go."""
        change, gradient = self.constant + self.each * images, self.part == GRADIENT
        others, new = np.cumsum(np.where(gradient, 0, change)), np.where(gradient, change, 0)
        return int((others + new).max() + new.sum())

    def most(self, part: int, images: int) -> int:
        """The most bytes of one part at once."""
        return int(np.cumsum(np.where(self.part == part, self.constant + self.each * images, 0)).max(initial=0))
