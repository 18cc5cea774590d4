"""One `.safetensors` file in the original (latent diffusion) layout, read offline with the configs shipped here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.errors import UserError
from trainer.models.base import Components, Provenance, sha256
from trainer.models.clip_bpe import clip_tokenizer, openai_merges
from trainer.models.folder import read_json, reading
from trainer.models.unet_clip import task_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import CLIPTextModel, CLIPTokenizer

CONFIGS = Path(__file__).parent / "sd_configs"
CONFIG_BY_WIDTH = {768: "sd15", 1024: "sd21"}
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
BLOCK = re.compile(
    re.escape(f"{OPEN_CLIP}transformer.resblocks.") + r"(?P<layer>\d+)\.(?P<part>.+)[._](?P<kind>weight|bias)"
)

Network = TypeVar("Network", bound="nn.Module")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    shapes: dict[str, tuple[int, ...]]  # of each tensor, by name
    metadata: dict[str, str]

    def has(self, *prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in self.shapes)

    def text_width(self) -> int | None:
        """The width of the text that the UNet attends to; none if it attends to none."""
        for name, shape in self.shapes.items():
            if name.startswith(UNET) and name.endswith("attn2.to_k.weight"):
                return shape[-1]
        return None


def load_single_file(path: Path) -> Components:
    """The components in fp32 on the CPU, by the shipped config that fits the file."""
    return load_original(path, CONFIGS / check_single_file(path))


def check_single_file(path: Path) -> str:
    """The name of the config that fits, from the file's header alone; raises UserError if it is something else."""
    header = read_header(path)
    _refuse_other_layouts(header, path)
    width = header.text_width()
    if width not in CONFIG_BY_WIDTH:
        raise UserError(
            f"the UNet attends to text of width {width}; that of Stable Diffusion 1.x is 768 wide, of 2.x 1024",
            str(path),
            "give a Stable Diffusion 1.x or 2.x file",
        )
    return CONFIG_BY_WIDTH[width]


def load_original(path: Path, config_dir: Path) -> Components:
    """The components in fp32 on the CPU, as the config files in `config_dir` describe them.

    One component is read after the other: the most memory taken at once is the model and one copy of a part of it.
    `prediction_type` is left out of the scheduler's config where neither the file nor the config says it: a 2.x file
    does not show whether it was trained to predict noise (2.x-base) or v (2.x-768).
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig

    # Not `from_single_file`: on a tensor that is missing it fails without naming it, and one too many it only logs.
    header = read_header(path)
    _refuse_other_layouts(header, path)
    scheduler = read_json(config_dir / "scheduler" / "scheduler_config.json")
    if said := header.metadata.get("modelspec.prediction_type"):
        scheduler["prediction_type"] = {"v": "v_prediction"}.get(said, said)
    return Components(
        tokenizer=tokenizer_of(config_dir),
        scheduler=scheduler,
        provenance=Provenance(str(path)),
        unet_config=read_json(config_dir / "unet" / "config.json"),
        vae_config=read_json(config_dir / "vae" / "config.json"),
        text_config=CLIPTextConfig.from_pretrained(str(config_dir), subfolder="text_encoder", local_files_only=True),
        load_unet=lambda: _diffusion_network(
            UNet2DConditionModel, path, UNET, config_dir, "unet", convert_ldm_unet_checkpoint
        ),
        load_vae=lambda: _diffusion_network(AutoencoderKL, path, VAE, config_dir, "vae", convert_ldm_vae_checkpoint),
        load_text_encoder=lambda: _text_encoder(path, config_dir),
        hash_encoders=lambda: dict.fromkeys(("vae", "text_encoder"), sha256(path)),  # the file is one whole
    )


def tokenizer_of(config_dir: Path) -> CLIPTokenizer:
    """The tokenizer that the config files in `config_dir` describe."""
    return clip_tokenizer(openai_merges(), read_json(config_dir / "tokenizer" / "tokenizer_config.json")["pad_token"])


def read_header(path: Path) -> Header:
    """The header; raises UserError if this is no safetensors file, or one that was cut short."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            content = file.read(length) if 2 <= length <= min(size - 8, 100_000_000) else b""
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}", str(path), "check its permissions") from error
    try:
        header = json.loads(content)
        metadata = header.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("this is no safetensors file", str(path), "download it again, or convert it") from None
    if end > size:
        raise UserError(f"the file was cut short: {size} of {end} bytes", str(path), "download it again")
    return Header(shapes, metadata)


