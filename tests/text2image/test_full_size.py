"""Stable Diffusion 1.5 at its real size, from a local diffusers folder of random weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import psutil
import pytest
from forked import PLUGINS

NEEDED_GIB = 17  # weights, gradients and AdamW of 860 M parameters are 12.8 GiB

CONFIG = """\
model: {{kind: sd, pretrained: {folder}}}
data: {{kind: shapes, image_size: 128, num_workers: 0}}
train: {{max_steps: 1, global_batch_size: 1}}
objective: {{kind: epsilon}}
lr: {{peak: 1e-5}}
"""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.text2image
def test_a_dry_run_at_real_size_names_the_memory_of_its_step(tmp_path):
    if psutil.virtual_memory().available < NEEDED_GIB * 2**30:
        pytest.skip(f"needs {NEEDED_GIB} GiB of free memory")
    folder = tmp_path / "sd15"
    # In processes of their own, so that their memory is given back; they may use all cores.
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    write = [sys.executable, str(PLUGINS / "write_sd15_folder.py"), str(folder)]
    subprocess.run(write, check=True, env=environment, timeout=600)
    assert json.loads((folder / "model_index.json").read_text())["unet"][1] == "UNet2DConditionModel"
    config = tmp_path / "full.yaml"
    config.write_text(CONFIG.format(folder=folder))
    command = [sys.executable, "-m", "trainer", "train", "--config", str(config), "--output-dir", str(tmp_path / "run")]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unet 860 M trained" in done.stdout
    gib = {name.strip(): float(size) for name, size in re.findall(r"^  (.+?) +(-?[\d.]+) GiB$", done.stdout, re.M)}
    assert gib["trained weights"] == gib["gradients"] == pytest.approx(3.202, abs=0.001)
    assert gib["optimizer (adamw)"] == pytest.approx(2 * 3.202, abs=0.002)
    assert 13.5 < gib["peak of rank 0, measured"] < 15.5
    assert not (tmp_path / "run").exists()
