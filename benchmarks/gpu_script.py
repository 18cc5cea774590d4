"""The logic of diffusers' train_text_to_image.py with `--use_ema --mixed_precision bf16`, over pictures in memory.

Written from knowledge of that script, in its order and with its waits: AdamW and EMAModel as they come, the mean loss
gathered and fetched at every step, the progress bar's loss fetched once more. Encoders are in bf16, as it casts them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from gpu_device import Marks, forget_peak
from gpu_loops import LR, MAX_NORM
from gpu_model import KEPT, shape_of, text_encoder_on, unet_on, vae_on
from gpu_step import SEED, Data, family_of
from networks import TOKENS
from torch import Tensor

VOCABULARY = 100  # token ids are drawn below it, for it is smaller than any text encoder's


class ScriptLoop:
    """That script over batches on the device; with `encoders` it encodes pictures and captions at every step."""

    def __init__(self, data: Data, encoders: bool):
        from accelerate import Accelerator
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from diffusers.optimization import get_scheduler
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
        from diffusers.training_utils import EMAModel
        from tqdm.auto import tqdm

        self.data, self.encoders, step, device = data, encoders, data.step, data.device
        bf16 = step.precision == "bf16"
        self.accelerator: Any = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=device.type == "cpu")
        self.family = family_of(step, device)
        unet: Any = unet_on(device, shape_of(step.model).unet, SEED).train()
        copy = unet_on(device, unet.config, SEED)
        self.ema = EMAModel(copy.parameters(), model_cls=UNet2DConditionModel, model_config=copy.config)
        self.ema.to(device)
        make: Any = DDPMScheduler
        self.noise: Any = make(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        schedule = get_scheduler("constant", optimizer, num_warmup_steps=500, num_training_steps=10_000)
        self.unet, self.optimizer, self.schedule = self.accelerator.prepare(unet, optimizer, schedule)
        self.bar = tqdm(range(step.warm + step.steps), desc="Steps", disable=None)
        if encoders:
            dtype = torch.bfloat16 if bf16 else torch.float32
            self.vae: Any = vae_on(device, step.model).requires_grad_(False).to(dtype=dtype)  # pyright: ignore
            text_encoder: Any = text_encoder_on(device, step.model).requires_grad_(False)
            self.text_encoder: Any = text_encoder.to(dtype=dtype)
            size = (step.batch, 3, step.pixels, step.pixels)
            self.pixels = [torch.rand(size, device=device) * 2 - 1 for _ in range(KEPT)]
            self.tokens = [torch.randint(VOCABULARY, (step.batch, TOKENS), device=device) for _ in range(KEPT)]

    def _inputs(self, number: int) -> tuple[Tensor, Tensor]:
        """Latents and text condition of a step."""
        if not self.encoders:
            return self.data.latents[number % KEPT], self.data.batches[number % KEPT].text
        pixels = self.pixels[number % KEPT].to(self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
        return latents, self.text_encoder(self.tokens[number % KEPT], return_dict=False)[0]

    def run(self, marks: Marks) -> list[float]:
        """Train `warm` and `steps` steps: the loss of each, of noise that it draws itself."""
        step, losses = self.data.step, []
        for number in range(step.warm + step.steps):
            with self.accelerator.accumulate(self.unet):
                latents, cond = self._inputs(number)
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device).long()
                noisy = self.noise.add_noise(latents, noise, timesteps)
                predicted = self.family.predict(self.unet, noisy, timesteps, cond)
                loss = functional.mse_loss(predicted.float(), noise.float(), reduction="mean")
                losses.append(self.accelerator.gather(loss.repeat(step.batch)).mean().item())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.unet.parameters(), MAX_NORM)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.ema.step(self.unet.parameters())
                self.bar.update(1)
            self.bar.set_postfix(step_loss=loss.detach().item(), lr=self.schedule.get_last_lr()[0])
            marks.add()
            if number + 1 == step.warm:
                forget_peak(self.data.device)
        return losses

    def close(self) -> None:
        """Forget the accelerator, so that another one can be made in this process."""
        from accelerate.state import AcceleratorState

        self.bar.close()
        AcceleratorState._reset_state(reset_partial_state=True)
