"""Count the places where the host waits for the device, on a machine that has no device.

On a CPU nothing waits, so everything computed from the parameters, the images or the targets is marked as lying on an
imagined device: the mark is on the storage, and every operation that reads a marked tensor marks what it returns. What
brings a marked tensor to the host, or needs its content to know the shape of a result, counts.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result has a shape or a value that only the content tells.
READING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
TO_HOST = ("cpu", "tolist", "numpy", "__array__")


class Synchronisations(TorchDispatchMode):
    """Collects where the host would wait.

    Attributes:
        found: the line of our own code for each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._marked: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is used twice

    def mark(self, things: Any) -> None:
        """Put every tensor of a structure on the imagined device."""
        for tensor in tree_leaves(things):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._marked[storage._cdata] = storage

    def unmark(self, tensor: Tensor) -> None:
        """Take a tensor from the imagined device."""
        del self._marked[tensor.untyped_storage()._cdata]

    def is_marked(self, things: Any) -> bool:
        """Return whether any tensor of a structure lies on the imagined device."""
        tensors = [each for each in tree_leaves(things) if isinstance(each, Tensor)]
        return any(tensor.untyped_storage()._cdata in self._marked for tensor in tensors)

    def note(self) -> None:
        """Remember the line of our own code that makes the host wait."""
        ours = [f for f in traceback.extract_stack() if "/site-packages/" not in f.filename and __file__ != f.filename]
        self.found.append(f"{ours[-1].filename}:{ours[-1].lineno} {ours[-1].line}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; note it if it waits, and pass the mark on."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        marked = self.is_marked((args, kwargs))
        masks = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        counts_itself = name == "repeat_interleave" and kwargs.get("output_size") is None
        if marked and (name in READING or masks or counts_itself):
            self.note()
        result = func(*args, **kwargs)
        if marked:
            self.mark(result)
        return result


@contextmanager
def counted() -> Iterator[Synchronisations]:
    """Count inside the block."""
    mode = Synchronisations()
    originals = {name: getattr(Tensor, name) for name in (*TO_HOST, "to")}

    def reading(name: str) -> Any:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not mode.is_marked(tensor):
                return originals[name](tensor, *args, **kwargs)
            mode.note()
            copy = tensor.detach().clone()
            mode.unmark(copy)  # it lies on the host
            return originals[name](copy, *args, **kwargs)

        return read

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = originals["to"](tensor, *args, **kwargs)
        places = [each for each in (*args, *kwargs.values()) if isinstance(each, (str, torch.device, Tensor))]
        if places:  # whoever names a device means ours
            mode.mark(result)
        return result

    try:
        for name in TO_HOST:
            setattr(Tensor, name, reading(name))
        Tensor.to = to  # type: ignore[method-assign,assignment]
        with mode:
            yield mode
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)
