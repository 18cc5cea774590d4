"""Stable Diffusion 1.5 at its real size, from a local diffusers folder of random weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import trainer.models

CONFIGS = Path(trainer.models.__file__).parent / "sd_configs" / "sd15"
NEEDED_GIB = 17  # weights, gradients and AdamW of 860 M parameters are 12.8 GiB

CONFIG = """\
model: {{kind: sd, pretrained: {folder}}}
data: {{kind: shapes, image_size: 128, num_workers: 0}}
train: {{max_steps: 1, global_batch_size: 1}}
objective: {{kind: epsilon}}
lr: {{peak: 1e-5}}
"""

WRITE_FOLDER = """\
import json, sys, torch
from pathlib import Path
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from trainer.models.base import Components, Provenance
from trainer.models.clip_bpe import clip_tokenizer, openai_merges
from trainer.models.folder import save_diffusers_folder

configs, folder = Path(sys.argv[1]), Path(sys.argv[2])
config = lambda name: json.loads((configs / name / "config.json").read_text())
save_diffusers_folder(
    Components.of(
        unet=UNet2DConditionModel.from_config(config("unet")),
        vae=AutoencoderKL.from_config(config("vae")),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_dict(config("text_encoder"))),
        tokenizer=clip_tokenizer(openai_merges()),
        scheduler=json.loads((configs / "scheduler" / "scheduler_config.json").read_text()),
        provenance=Provenance("random"),
    ),
    folder,
)
"""


@pytest.mark.slow
@pytest.mark.text2image
def test_a_full_step_at_real_size_fits_and_a_dry_run_names_its_memory(tmp_path):
    if psutil.virtual_memory().available < NEEDED_GIB * 2**30:
        pytest.skip(f"needs {NEEDED_GIB} GiB of free memory")
    folder = tmp_path / "sd15"
    # In processes of their own, so that their memory is given back.
    subprocess.run([sys.executable, "-c", WRITE_FOLDER, str(CONFIGS), str(folder)], check=True, timeout=600)
    assert json.loads((folder / "model_index.json").read_text())["unet"][1] == "UNet2DConditionModel"
    config = tmp_path / "full.yaml"
    config.write_text(CONFIG.format(folder=folder))
    command = [sys.executable, "-m", "trainer", "train", "--config", str(config), "--output-dir", str(tmp_path / "run")]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unet 860 M trained" in done.stdout
    gib = {name.strip(): float(size) for name, size in re.findall(r"^  (.+?) +(-?[\d.]+) GiB$", done.stdout, re.M)}
    assert gib["trained weights"] == gib["gradients"] == pytest.approx(3.202, abs=0.001)
    assert gib["optimizer (adamw)"] == pytest.approx(2 * 3.202, abs=0.002)
    assert 13.5 < gib["peak of rank 0, measured"] < 15.5
    assert not (tmp_path / "run").exists()
