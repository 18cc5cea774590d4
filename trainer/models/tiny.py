from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from trainer.errors import UserError
from trainer.models.base import Components, Provenance, sha256, sha256_of
from trainer.models.clip_bpe import MAX_LENGTH, clip_tokenizer, merges_for
from trainer.models.folder import read_json
from trainer.models.unet_clip import UNetClip
from trainer.rng import draw_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BUILTIN_VAE = Path(__file__).parent / "builtin_vae"  # docs/demo_vae.md says how it was made
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
TEXT_WIDTH = 64

Network = TypeVar("Network", bound="nn.Module")

# The words of simple captions, one token each. Their order is part of the tokenizer: add new ones at the end.
WORDS = """
    a an the of on in at with and or is no not to from for by near under over above below behind beside between
    red green blue yellow orange purple pink brown black white gray grey cyan magenta teal violet gold silver
    circle square triangle star cross diamond ring heart hexagon pentagon ellipse oval rectangle line dot arrow shape
    small large big little tiny huge medium tall short wide thin thick striped dotted solid plain bright dark light
    zero one two three four five six seven eight nine ten some many few several pair
    background photo picture image drawing painting sketch illustration portrait close up view scene left right
    top bottom center middle side front back inside outside
    cat dog bird fish horse cow sheep bear lion tiger fox rabbit mouse frog duck elephant monkey animal
    man woman person people child boy girl face hand eye tree flower grass leaf mountain river lake sea ocean sky
    cloud sun moon night day snow rain fire water city street house building room window door table chair car bus
    train boat plane bike road ball box cup book food fruit apple banana s t
    navy lime olive maroon indigo turquoise beige cream crescent plus cube sphere cylinder cone lower upper
""".split()  # noqa: SIM905


WEIGHTS = "tiny 1"  # counts up when other weights are drawn from a seed, so that caches know
VAE_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "latent_channels": 4,
    "block_out_channels": (8, 16, 24, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 4.0,  # means of random weights have a root mean square of 0.2 to 0.3, whatever the picture
}

