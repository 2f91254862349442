"""What operations take: the bytes of tensors that are alive at one time, and the products.

Each tensor's storage is counted from its first use to its end: the allocator's view, and so the same whatever ran before in
the process and whatever the allocator keeps for later.  Memory that a kernel takes and returns within one call is not seen.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Taken(TorchDispatchMode):
    """While it is entered, counts the storages of what operations return, and their products.

    now, peak: bytes that are alive, and the most that were; tensors that were there before are not counted.
    products: floating-point operations, each multiplication and each addition as one, by torch's own counts.
    """

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.products = 0
        self._known: dict[int, int] = {}  # storage -> its bytes
        for tensor in before:
            self._known[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.products += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = self._known[storage._cdata] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, storage: int) -> None:
        self.now -= self._known.pop(storage, 0)


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of these tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
