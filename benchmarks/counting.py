"""What a training step computes and moves: every kernel of it, seen on the meta device, where nothing is computed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _get_sequence_nr as next_node  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

PRODUCTS = ("convolutions", "linear", "attention")
PARTS = {
    "convolution": "convolutions",
    "convolution_backward": "convolutions",
    "mm": "linear",
    "addmm": "linear",
    "bmm": "linear",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_flash_attention_backward": "attention",
    "native_group_norm": "norms",
    "native_group_norm_backward": "norms",
    "native_layer_norm": "norms",
    "native_layer_norm_backward": "norms",
    "silu": "activations",
    "silu_backward": "activations",
    "gelu": "activations",
    "gelu_backward": "activations",
    "_to_copy": "casts",
    "clone": (COPIES := "copies to another order"),
}
OF_WEIGHTS = "casts of weights and their gradients"
REST = "other elementwise"  # sums of residuals, joins, upsampling, sums of bias gradients, the loss

# ATen/native/cuda/MultiTensorApply.cuh for CUDA 13: elements of a block, blocks of a kernel, and its tensors by the
# number of lists that it walks.
CHUNK, MOST_BLOCKS, MOST_TENSORS = 65_536, 2240, (770, 448, 336, 252, 210)

HEAD_WIDTHS = (32, 64, 96, 128, 192, 256)  # that flash attention has kernels for; others are padded to the next


@dataclass(frozen=True)
class Op:
    """One operation: the bytes that it reads and writes by value, and the arithmetic of products."""

    name: str
    part: str
    reads: Mapping[int, int]
    writes: Mapping[int, int]
    flops: float = 0.0  # of the mathematics
    padded_flops: float = 0.0  # of the kernel, which may work on more than was asked for
    launches: int = 1
    backward: bool = False  # or after it
    block: tuple[int, bool] | None = None  # the number of the block that it belongs to, and whether to its backward

    @property
    def bytes(self) -> int:
        """What goes through the memory, if nothing stays in a cache."""
        return sum(self.reads.values()) + sum(self.writes.values())


class Autocast(TorchFunctionMode):
    """The bf16 autocast of CUDA for the functions that UNets call, with norms in the precision `norms`.

    Written out, because torch's own knows no meta device. Attention becomes flash attention.
    """

    def __init__(self, norms: torch.dtype):
        super().__init__()
        low, full = torch.bfloat16, torch.float32
        self.precision = {functional.linear: low, functional.conv2d: low, functional.mse_loss: full}
        self.precision |= {functional.scaled_dot_product_attention: low}
        self.precision |= {functional.group_norm: norms, functional.layer_norm: norms}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.precision:
            dtype = self.precision[func]
            args, kwargs = tree_map(lambda each: each.to(dtype) if isinstance(each, Tensor) else each, (args, kwargs))
        if func is functional.scaled_dot_product_attention:
            assert kwargs.get("attn_mask") is None, "flash attention takes no mask"
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


class Counting(TorchDispatchMode):
    """Within it, every operation on meta tensors that would move bytes becomes an `Op` of `ops`.

    One operation counts as one kernel (the backward of a convolution or of attention is two or three in truth). Those
    on lists of tensors count as the kernels that CUDA needs. cuDNN computes in channels-last order: what a convolution
    finds or leaves in another order (`channels_last` says which the network has) is turned, by one more kernel.
    """

    def __init__(self, network: nn.Module, blocks: Iterable[str] = (), channels_last: bool = False):
        super().__init__()
        self.ops: list[Op] = []
        self.channels_last = channels_last
        self.backward = False  # to be set once the forward is done
        self.part: str | None = None  # of all that follows, where the operation alone does not say it
        self.shapes = {weight.shape for weight in network.parameters()}
        self.values: dict[int, int] = {}  # of each storage, by its address: a number that changes when it is written
        self.storages: list[torch.UntypedStorage] = []  # kept, so that no address is used twice
        self.newest = 0
        self.block: tuple[int, bool] | None = None
        self.calls: list[tuple[int, int, int]] = []  # of blocks: first node of autograd, the one after its last, block
        names = frozenset(blocks)
        for number, module in enumerate(network.modules()):
            if type(module).__name__ in names:
                module.register_forward_pre_hook(partial(self._enter, number))
                module.register_forward_hook(self._leave, always_call=True)  # a recomputation ends by an exception

    def _enter(self, number: int, *_: Any) -> None:
        self.calls.append((next_node(), 0, number))
        self.block = number, False

    def _leave(self, *unused: Any) -> None:
        begin, _, number = self.calls[-1]
        self.calls[-1] = begin, next_node(), number
        self.block = None

    def _where(self) -> tuple[int, bool] | None:
        """The block that an operation belongs to: autograd numbers a backward's nodes as the forward makes them."""
        node: Any = torch._C._current_autograd_node()
        if self.block is not None or node is None:
            return self.block
        index = bisect_right(self.calls, node._sequence_nr(), key=lambda call: call[0]) - 1
        return (self.calls[index][2], True) if index >= 0 and node._sequence_nr() < self.calls[index][1] else None

    @contextmanager
    def counted_as(self, part: str) -> Iterator[None]:
        """Within it, all is counted under that name."""
        self.part = part
        try:
            yield
        finally:
            self.part = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        name = schema.name.partition("::")[2]
        # Fused optimizers have no meta kernel, and no result: what they do is in their arguments.
        out = None if name.startswith("_fused_") else func(*args, **kwargs)
        named = dict(zip((each.name for each in schema.arguments), args, strict=False)) | kwargs
        read, made = _tensors(named), _tensors(out)
        # A fused optimizer writes its gradients only where it has to unscale them, which bf16 does not ask for.
        changed = [each.name for each in schema.arguments if each.alias_info and each.alias_info.is_write]
        written = _tensors([named[each] for each in changed if each in named and each != "grads"])
        view = not written and {_address(each) for each in made} <= {_address(each) for each in read}
        if name.startswith(("empty", "new_empty")) or view:
            return out

        part = self.part or PARTS.get(name, REST)
        if part == "convolutions" and self.channels_last:  # as on a GPU; meta kernels look at their input alone
            out = tree_map(_channels_last, out)
            made = _tensors(out)
        elif part == "casts" and made[0].shape in self.shapes:
            part = OF_WEIGHTS
        packet = func._overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0.0
        padded = flops * _padding(read[0].shape[-1]) if part == "attention" else flops
        launches = _launches(named) if name.startswith(("_fused_", "_foreach_")) else 1
        reads = self._sizes(read)  # before the values of what is written change
        writes = self._sizes(written or made, written=True)
        before, after = [], []
        if part == "convolutions":
            before = [self._turn(reads, each, True) for each in read if _needs_turning(each)]
            after = [self._turn(writes, each, False) for each in made if _needs_turning(each)]
        self.ops += [
            *before,
            Op(name, part, reads, writes, flops, padded, launches, self.backward, self._where()),
            *after,
        ]
        return out

    def _turn(self, sizes: dict[int, int], tensor: Tensor, before: bool) -> Op:
        """The kernel that turns `tensor` before or after a convolution, whose `sizes` then have the turned one."""
        value, turned = self._value(tensor), self._number()
        size = sizes[turned] = sizes.pop(value)
        reads, writes = ({value: size}, {turned: size}) if before else ({turned: size}, {value: size})
        return Op("turn", COPIES, reads, writes, backward=self.backward, block=self._where())

    def _sizes(self, tensors: Iterable[Tensor], written: bool = False) -> dict[int, int]:
        """Bytes that are read, or written, by value: each view once, and no more than there is in memory."""
        views = {(_address(each), each.storage_offset(), each.shape): each for each in tensors}
        sizes: dict[int, int] = {}
        for view in views.values():
            value, storage = self._value(view, written), view.untyped_storage()
            sizes[value] = min(sizes.get(value, 0) + view.numel() * view.element_size(), storage.nbytes())
        return sizes

    def _value(self, tensor: Tensor, written: bool = False) -> int:
        """The number of what `tensor` holds; a new one if it is `written`."""
        address = _address(tensor)
        if address not in self.values:
            self.storages.append(tensor.untyped_storage())
        if written or address not in self.values:
            self.values[address] = self._number()
        return self.values[address]

    def _number(self) -> int:
        self.newest += 1
        return self.newest


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _channels_last(each: Any) -> Any:
    return each.contiguous(memory_format=torch.channels_last) if isinstance(each, Tensor) and each.ndim == 4 else each


def _needs_turning(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous(memory_format=torch.channels_last)


def _padding(width: int) -> float:
    """What flash attention computes for heads of that width, over what it was asked for."""
    return next((each for each in HEAD_WIDTHS if each >= width), width) / width


def _launches(named: Mapping[str, Any]) -> int:
    """Kernels of an operation on lists of tensors: one takes so many tensors, and so many blocks of their elements."""
    lists = [each for name, each in named.items() if isinstance(each, (list, tuple)) and each and name != "state_steps"]
    most_tensors = MOST_TENSORS[len(lists) - 1]
    launches, tensors, blocks = 1, 0, 0
    for tensor in lists[0]:
        if tensors == most_tensors:
            launches, tensors, blocks = launches + 1, 0, 0
        tensors += 1
        blocks += -(-tensor.numel() // CHUNK)
        while blocks > MOST_BLOCKS:  # the rest of this tensor begins the next kernel
            launches, tensors, blocks = launches + 1, 1, blocks - MOST_BLOCKS
    return launches
