"""The same pictures train the same run, whatever they are stored in: equal records, equal latents, equal losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_sources_agree import write_datasets, write_folder, write_shards

from trainer.cli import main

CONFIG = """\
model: {{kind: tiny}}
data: {data}
train: {{seed: 7, max_steps: 3, global_batch_size: 4, log_every: 1, deterministic: true}}
objective: {{kind: flow}}
lr: {{peak: 1e-3}}
cache: {{dir: {cache}}}
"""


@pytest.mark.slow
@pytest.mark.text2image
def test_every_source_gives_equal_latents_and_losses(tmp_path: Path, endpoint: str, client: Any):
    folder = write_folder(tmp_path / "folder")
    saved, parquet = write_datasets(tmp_path, folder)
    shards = write_shards(tmp_path / "shards", folder)
    for path in sorted((tmp_path / "shards").iterdir()):
        client.put(str(path), f"pictures/{path.name}")
    in_s3 = {"shards": "s3://pictures/{0000..0001}.tar", "storage_options": {"endpoint_url": endpoint}}
    sources: dict[str, dict[str, Any]] = {
        "imagefolder": {"kind": "imagefolder", "data_root": str(folder)},
        "save_to_disk": {"kind": "hf", "dataset": saved},
        "parquet": {"kind": "hf", "dataset": parquet},
        "webdataset": {"kind": "webdataset", "shards": shards},
        "s3": {"kind": "webdataset", **in_s3},
        "mix": {"kind": "mix", "sources": [{"source": {"kind": "webdataset", "shards": shards}}]},
    }
    latents, lines = {}, {}
    for name, source in sources.items():
        data = source | {"image_size": 32, "center_crop": True, "num_workers": 0, "bucket_step_px": 16}
        config = tmp_path / f"{name}.yaml"
        config.write_text(CONFIG.format(data=json.dumps(data), cache=tmp_path / f"cache-{name}"))
        assert main(["train", "--config", str(config), "--output-dir", str(tmp_path / f"run-{name}")]) == 0
        kept = (tmp_path / f"cache-{name}").glob("*/shard-*")
        latents[name] = {path.name: path.read_bytes() for path in kept}
        read = (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines()
        lines[name] = [{key: json.loads(line)[key] for key in ("batch", "loss", "grad_norm")} for line in read]
    assert len(latents["imagefolder"]) > 1
    for name in sources:
        assert latents[name] == latents["imagefolder"], name
        assert lines[name] == lines["imagefolder"], name
