"""The VAE that comes with the package keeps what a prompt of the demo can name."""

from __future__ import annotations

import hashlib

import pytest

from trainer.data.sources.shapes import Shapes
from trainer.models.tiny import BUILTIN_VAE, Tiny


@pytest.fixture(scope="module")
def pixels():
    import torch

    from trainer.data.transforms import View, as_float, fit, to_pixels

    records = Shapes.model_validate({"image_size": 64, "num_images": 24}).open()
    view = View(64, 64, 0.5, 0.5, flip=False)
    return torch.stack([as_float(to_pixels(fit(records.image(i), view))) for i in range(len(records))])


def test_pictures_of_shapes_come_back_from_the_builtin_vae(pixels):
    import torch

    from trainer.latents import OnlineVae

    vae = OnlineVae(Tiny(vae="builtin").load(seed=0).vae, "fp32")
    x0 = vae.encode(pixels, torch.zeros(len(pixels), 8, 8, 8))
    error = (vae.decode(x0) - pixels).square().mean() / 4  # pixels span [-1, 1]
    assert -10 * torch.log10(error) > 31, "docs/demo_vae.md says 33.5 dB on 500 pictures"
    assert 0.8 < x0.std() < 1.2, "latents of about unit variance, as diffusion wants them"


def test_the_unet_is_made_to_fit_the_builtin_vae():
    family = Tiny(vae="builtin", unet_channels=(64, 80))
    components = family.load(seed=0)
    assert components.unet.config["in_channels"] == components.unet.config["out_channels"] == 8
    assert family.latent_shape(components.vae_config, 64, 64) == (8, 8, 8)


def test_provenance_names_the_weights_of_the_builtin_vae():
    files = Tiny(vae="builtin").provenance().files
    name = "diffusion_pytorch_model.safetensors"
    assert files == {f"vae/{name}": hashlib.sha256((BUILTIN_VAE / name).read_bytes()).hexdigest()}
    assert Tiny().provenance().files is None
