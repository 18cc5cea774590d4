"""Other kernels round otherwise and train the same run: its samples, its resumes, its record."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import checkpoint, manifest, metrics, same_run, train

from trainer.cli import main
from trainer.config_file import load_config
from trainer.kernels import arrange, norm_in_bf16
from trainer.models.base import ModelFamily

SMALL = "model.unet_channels=[8]"
BF16 = "train.precision=bf16"


@pytest.fixture(autouse=True, scope="module")
def fresh_kernels(tmp_path_factory):
    """Kernels are compiled here, and kept for the other tests of this file alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
    torch.compiler.reset()


def losses(run):
    return [line["loss"] for line in metrics(run)]


def batches(run):
    return [line["batch"] for line in metrics(run)]


def settings(config, *overrides):
    return load_config(config, overrides).config.train


@pytest.mark.parametrize("norm", [torch.nn.GroupNorm(4, 16), torch.nn.LayerNorm(16)], ids=["group", "layer"])
def test_a_norm_in_bf16_is_within_its_rounding_of_fp32(norm):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(1, 0.5, generator=generator)
    x = 3 + 5 * torch.randn(4, 16, 16, generator=generator)
    rough, exact = norm_in_bf16(norm, x), norm(x)
    assert rough.dtype == torch.bfloat16
    # Three roundings of 2^-9, relative: of x (whose mean the norm takes away), of the weight and of the result.
    torch.testing.assert_close(rough.float(), exact, rtol=3 * 2**-9, atol=0.03)


def test_norms_in_bf16_pass_bf16_on_under_autocast(config):
    unet = ModelFamily.parse({"kind": "tiny"}).load(0).unet
    seen = []
    norm = next(module for module in unet.modules() if isinstance(module, torch.nn.GroupNorm))
    arrange(unet, settings(config, BF16, "train.norm_precision=bf16"))
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), torch.tensor([1]), encoder_hidden_states=torch.zeros(1, 77, 64))
    assert seen == [torch.bfloat16]


def test_a_run_with_norms_in_bf16_stays_near_the_one_in_fp32(config, tmp_path):
    for name, norms in (("exact", "fp32"), ("rough", "bf16")):
        assert train(config, tmp_path / name, "--set", BF16, f"train.norm_precision={norms}") == 0
    assert batches(tmp_path / "rough") == batches(tmp_path / "exact")
    assert losses(tmp_path / "rough") == pytest.approx(losses(tmp_path / "exact"), rel=1e-2)
    assert losses(tmp_path / "rough") != losses(tmp_path / "exact")


def test_a_run_in_channels_last_order_goes_on_as_it_began(config, tmp_path, begun, capsys):
    run = begun(4)
    assert train(config, run, "--resume", "auto", "--set", "train.channels_last=true") == 0
    assert "train.channels_last: False -> True (same samples, other rounding)" in capsys.readouterr().out
    assert train(config, tmp_path / "whole") == 0
    assert batches(run) == batches(tmp_path / "whole")
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert manifest(run)["starts"][1]["config_changes"]["train.channels_last"] == {"was": False, "now": True}
    moments = checkpoint(run, 6)["optimizer"]["state"]
    assert any(
        value["exp_avg"].is_contiguous(memory_format=torch.channels_last) and not value["exp_avg"].is_contiguous()
        for value in moments.values()
    )


def test_steps_of_other_kernels_are_reproduced_to_rounding(config, begun, capsys):
    run = begun(4)
    assert train(config, run, "--resume", "auto", "--set", "train.channels_last=true") == 0
    assert main(["reproduce", str(run), "--steps", "4"]) == 0
    assert "numbers may differ" not in capsys.readouterr().out
    assert main(["reproduce", str(run), "--steps", "6"]) == 0
    assert "kernels than the run's: numbers may differ by 0.0001" in capsys.readouterr().out


def test_norms_in_bf16_need_a_step_in_bf16(config, tmp_path, capsys):
    assert train(config, tmp_path / "run", "--set", "train.norm_precision=bf16") == 2
    assert "train.norm_precision" in capsys.readouterr().err


