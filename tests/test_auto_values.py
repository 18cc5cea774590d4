"""`auto` is decided once: at a run's first start, by what the device can do and by what the pictures show."""

from __future__ import annotations

import pytest
import torch
from runs import checkpoint, manifest, train

from trainer.auto_values import MOST_ERROR, bf16_error, vae_precision
from trainer.config_file import load_config
from trainer.models.tiny import tiny_vae
from trainer.preflight import preflight
from trainer.runtime import Runtime

AUTO = "model.vae_precision=auto"
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The device says that it computes in bf16, which this one does slowly."""
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "has_bf16", True)
        yield patch


def test_a_device_without_bf16_gets_fp32(config):
    checked = preflight(load_config(config, [AUTO]), 0, 1)
    assert vae_precision(checked, torch.device("cpu"), has_bf16=False)[0] == "fp32"


def test_latents_that_agree_with_fp32_are_made_in_bf16(config):
    checked = preflight(load_config(config, [AUTO]), 0, 1)
    precision, why = vae_precision(checked, torch.device("cpu"), has_bf16=True)
    assert precision == "bf16"
    assert "4 pictures" in why


def test_the_error_of_bf16_is_one_of_rounding():
    assert 0 < bf16_error(tiny_vae(), PIXELS) < MOST_ERROR


def test_a_vae_that_leaves_the_numbers_of_bf16_is_infinitely_wrong():
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.bias[0] = 3.4e38  # rounded to bf16 it is infinite  # pyright: ignore
    assert bf16_error(vae, PIXELS) == float("inf")


def test_a_vae_that_is_off_in_bf16_stays_in_fp32(config, monkeypatch):
    monkeypatch.setattr("trainer.auto_values.bf16_error", lambda vae, pixels: MOST_ERROR * 1.01)
    checked = preflight(load_config(config, [AUTO]), 0, 1)
    assert vae_precision(checked, torch.device("cpu"), has_bf16=True)[0] == "fp32"


def test_what_auto_became_is_stored_as_a_value_and_kept(config, tmp_path, on_a_gpu):
    run = tmp_path / "run"
    assert train(config, run, "--set", AUTO, "train.max_steps=2") == 0
    on_a_gpu.undo()  # resumed on a machine that would choose otherwise
    assert train(config, run, "--resume", "auto", "--set", AUTO, "train.max_steps=4") == 0
    assert load_config(run / "config.resolved.yaml").config.model.vae_precision == "bf16"
    assert [each["model"]["vae_precision"] for each in manifest(run)["configs"].values()] == ["bf16"] * 2
    assert checkpoint(run, 4)["config"]["model"]["vae_precision"] == "bf16"


@pytest.mark.usefixtures("on_a_gpu")
def test_a_cache_made_under_auto_is_that_of_the_value(config, tmp_path, capsys):
    cached = ["--set", f"cache={{dir: {tmp_path / 'cache'}}}", "data.center_crop=true", "train.max_steps=1"]
    assert train(config, tmp_path / "a", *cached, AUTO) == 0
    assert train(config, tmp_path / "b", *cached, "model.vae_precision=fp32") == 0
    assert train(config, tmp_path / "c", *cached, "model.vae_precision=bf16") == 0
    assert len(list((tmp_path / "cache").iterdir())) == 3  # latents in bf16, latents in fp32, text
