"""The networks that the GPU benchmarks measure and count: their configs, and the shapes of what they take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 77  # of a caption


@dataclass(frozen=True)
class Network:
    """A UNet's config, and the parts of a batch that depend on it."""

    name: str
    unet: dict[str, Any]

    @property
    def text_width(self) -> int:
        """Width of the text condition, which is [B, TOKENS, width]."""
        return self.unet["cross_attention_dim"]

    def latents(self, batch: int, pixels: int) -> tuple[int, int, int, int]:
        """Shape of the latents of square pictures of that many pixels a side."""
        return batch, self.unet["in_channels"], pixels // 8, pixels // 8


def network(name: str) -> Network:
    """`sd15`, `sd21` or `sdxl`."""
    shipped = ROOT / "trainer/models/sd_configs" / name / "unet/config.json"
    path = ROOT / "benchmarks/sdxl_unet.json" if name == "sdxl" else shipped
    return Network(name, json.loads(path.read_text()))
