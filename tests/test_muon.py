from __future__ import annotations

import pytest
import torch

from trainer.muon import Muon, in_bf16, in_fp32, orthogonalised
from trainer.optimizers import OptimizerSpec

ADAM = {"betas": (0.9, 0.99), "eps": 1e-8}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], lr: float = 0.01) -> None:
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for index, weight in enumerate(weights):
            weight.grad = random(*weight.shape, seed=10 * step + index)
        optimizer.step()


@pytest.mark.parametrize(("how", "rounding"), [(in_fp32, 1e-3), (in_bf16, 0.1)])
@pytest.mark.parametrize("shape", [(16, 16), (8, 72), (72, 8)])
def test_singular_values_come_close_to_one_and_the_vectors_stay(shape: tuple[int, int], how, rounding: float):
    matrices = random(3, *shape)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    kept = u.mT @ how(matrices) @ vt.mT
    values = kept.diagonal(dim1=-2, dim2=-1)
    assert (kept - torch.diag_embed(values)).abs().max() < rounding
    assert values.max() < 1.3
    # The square ones have a singular value near 0, which five iterations do not lift all the way.
    assert values.median() > 0.6
    assert (values > 0.6).all() or shape[0] == shape[1]


def test_the_short_form_of_the_iteration_gives_what_the_plain_one_does():
    matrices = random(2, 12, 40)
    plain = matrices / matrices.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = plain @ plain.mT
        plain = 3.4445 * plain + (-4.7750 * gram + 2.0315 * gram @ gram) @ plain
    torch.testing.assert_close(orthogonalised(matrices), plain, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_zero_moves_no_matrix():
    weight = torch.nn.Parameter(random(4, 6))
    before = weight.detach().clone()
    optimizer = Muon([weight], [], momentum=0.95, weight_decay=0.0, **ADAM)
    weight.grad = torch.zeros_like(weight)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert torch.equal(weight, before)


def test_matrices_move_as_by_the_muon_of_pytorch_within_its_bf16():
    ours, theirs = torch.nn.Parameter(random(8, 24)), torch.nn.Parameter(random(8, 24))
    trained(Muon([ours], [], momentum=0.95, weight_decay=0.1, **ADAM), [ours])
    reference = torch.optim.Muon([theirs], momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    trained(reference, [theirs])
    moved = (theirs - random(8, 24)).abs().max()
    assert (ours - theirs).abs().max() < 0.03 * moved


def test_a_convolution_moves_as_the_matrix_of_its_output_channels():
    convolution, matrix = torch.nn.Parameter(random(6, 3, 3, 3)), torch.nn.Parameter(random(6, 27))
    start = random(6, 3, 3, 3)
    for weight in (convolution, matrix):
        weight.data.copy_(start.view_as(weight))
        optimizer = Muon([weight], [], momentum=0.9, weight_decay=0.0, **ADAM)
        optimizer.param_groups[0]["lr"] = 0.1
        weight.grad = random(6, 27, seed=5).view_as(weight)
        optimizer.step()
    assert torch.equal(convolution.flatten(1), matrix)


def test_the_other_weights_move_as_by_adamw_to_the_bit():
    ours, theirs = torch.nn.Parameter(random(7)), torch.nn.Parameter(random(7))
    trained(Muon([], [ours], momentum=0.95, weight_decay=0.1, **ADAM), [ours])
    trained(torch.optim.AdamW([theirs], lr=0.0, weight_decay=0.1, fused=True, **ADAM), [theirs])
    assert torch.equal(ours, theirs)


def test_embeddings_end_convolutions_and_vectors_are_left_to_adamw():
    names = {
        "unet.conv_in.weight": (4, 2, 3, 3),
        "unet.time_embedding.linear_1.weight": (4, 4),
        "unet.mid_block.resnets.0.time_emb_proj.weight": (4, 4),
        "unet.mid_block.resnets.0.conv1.weight": (4, 4, 3, 3),
        "unet.mid_block.resnets.0.conv1.bias": (4,),
        "text_encoder.embeddings.token_embedding.weight": (9, 4),
    }
    weights = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in names.items()}
    matrices, others = OptimizerSpec.parse({"kind": "muon"}).build(weights).param_groups
    assert [weight.shape for weight in matrices["params"]] == [(4, 4), (4, 4, 3, 3)]
    assert len(others["params"]) == 4