def test_kernels_by_stopwatch_are_no_deterministic_ones(config, tmp_path, capsys):
    assert train(config, tmp_path / "run", "--set", "train.cudnn_benchmark=true") == 2
    assert "train.cudnn_benchmark" in capsys.readouterr().err


def test_compiling_without_a_compiler_is_told_of_in_one_line(config, tmp_path, capsys, monkeypatch):
    from torch._inductor import config as inductor
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/no/such/compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert train(config, tmp_path / "run", "--set", SMALL, "train.compile=blocks") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: torch.compile finds no compiler")
    assert "train.compile" in said
    torch.compiler.reset()


@pytest.mark.slow
def test_a_run_of_compiled_blocks_resumes_exactly(config, tmp_path, capsys):
    small = ["--set", SMALL, "train.log_every=1"]
    compiled = [*small, "train.compile=blocks"]
    assert train(config, tmp_path / "eager", *small) == 0
    assert train(config, tmp_path / "whole", *compiled) == 0
    assert "compile 9 parts of unet x 1 shape" in capsys.readouterr().out
    assert train(config, tmp_path / "broken", *compiled, "train.max_steps=3") == 0
    assert train(config, tmp_path / "broken", *compiled, "--resume", "auto") == 0
    assert same_run(tmp_path / "broken", tmp_path / "whole", 6)
    assert checkpoint(tmp_path / "whole", 6)["modules"]["unet"].keys() == (
        checkpoint(tmp_path / "eager", 6)["modules"]["unet"].keys()
    )
    assert batches(tmp_path / "whole") == batches(tmp_path / "eager")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    assert (
        manifest(tmp_path / "whole")["config"]["resolved_sha256"]
        != (manifest(tmp_path / "eager")["config"]["resolved_sha256"])
    )


@pytest.mark.nightly
@pytest.mark.slow
def test_a_unet_compiled_in_one_piece_trains_the_same_run(config, tmp_path):
    small = ["--set", SMALL, "train.log_every=1", "train.gradient_checkpointing=true"]
    assert train(config, tmp_path / "eager", *small) == 0
    assert train(config, tmp_path / "whole", *small, "train.compile=full") == 0
    assert train(config, tmp_path / "broken", *small, "train.compile=full", "train.max_steps=3") == 0
    assert train(config, tmp_path / "broken", *small, "train.compile=full", "--resume", "auto") == 0
    assert same_run(tmp_path / "broken", tmp_path / "whole", 6)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


@pytest.mark.nightly
@pytest.mark.slow
def test_each_shape_of_a_batch_is_compiled_once(config, tmp_path):
    from torch._dynamo.utils import counters

    for index in range(16):
        width, height = [(32, 32), (48, 24)][index % 2]
        picture = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("noise")
    of_two_shapes = ["data.kind=imagefolder", f"data.data_root={tmp_path}", "data.bucket_step_px=8", SMALL]
    options = ["--set", *of_two_shapes, "train.max_steps=8", "train.log_every=1"]
    assert train(config, tmp_path / "eager", *options) == 0
    torch.compiler.reset()
    counters.clear()
    assert train(config, tmp_path / "run", *options, "train.compile=blocks") == 0
    assert batches(tmp_path / "run") == batches(tmp_path / "eager")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    assert 9 < counters["stats"]["unique_graphs"] <= 2 * 9


def test_parts_with_norms_in_bf16_that_are_alike_share_their_graph(config):
    unet: Any = ModelFamily.parse({"kind": "tiny"}).load(0).unet
    train = settings(config, BF16, "train.norm_precision=bf16")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    blocks = [copy.deepcopy(unet.mid_block.attentions[0].transformer_blocks[0]) for _ in range(3)]
    torch.compiler.reset()
    for block in blocks:
        arrange(block, train)
        block.compile(backend=count, fullgraph=True, dynamic=False)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            block(torch.randn(1, 16, 40), encoder_hidden_states=torch.randn(1, 77, 64))
    assert len(graphs) == 1
