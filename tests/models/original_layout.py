"""Test-only: the components of a model in the original (latent diffusion) layout, as published single files have it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from trainer.models.base import Components

if TYPE_CHECKING:
    from transformers import CLIPTextModel

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_original(
    components: Components, path: Path, open_clip: bool = False, metadata: dict[str, str] | None = None
) -> Path:
    text = open_clip_tensors if open_clip else clip_tensors
    tensors = unet_tensors(components.unet) | vae_tensors(components.vae) | text(components.text_encoder)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return path


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    per_block = unet.config["layers_per_block"] + 1
    attending = ["Attn" in kind for kind in unet.config["up_block_types"]]
    return {
        f"model.diffusion_model.{_unet_key(key, per_block, attending)}": value.detach().clone()
        for key, value in unet.state_dict().items()
    }


def _unet_key(key: str, per_block: int, attending: list[bool]) -> str:
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    match = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    if match:
        direction, block, layer, rest = match[1], int(match[2]), int(match[4]), match[5]
        if match[3] == "downsamplers":
            return f"input_blocks.{per_block * (block + 1)}.0.{rest.replace('conv', 'op')}"
        if match[3] == "upsamplers":  # behind the block's last resnet, and behind its attention if there is one
            return f"output_blocks.{per_block * (block + 1) - 1}.{1 + attending[block]}.{rest}"
        base = f"input_blocks.{1 + per_block * block + layer}" if direction == "down_blocks" else ""
        base = base or f"output_blocks.{per_block * block + layer}"
        return f"{base}.0.{_renamed(rest, RESNET)}" if match[3] == "resnets" else f"{base}.1.{rest}"
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key)
    assert match, key
    if match[1] == "attentions":
        return f"middle_block.1.{match[3]}"
    return f"middle_block.{2 * int(match[2])}.{_renamed(match[3], RESNET)}"


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    blocks = len(vae.config["block_out_channels"])
    out = {}
    for key, value in vae.state_dict().items():
        name = _vae_key(key, blocks)
        conv = ".attn_1." in name and ".norm." not in name and name.endswith(".weight")
        # The original attends with 1x1 convolutions.
        out[f"first_stage_model.{name}"] = (value[:, :, None, None] if conv else value).detach().clone()
    return out


def _vae_key(key: str, blocks: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda match: f"up.{blocks - 1 - int(match[1])}.block.", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{blocks - 1 - int(match[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    match = re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)", key)
    return f"{match[1]}mid.attn_1.{_renamed(match[2], VAE_ATTENTION)}" if match else key


def clip_tensors(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    return {
        f"cond_stage_model.transformer.text_model.{key}": value.detach().clone()
        for key, value in text_encoder.state_dict().items()
    }


def open_clip_tensors(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """As OpenCLIP writes them, with one more layer than Stable Diffusion 2 uses, and a projection."""
    import torch

    weights = text_encoder.state_dict()
    ends = {
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
        "text_projection": torch.eye(len(weights["final_layer_norm.bias"])),
        "logit_scale": torch.tensor(4.6),
    }
    blocks: dict[str, Tensor] = {}
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    count = text_encoder.config.num_hidden_layers
    for layer in range(count):
        ours, theirs = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            for a, b in parts.items():
                blocks[f"{theirs}{b}.{kind}"] = weights[f"{ours}{a}.{kind}"]
            blocks[f"{theirs}attn.out_proj.{kind}"] = weights[f"{ours}self_attn.out_proj.{kind}"]
            joint = [weights[f"{ours}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            blocks[f"{theirs}attn.in_proj_{kind}"] = torch.cat(joint)
    last = f"transformer.resblocks.{count - 1}."
    unused = {key.replace(last, f"transformer.resblocks.{count}."): value for key, value in blocks.items()}
    spare = {key: torch.zeros_like(value) for key, value in unused.items() if f".{count}." in key}
    return {f"cond_stage_model.model.{key}": value.clone() for key, value in (ends | blocks | spare).items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    return key
