"""What all families of a UNet conditioned on one CLIP text encoder share (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.models.base import Components, ModelFamily

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel


class UNetClip(ModelFamily):
    """A UNet over VAE latents, conditioned on one CLIP text encoder."""

    clip_skip: int = Field(
        0, ge=0, le=11, description="How many of the text encoder's last layers to skip; 0 uses the last one."
    )
    prompt_chunks: int = Field(
        1, ge=1, le=8, description="Chunks of 75 tokens a caption may fill; longer captions are cut, and counted."
    )

    def tokenize(self, components: Components, captions: Sequence[str]) -> tuple[Tensor, int]:
        import torch

        tokenizer = components.tokenizer
        length = tokenizer.model_max_length
        room = self.prompt_chunks * (length - 2)
        rows, cut = [], 0
        for ids in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids:
            cut += len(ids) > room
            chunks = [ids[start : start + length - 2] for start in range(0, room, length - 2)]
            rows.append(
                [
                    ([tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * length)[:length]
                    for chunk in chunks
                ]
            )
        return torch.tensor(rows, dtype=torch.int64), cut

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

    def latent_shape(self, components: Components, image_size: int) -> tuple[int, int, int]:
        factor = 2 ** (len(components.vae.config["block_out_channels"]) - 1)
        return components.vae.config["latent_channels"], image_size // factor, image_size // factor