def _refuse_other_layouts(header: Header, path: Path) -> None:
    def refuse(what: str, fix: str) -> None:
        raise UserError(what, str(path), fix)

    base = "give the full file of a Stable Diffusion 1.x or 2.x model"
    if any(re.search(r"lora_|\.lora\.|hada_|lokr_", name) for name in header.shapes):
        refuse("this seems to be a LoRA, not a whole model", base)
    if header.has("conditioner.embedders.", UNET + "label_emb."):
        refuse("this seems to be SDXL, or an unCLIP model", "kind `sd` takes only Stable Diffusion 1.x and 2.x")
    if header.has("control_model.", "controlnet_cond_embedding."):
        refuse("this seems to be a ControlNet, not a whole model", base)
    if header.has("emb_params", "string_to_param"):
        refuse("this seems to be a textual inversion embedding, not a whole model", base)
    part = {"the UNet": "down_blocks.", "the VAE": "encoder.", "the text encoder": "text_model."}
    for name, prefix in part.items():
        if header.has(prefix) and not header.has(UNET):
            refuse(
                f"this seems to be {name} alone, not a whole model in the original layout",
                "for a model in the diffusers layout give its folder, the one that holds unet/",
            )
    if not header.has(UNET):
        refuse("there is no UNet (model.diffusion_model.*) in this file", base)
    if not header.has(UNET + "input_blocks."):
        refuse("the network in this file is not the UNet of Stable Diffusion; it may be SD3, Flux or the like", base)
    if (channels := header.shapes.get(UNET + "input_blocks.0.0.weight", (0, 4))[1]) != 4:
        refuse(f"the UNet takes {channels} channels: it {task_of(channels)}", "give a text-to-image model")
    if not header.has(VAE):
        refuse("there is no VAE (first_stage_model.*) in this file", "merge one into it, or give a full file")
    if not header.has(CLIP, OPEN_CLIP):
        refuse("there is no text encoder (cond_stage_model.*) in this file", "merge one into it, or give a full file")


def _diffusion_network(cls: Any, path: Path, prefix: str, config_dir: Path, name: str, convert: Any) -> Any:
    import torch

    with reading(f"the {name}", path):
        config = cls.load_config(str(config_dir), subfolder=name, local_files_only=True)
        weights = convert(checkpoint=_tensors(path, prefix), config=config)
        with torch.device("meta"):
            network = cls.from_config(config)
    return _filled(network, weights, path, name)


def _text_encoder(path: Path, config_dir: Path) -> CLIPTextModel:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    with reading("the text_encoder", path):
        config = CLIPTextConfig.from_pretrained(str(config_dir), subfolder="text_encoder", local_files_only=True)
        weights = from_clip(_tensors(path, CLIP)) or from_open_clip(_tensors(path, OPEN_CLIP), config.num_hidden_layers)
        with torch.device("meta"):
            encoder = CLIPTextModel(config)
    positions = torch.arange(config.max_position_embeddings)[None]
    encoder.embeddings.register_buffer("position_ids", positions, persistent=False)  # it is in no state dict
    return _filled(encoder, weights, path, "text_encoder")


def _filled(network: Network, weights: dict[str, Tensor], path: Path, name: str) -> Network:
    """`network`, made without memory, with exactly these `weights` as its own."""
    wanted = network.state_dict().keys()
    if missing := sorted(wanted - weights.keys()):
        raise UserError(
            f"the file lacks {len(missing)} of the {name}'s tensors, the first {missing[0]}",
            str(path),
            "download it again, or give the full file of a Stable Diffusion 1.x or 2.x model",
        )
    if spare := sorted(weights.keys() - wanted):
        raise UserError(
            f"the {name} in the file has {len(spare)} tensors too many, the first {spare[0]}",
            str(path),
            "it is a variation of Stable Diffusion that kind `sd` does not know",
        )
    with reading(f"the {name}", path):
        network.load_state_dict(weights, assign=True)
    return network.eval()


def from_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder of a 1.x file under the names of transformers 5; older files lack the inner prefix."""
    unused = ("embeddings.position_ids", "text_projection", "logit_scale")
    weights = {key.removeprefix(CLIP).removeprefix("text_model."): value for key, value in tensors.items()}
    return {key: value for key, value in weights.items() if not key.startswith(unused)}


def from_open_clip(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """OpenCLIP's text tower under the names of transformers 5, its joint q, k, v taken apart.

    Files hold one layer more than the `layers` that Stable Diffusion 2 uses, and a projection: both are left out.
    """
    names = {
        f"{OPEN_CLIP}positional_embedding": "embeddings.position_embedding.weight",
        f"{OPEN_CLIP}token_embedding.weight": "embeddings.token_embedding.weight",
        f"{OPEN_CLIP}ln_final.weight": "final_layer_norm.weight",
        f"{OPEN_CLIP}ln_final.bias": "final_layer_norm.bias",
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key in names:
            out[names[key]] = value
        elif (match := BLOCK.fullmatch(key)) and int(match["layer"]) < layers:
            layer, part, kind = f"encoder.layers.{match['layer']}", match["part"], match["kind"]
            if part == "attn.in_proj":
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    out[f"{layer}.self_attn.{letter}_proj.{kind}"] = third.clone()
            else:
                out[f"{layer}.{parts.get(part, part)}.{kind}"] = value
    return out


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix`, as fp32 copies that no longer hang on the file, with their full names."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name: file.get_tensor(name).to(torch.float32, copy=True) for name in names}
