"""What all families of a UNet conditioned on one CLIP text encoder share (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trainer.errors import UserError
from trainer.models.base import Components, ModelFamily

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor, nn
    from transformers import CLIPTextModel, CLIPTokenizer


class UNetClip(ModelFamily):
    """A UNet over VAE latents, conditioned on one CLIP text encoder."""

    blocks = ("ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer")

    clip_skip: int = Field(
        default=0, ge=0, le=11, description="How many of the text encoder's last layers to skip; 0 uses the last one."
    )
    prompt_chunks: int = Field(
        default=1,
        ge=1,
        le=8,
        description="Chunks of 75 tokens a caption may fill; longer captions are cut, and counted.",
    )

    def fitting(self, components: Components) -> Components:
        """`components` as given; raises UserError if they do not fit together or cannot do what the config asks."""
        unet, latents = components.unet_config["in_channels"], components.vae_config["latent_channels"]
        if unet != latents:
            raise UserError(
                f"the UNet takes {unet} channels but the VAE makes {latents}: it {task_of(unet)}",
                components.provenance.source,
                "give a text-to-image model",
            )
        text = components.text_config
        attends = components.unet_config["cross_attention_dim"]
        if attends != text.hidden_size:
            raise UserError(
                f"the UNet attends to text of width {attends} but the text encoder's is {text.hidden_size}",
                components.provenance.source,
                "give a model whose UNet and text encoder were made for each other",
            )
        if len(components.tokenizer) > text.vocab_size:
            raise UserError(
                f"the tokenizer has {len(components.tokenizer)} tokens but the text encoder knows {text.vocab_size}",
                components.provenance.source,
                "give a model whose tokenizer and text encoder were made for each other",
            )
        if self.clip_skip >= text.num_hidden_layers:
            raise UserError(
                f"{self.clip_skip} layers to skip, but the text encoder has {text.num_hidden_layers}",
                "model.clip_skip",
                f"at most {text.num_hidden_layers - 1}",
            )
        return components

    def trainable(self, components: Components) -> dict[str, nn.Module]:
        if not self.train_text_encoder:
            return {"unet": components.unet}
        components.text_encoder.requires_grad_(True)
        # Skipped layers get no gradient, and a wrapper that waits for one from each parameter would wait for ever.
        layers = components.text_encoder.encoder.layers
        layers[len(layers) - self.clip_skip :].requires_grad_(False)
        return {"unet": components.unet, "text_encoder": components.text_encoder}

    def tokenize(self, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> tuple[Tensor, int]:
        import torch

        length = tokenizer.model_max_length
        words = length - 2  # beside bos and eos
        room = self.prompt_room(tokenizer)
        rows, cut = [], 0
        for ids in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids:
            cut += len(ids) > room
            chunks = [ids[start : start + words] for start in range(0, room, words)]
            rows.append([_padded(tokenizer, chunk, length) for chunk in chunks])
        return torch.tensor(rows, dtype=torch.int64), cut

    def token_counts(self, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[int]:
        ids = tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids if captions else []
        return [len(each) for each in ids]

    def prompt_room(self, tokenizer: CLIPTokenizer) -> int:
        return self.prompt_chunks * (tokenizer.model_max_length - 2)  # beside bos and eos

    def encode_text(self, text_encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
        batch, chunks, length = tokens.shape
        flat = tokens.reshape(batch * chunks, length)
        if self.clip_skip == 0:
            hidden = text_encoder(flat).last_hidden_state
        else:
            layers = text_encoder(flat, output_hidden_states=True).hidden_states
            hidden = text_encoder.final_layer_norm(layers[-1 - self.clip_skip])
        return hidden.reshape(batch, chunks * length, -1)

    def predict(self, unet: UNet2DConditionModel, x_t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        return unet(x_t, time, encoder_hidden_states=cond, return_dict=False)[0]

    def latent_shape(self, vae_config: Mapping[str, Any], width: int, height: int) -> tuple[int, int, int]:
        factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        return vae_config["latent_channels"], height // factor, width // factor

    def text_recipe(self) -> dict[str, Any]:
        return {"clip_skip": self.clip_skip, "prompt_chunks": self.prompt_chunks}


def task_of(channels: int) -> str:
    """What a UNet of Stable Diffusion with other than 4 input channels seems to be, as the end of a sentence."""
    tasks = {9: "an inpainting model", 8: "an image-editing model", 7: "an upscaler", 5: "a depth model"}
    return f"seems to be {tasks.get(channels, 'made for another task')}"


def _padded(tokenizer: CLIPTokenizer, chunk: list[int], length: int) -> list[int]:
    ids = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (length - len(ids))
