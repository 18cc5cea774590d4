"""The roofline counts what can be counted by hand; how long a GPU takes, no test says."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
BATCH, PIXELS, TOKENS = 2, 64, 77
CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 48,
    "attention_head_dim": 2,
}


@pytest.fixture(scope="module")
def tools() -> Any:
    """The modules `roofline`, `counting` and `fusion` of the benchmarks, which are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield [importlib.import_module(name) for name in ("roofline", "counting", "fusion")]


@pytest.fixture(scope="module")
def step(tools):
    """The step of the tiny UNet, with options by name."""
    roofline, *_ = tools

    def count(checkpointing: bool = False, **options: Any) -> Any:
        return roofline.step(CONFIG, BATCH, PIXELS, roofline.Option("tested", **options), checkpointing)

    return count


@pytest.fixture(scope="module")
def plain(step):
    return step()


def unet() -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(CONFIG)


def part(counted: Any, name: str) -> list[Any]:
    return [op for op in counted.ops if op.part == name]


def forward_flops(kind: type[nn.Module]) -> tuple[float, float]:
    """FLOP of all layers of that kind in a forward, and of those of them whose input needs no gradient."""
    network, flops, without = unet(), [], []

    def see(layer: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        weight: Any = layer.weight
        each = 2 * weight[0].numel() * made.numel()  # a product and a sum for each weight of an output channel
        flops.append(each)
        if not given[0].requires_grad:
            without.append(each)

    for layer in network.modules():
        if isinstance(layer, kind):
            layer.register_forward_hook(see)
    side = PIXELS // 8
    latents, time = torch.empty(BATCH, 4, side, side, device="meta"), torch.empty(BATCH, device="meta")
    network(latents, time, torch.empty(BATCH, TOKENS, CONFIG["cross_attention_dim"], device="meta"))
    assert without
    return sum(flops), sum(without)


@pytest.mark.parametrize("name, kind", [("convolutions", nn.Conv2d), ("linear", nn.Linear)])
def test_a_step_computes_each_layer_three_times(plain, name, kind):
    whole, without = forward_flops(kind)
    # Forward, gradient of the weight, gradient of the input: which latents, text and times need not have.
    assert sum(op.flops for op in part(plain, name)) == 3 * whole - without
    assert sum(op.flops for op in part(plain, name) if not op.backward) == whole


def test_attention_takes_two_products_forward_and_five_backward(tools):
    _, counting, _ = tools
    query, key = (torch.empty(2, 3, length, 40, device="meta", requires_grad=True) for length in (64, 16))
    with counting.Counting(nn.Identity()) as counted, counting.Autocast(torch.float32):
        out = nn.functional.scaled_dot_product_attention(query, key, key)
        out.sum().backward()
    product = 2 * 2 * 3 * 64 * 16 * 40
    assert [op.flops for op in part(counted, "attention")] == [2 * product, 5 * product]
    assert [op.padded_flops for op in part(counted, "attention")] == [2 * product * 64 / 40, 5 * product * 64 / 40]


def test_norms_in_bf16_move_half_the_bytes(plain, step):
    full, half = (sum(op.bytes for op in part(each, "norms")) for each in (plain, step(norms=torch.bfloat16)))
    assert full > 0
    assert half / full == pytest.approx(0.5, rel=0.01)


def test_what_a_step_does_to_the_weights_is_counted_by_weight(plain):
    weights = [weight.numel() for weight in unet().parameters()]
    assert plain.weights == sum(weights)
    (adamw,), (ema,) = part(plain, "AdamW"), part(plain, "EMA")
    # Read: weights, gradients, two moments. Written: all but gradients. And a step count for each tensor.
    assert adamw.bytes == 7 * 4 * sum(weights) + 4 * len(weights)
    assert ema.bytes == 3 * 4 * sum(weights) + 4  # read: averages, weights, a flag; written: averages
    clipped = {op.name: op.bytes for op in part(plain, "clip")}
    assert clipped["_foreach_norm"] == 4 * sum(weights) + 4 * len(weights)
    assert clipped["_foreach_mul_"] == 2 * 4 * sum(weights) + 4


def test_autocast_casts_the_weights_of_products_and_their_gradients(plain):
    cast = [
        weight.numel()
        for layer in unet().modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
        for weight in layer.parameters()
    ]
    casts = part(plain, "casts of weights and their gradients")
    assert len(casts) == 2 * len(cast)
    assert sum(op.bytes for op in casts) == 2 * (4 + 2) * sum(cast)


def test_checkpointing_computes_the_forward_of_blocks_twice(plain, step):
    names = [name for name, _ in unet().named_modules()]
    left_out = names.index("mid_block.resnets.0")  # by diffusers
    inside = sum(op.flops for op in plain.ops if op.block and not op.backward and op.block[0] != left_out)
    whole = sum(op.flops for op in plain.ops)
    with set_checkpoint_early_stop(False):
        complete = step(checkpointing=True)
    assert inside > 0
    assert sum(op.flops for op in complete.ops) == whole + inside
    early = sum(op.flops for op in step(checkpointing=True).ops)  # what comes last in a block is not needed again
    assert whole < early < whole + inside
    assert complete.memory() < plain.memory()


def test_a_compiled_checkpoint_keeps_no_more_than_a_plain_one(step):
    plain, compiled = step(checkpointing=True), step(checkpointing=True, compiled=True)
    assert compiled.memory() <= plain.memory()  # a kernel of both would keep what checkpointing drops


def test_a_convolution_in_another_order_is_turned_before_and_after(tools):
    _, counting, _ = tools
    turned = {}
    for order in (torch.contiguous_format, torch.channels_last):
        layer: Any = nn.Conv2d(4, 8, 3, padding=1, bias=False, device="meta")
        layer.to(memory_format=order)
        with counting.Counting(layer, channels_last=order is torch.channels_last) as counted:
            layer(torch.empty(2, 4, 6, 6, device="meta"))
        turned[order] = [op.bytes for op in part(counted, "copies to another order")]
        assert len(counted.ops) == 1 + len(turned[order])
    given, weight, made = 2 * 4 * 36 * 4, 8 * 4 * 9 * 4, 2 * 8 * 36 * 4
    assert turned[torch.contiguous_format] == [2 * given, 2 * weight, 2 * made]
    assert turned[torch.channels_last] == [2 * given]


class Block(nn.Module):
    """Two products with two operations between them, the second of which takes the input too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(16, 16, bias=False, device="meta") for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.silu(self.first(x)) * x)


def test_what_is_fused_reads_and_writes_each_tensor_once(tools):
    _, counting, fusion = tools
    block, x = Block(), torch.empty(8, 16, device="meta", requires_grad=True)
    with counting.Counting(block, ["Block"]) as counted:
        y = block(x)
        y.backward(torch.empty_like(y))
    tensor = 8 * 16 * 4
    plain = [op for op in counted.ops if op.part != "linear"]
    # silu: y, s. product: s, x, z. Backward: dz, x, ds; dz, s, dx; ds, y, dy; and two gradients of x summed in place.
    assert sum(op.bytes for op in plain) == (2 + 3 + 3 + 3 + 3 + 3) * tensor
    fused = [op for op in fusion.fused(counted.ops) if op.part != "linear"]
    # Forward: y, x; z. Backward: dz, x, y, with which s is computed again; dy, dx. The sum waits for a product.
    assert sorted(op.bytes for op in fused) == [3 * tensor, 3 * tensor, 5 * tensor]
    outside = fusion.fused([counting.Op(op.name, op.part, op.reads, op.writes) for op in counted.ops])
    assert len(outside) == len(counted.ops)


def test_compiled_blocks_keep_their_products_and_launch_less(plain, step):
    compiled = step(compiled=True)
    for name in ("convolutions", "linear", "attention"):
        assert part(compiled, name) == part(plain, name)
    assert sum(op.launches for op in compiled.ops) < 0.8 * sum(op.launches for op in plain.ops)
    assert sum(op.bytes for op in compiled.ops) < sum(op.bytes for op in plain.ops)


@pytest.mark.parametrize(
    "tensors, elements, launches",
    [(252, 1, 1), (253, 1, 2), (1, 2240 * 65536, 1), (1, 2240 * 65536 + 1, 2), (3, 1000 * 65536, 2)],
)
def test_an_optimizer_launches_by_tensors_and_by_blocks(tools, tensors, elements, launches):
    roofline, counting, _ = tools
    weights = [torch.empty(elements, device="meta") for _ in range(tensors)]
    with counting.Counting(nn.Identity()) as counted:
        roofline.adamw(weights, [torch.empty_like(weight) for weight in weights])
    assert [op.launches for op in counted.ops if op.name == "_fused_adamw_"] == [launches]


def test_a_kernel_takes_the_longest_of_its_three_bounds(tools):
    roofline, counting, _ = tools
    gpu = roofline.Gpu("made up", 100.0, 10.0, products=0.5, attention=0.25, memory=0.8)
    assert gpu.seconds(counting.Op("mm", "linear", {0: 3}, {1: 1}, 40, 50.0)) == 1.0
    assert gpu.seconds(counting.Op("sdpa", "attention", {0: 3}, {1: 1}, 40, 50.0)) == 2.0
    assert gpu.seconds(counting.Op("add", "rest", {0: 24}, {1: 8})) == 4.0
    assert gpu.seconds(counting.Op("add", "rest", {}, {}, launches=4)) == 4 * roofline.LAUNCH_SECONDS
