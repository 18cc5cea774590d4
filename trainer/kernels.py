"""How the networks compute: compiled, with norms in bf16, in channels-last order. Other rounding, the same samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import group_norm, layer_norm

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import TrainSection

RECOMPILES = 64  # that one block class may need for each shape of a batch: its instances differ in channels and sizes


def arrange(network: nn.Module, train: TrainSection) -> None:
    """What has to be done before optimizer and averages copy the layout of the weights: memory order and norms."""
    torch.backends.cudnn.benchmark = train.cudnn_benchmark
    if train.channels_last:
        nn.Module.to(network, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if train.norm_precision == "bf16":
        for module in network.modules():
            if type(module) in IN_BF16:
                module.__class__ = IN_BF16[type(module)]


class GroupNormInBf16(nn.GroupNorm):
    """A class, not a function put into instances: compiled parts that are alike then share their graphs."""

    def forward(self, input: Tensor) -> Tensor:
        return norm_in_bf16(self, input)


class LayerNormInBf16(nn.LayerNorm):
    """The same of a layer norm."""

    def forward(self, input: Tensor) -> Tensor:
        return norm_in_bf16(self, input)


IN_BF16: dict[type, type] = {nn.GroupNorm: GroupNormInBf16, nn.LayerNorm: LayerNormInBf16}


def norm_in_bf16(norm: Any, x: Tensor) -> Tensor:
    """The norm of `x` as bf16, with its statistics in fp32 inside of the kernel.

    Autocast would turn `x` to fp32 first, and what follows it (SiLU) would then run in fp32 too: twice the bytes.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.bfloat16)
        weight, bias = (each if each is None else each.to(torch.bfloat16) for each in (norm.weight, norm.bias))
        if isinstance(norm, nn.GroupNorm):
            return group_norm(x, norm.num_groups, weight, bias, norm.eps)
        return layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def compile_networks(
    networks: Mapping[str, nn.Module], train: TrainSection, blocks: Iterable[str], shapes: int, ranks: int
) -> int:
    """Compile the networks as `train.compile` says, in place: names and state dicts stay. How many parts that are.

    `blocks` names the classes of the parts that repeat. Each is compiled for each of the `shapes` of a batch; what
    goes over the limit is an error, as torch would fall back to eager without a word. Pictures are drawn and losses
    held out in `eagerly`.
    """
    if train.compile == "none":
        return 0
    import torch._dynamo

    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, RECOMPILES * shapes)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * RECOMPILES * shapes)
    settings.fail_on_recompile_limit_hit = True
    if ranks > 1 and train.gradient_checkpointing:
        settings.optimize_ddp = False  # it splits graphs at the buckets, which checkpointed regions do not survive
    if train.compile == "full":
        parts = [networks["unet"]]
    else:
        names = frozenset(blocks)
        parts = [part for network in networks.values() for part in network.modules() if type(part).__name__ in names]
    for part in parts:
        part.compile(fullgraph=True, dynamic=False)
    return len(parts)


def eagerly() -> Any:
    """Within it compiled networks run as they would uncompiled: other batch sizes would be compiled anew."""
    return torch.compiler.set_stance("force_eager")
