from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field

from trainer.models.base import Components, Provenance, sha256
from trainer.models.clip_bpe import clip_tokenizer, merges_for
from trainer.models.unet_clip import UNetClip
from trainer.rng import draw_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTokenizer

BUILTIN_VAE = Path(__file__).parent / "builtin_vae"

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

    vae: Literal["random", "builtin"] = Field(
        default="random",
        description="The VAE: random weights made on the spot, whose pictures are noise; or the one that comes with "
        "the package, trained on the `shapes` source at 64 pixels.",
    )
    unet_width: int = Field(
        default=32, ge=32, le=256, multiple_of=32, description="Channels of the UNet at full latent resolution."
    )

    def check(self) -> None:
        pass

    def provenance(self) -> Provenance:
        if self.vae == "random":
            return Provenance(source="tiny")
        weights = BUILTIN_VAE / "diffusion_pytorch_model.safetensors"
        return Provenance(source="tiny with the built-in VAE", files={f"vae/{weights.name}": sha256(weights)})

    def load(self, seed: int) -> Components:
        tokenizer = clip_tokenizer(merges_for(WORDS))
        vae = builtin_vae() if self.vae == "builtin" else _seeded(seed, "vae", tiny_vae)
        return self.fitting(
            Components(
                unet=_seeded(seed, "unet", lambda: tiny_unet(self.unet_width, vae.config["latent_channels"])),
                vae=vae,
                text_encoder=_seeded(seed, "text_encoder", lambda: tiny_text_encoder(tokenizer)),
                tokenizer=tokenizer,
                scheduler=dict(SCHEDULER),
                provenance=self.provenance(),
            )
        )


def tiny_unet(width: int = 32, latent_channels: int = 4) -> UNet2DConditionModel:
    """0.46 M parameters (width 32) over two resolutions: latents of any size from 4x4 up, text of width 64."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(width, width * 5 // 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        # The number of heads, by an old misnomer of diffusers: each is 8 wide.
        attention_head_dim=(width // 8, width * 5 // 32),  # pyright: ignore[reportArgumentType]
        cross_attention_dim=64,
    )


def tiny_vae() -> AutoencoderKL:
    """0.22 M parameters from pixels to latents an eighth as wide and high, of about unit variance."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(
        sample_size=64,
        latent_channels=4,
        block_out_channels=(8, 16, 24, 32),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=4.0,  # means of random weights have a root mean square of 0.2 to 0.3, whatever the picture
    )
    # As drawn, the posterior has unit variance and would drown its mean: a trained one is all but certain.
    with torch.no_grad():
        vae.quant_conv.bias[4:] -= 8  # log variance  # pyright: ignore
    return vae


def builtin_vae() -> AutoencoderKL:
    """The VAE that comes with the package, fp32: 64 px shapes to [8, 8, 8] latents and back (docs/demo_vae.md)."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_pretrained(BUILTIN_VAE, torch_dtype=torch.float32, use_safetensors=True).eval()


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """0.22 M parameters in three layers of width 64."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,  # pyright: ignore
            eos_token_id=tokenizer.eos_token_id,  # pyright: ignore
            pad_token_id=tokenizer.pad_token_id,  # pyright: ignore
        )
    )


def _seeded(seed: int, name: str, build: Callable[[], Network]) -> Network:
    """What `build` makes, by (seed, name) alone, the global random state left as it was."""
    import torch

    # Only the CPU's generator, where weights are drawn: torch.manual_seed would also re-seed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(draw_seed(seed, f"weights/{name}", 0))
        return build().eval()