# Without `prediction_type`: these weights were not trained to predict anything.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class Tiny(UNetClip):
    """A complete random set in the shape of Stable Diffusion, small enough to train on one CPU core."""

    kind = "tiny"

    vae: str = Field(
        default="random",
        description="`random`: weights made on the spot, whose pictures are noise. `builtin`: the VAE that comes with "
        "the package, trained on the `shapes` source at 64 pixels. Otherwise a diffusers folder that holds one.",
    )
    unet_channels: tuple[int, ...] = Field(
        default=(32, 40),
        min_length=1,
        max_length=4,
        description="Channels of the UNet at each resolution, from that of the latents down by halves; multiples of 8.",
    )
    unet_attention_levels: tuple[int, ...] = Field(
        default=(0,),
        description="The resolutions, 0 for that of the latents, that attend to themselves and to the text, as the "
        "middle always does.",
    )
    unet_head_width: int = Field(
        default=8, ge=8, le=128, description="Channels of an attention head; wider ones are fewer, and faster on a CPU."
    )
    prompt_tokens: int = Field(
        default=MAX_LENGTH,
        ge=8,
        le=MAX_LENGTH,
        description="Tokens of a prompt, start and end included, that the text encoder reads and the UNet attends to; "
        "captions that need more are cut, and counted.",
    )

    @field_validator("unet_channels")
    @classmethod
    def _groups_of_eight(cls, channels: tuple[int, ...]) -> tuple[int, ...]:
        if wrong := [width for width in channels if not 8 <= width <= 1024 or width % 8]:
            raise ValueError(f"{wrong[0]} is not a multiple of 8 from 8 to 1024")
        return channels

    @model_validator(mode="after")
    def _levels_and_heads_exist(self) -> Self:
        levels = len(self.unet_channels)
        if wrong := [level for level in self.unet_attention_levels if not 0 <= level < levels]:
            raise ValueError(
                f"unet_attention_levels: {wrong[0]} is none of the {levels} levels, which are counted from 0"
            )
        attending = [self.unet_channels[level] for level in (*self.unet_attention_levels, levels - 1)]
        if wrong := [width for width in attending if width % self.unet_head_width]:
            raise ValueError(f"unet_head_width: heads of {self.unet_head_width} do not divide {wrong[0]} channels")
        return self

    def check(self) -> None:
        if self.vae == "random":
            return
        for name in VAE_FILES:
            if not (self._vae_folder() / name).is_file():
                raise UserError(
                    f"{self.vae!r} is neither `random` nor `builtin`, nor a folder with {' and '.join(VAE_FILES)}",
                    "model.vae",
                    "give the folder that `AutoencoderKL.save_pretrained` or scripts/train_demo_vae.py wrote",
                )

    def provenance(self) -> Provenance:
        if self.vae == "random":
            return Provenance(source="tiny")
        name = "the built-in VAE" if self.vae == "builtin" else f"the VAE in {self.vae}"
        weights = VAE_FILES[1]
        return Provenance(source=f"tiny with {name}", files={f"vae/{weights}": sha256(self._vae_folder() / weights)})

    def load_tokenizer(self) -> CLIPTokenizer:
        return clip_tokenizer(merges_for(WORDS), max_length=self.prompt_tokens)

    def load(self, seed: int) -> Components:
        tokenizer = self.load_tokenizer()
        random = self.vae == "random"
        vae_config = dict(VAE_CONFIG) if random else read_json(self._vae_folder() / VAE_FILES[0])
        text_config = tiny_text_config(tokenizer)
        unet_config = self._unet_config(vae_config["latent_channels"])

        def hashes() -> dict[str, str]:
            vae = f"{WEIGHTS} {seed}" if random else sha256_of([self._vae_folder() / name for name in VAE_FILES])
            return {"vae": vae, "text_encoder": f"{WEIGHTS} {seed} {len(tokenizer)} {self.prompt_tokens}"}

        return self.fitting(
            Components(
                tokenizer=tokenizer,
                scheduler=dict(SCHEDULER),
                provenance=self.provenance(),
                unet_config=unet_config,
                vae_config=vae_config,
                text_config=text_config,
                load_unet=lambda: _seeded(seed, "unet", lambda: tiny_unet(unet_config)),
                load_vae=lambda: _seeded(seed, "vae", tiny_vae) if random else vae_from(self._vae_folder()),
                load_text_encoder=lambda: _seeded(seed, "text_encoder", lambda: tiny_text_encoder(text_config)),
                hash_encoders=hashes,
            )
        )

    def _vae_folder(self) -> Path:
        return BUILTIN_VAE if self.vae == "builtin" else Path(self.vae)

    def _unet_config(self, latent_channels: int) -> dict[str, Any]:
        attends = [level in self.unet_attention_levels for level in range(len(self.unet_channels))]
        return {
            "sample_size": 8,
            "in_channels": latent_channels,
            "out_channels": latent_channels,
            "block_out_channels": self.unet_channels,
            "down_block_types": tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
            "up_block_types": tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            # The number of heads, by an old misnomer of diffusers.
            "attention_head_dim": tuple(max(1, width // self.unet_head_width) for width in self.unet_channels),
            "cross_attention_dim": TEXT_WIDTH,
        }


def tiny_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """0.46 M parameters with the defaults; latents of any size from 4x4 up, text of width 64."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def tiny_vae() -> AutoencoderKL:
    """0.22 M parameters from pixels to latents an eighth as wide and high, of about unit variance."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(**VAE_CONFIG)
    # As drawn, the posterior has unit variance and would drown its mean: a trained one is all but certain.
    with torch.no_grad():
        vae.quant_conv.bias[4:] -= 8  # log variance  # pyright: ignore
    return vae


def vae_from(folder: Path = BUILTIN_VAE) -> AutoencoderKL:
    """The VAE in a diffusers folder, fp32; the built-in one takes 64 px shapes to [8, 8, 8] latents and back."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True).eval()


def tiny_text_encoder(config: CLIPTextConfig) -> CLIPTextModel:
    """A text encoder with weights of the moment; 0.22 M parameters as `tiny_text_config` has it."""
    from transformers import CLIPTextModel

    return CLIPTextModel(config)


def tiny_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Three layers of width 64."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,  # pyright: ignore
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore
    )


def _seeded(seed: int, name: str, build: Callable[[], Network]) -> Network:
    """What `build` makes, by (seed, name) alone, the global random state left as it was."""
    import torch

    # Only the CPU's generator, where weights are drawn: torch.manual_seed would also re-seed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(draw_seed(seed, f"weights/{name}", 0))
        return build().eval()
