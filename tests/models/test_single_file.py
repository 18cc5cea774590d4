from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from original_layout import clip_tensors, open_clip_tensors, unet_tensors, vae_tensors, write_original
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.models.base import Components, Provenance
from trainer.models.clip_bpe import OPENAI_MERGES, clip_tokenizer, openai_merges
from trainer.models.folder import save_diffusers_folder
from trainer.models.sd import StableDiffusion
from trainer.models.single_file import CONFIGS, check_single_file, load_original
from trainer.models.tiny import Tiny

CAPTION = "a photo of an astronaut riding a horse"


def tiny_with_clip_tokens(pad_token: str) -> Components:
    """The tiny set with CLIP's own vocabulary, as files in the original layout have it."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny = Tiny().load(seed=5)
    tokenizer = clip_tokenizer(openai_merges(), pad_token)
    config = CLIPTextConfig.from_dict(tiny.text_encoder.config.to_dict() | {"vocab_size": len(tokenizer)})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder = CLIPTextModel(config).eval()
        return Components.of(tiny.unet, tiny.vae, encoder, tokenizer, tiny.scheduler, tiny.provenance)


@pytest.fixture(scope="module")
def tiny() -> Components:
    return tiny_with_clip_tokens("<|endoftext|>")


@pytest.fixture(scope="module")
def config_dir(tiny: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config")
    save_diffusers_folder(tiny, path)
    for weights in path.rglob("*.safetensors"):
        weights.unlink()
    return path


@pytest.fixture(scope="module")
def original(tiny: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that no test changes."""
    return write_original(tiny, tmp_path_factory.mktemp("original") / "model.safetensors")


@pytest.fixture(scope="module")
def tensors(original: Path) -> dict[str, torch.Tensor]:
    """What `original` holds, to write it with something changed."""
    return load_file(original)


@pytest.fixture
def file(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copy(original, tmp_path))


def outputs(components: Components) -> list[torch.Tensor]:
    family = Tiny()
    generator = torch.Generator().manual_seed(0)
    pixels, x_t = torch.rand(1, 3, 40, 40, generator=generator), torch.randn(2, 4, 5, 5, generator=generator)
    tokens, _ = family.tokenize(components.tokenizer, [CAPTION, ""])
    with torch.no_grad():
        cond = family.encode_text(components.text_encoder, tokens)
        latents = components.vae.encode(pixels).latent_dist.parameters  # pyright: ignore
        decoded = components.vae.decode(x_t, return_dict=False)[0]  # pyright: ignore
        return [tokens, cond, latents, decoded, family.predict(components.unet, x_t, torch.tensor([9, 700]), cond)]


def assert_same_outputs(a: Components, b: Components) -> None:
    for name, left, right in zip(("tokens", "text", "latents", "pixels", "unet"), outputs(a), outputs(b), strict=True):
        assert torch.equal(left, right), name


def test_a_1x_file_gives_the_same_outputs_bit_for_bit(tiny: Components, config_dir: Path, original: Path):
    assert_same_outputs(load_original(original, config_dir), tiny)


def test_a_2x_file_with_open_clip_gives_the_same_outputs_bit_for_bit(config_dir: Path, tmp_path: Path):
    tiny = tiny_with_clip_tokens("!")
    save_diffusers_folder(tiny, tmp_path / "config")
    file = write_original(tiny, tmp_path / "model.safetensors", open_clip=True)
    loaded = load_original(file, tmp_path / "config")
    assert_same_outputs(loaded, tiny)
    assert loaded.tokenizer.pad_token_id == 0


def test_a_text_encoder_under_the_older_names_loads_too(
    tiny: Components, config_dir: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
):
    file = tmp_path / "model.safetensors"
    save_file({key.replace("transformer.text_model.", "transformer."): each for key, each in tensors.items()}, file)
    assert_same_outputs(load_original(file, config_dir), tiny)


def test_half_precision_files_load_as_fp32(
    tiny: Components, config_dir: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
):
    file = tmp_path / "model.safetensors"
    save_file({key: value.half() for key, value in tensors.items()}, file)
    loaded = load_original(file, config_dir)
    for name in ("unet", "vae", "text_encoder"):
        weights, original = getattr(loaded, name).state_dict(), getattr(tiny, name).state_dict()
        assert all(value.dtype == torch.float32 for value in weights.values())
        assert all(torch.equal(value, original[key].half().float()) for key, value in weights.items())


def test_what_else_a_published_file_holds_does_not_matter(
    tiny: Components, config_dir: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
):
    file = tmp_path / "model.safetensors"
    extras = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "model_ema.decay": torch.tensor(0.9999),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.loss.logvar": torch.zeros(1),
        "alphas_cumprod": torch.zeros(1000),
    }
    save_file(tensors | extras, file)
    assert_same_outputs(load_original(file, config_dir), tiny)


def test_loaded_weights_no_longer_hang_on_the_file(config_dir: Path, file: Path):
    loaded = load_original(file, config_dir)
    before = outputs(loaded)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(loaded), strict=True))
    for name in ("unet", "vae", "text_encoder"):
        network: torch.nn.Module = getattr(loaded, name)
        assert not network.training
        assert not any(parameter.is_meta for parameter in network.parameters())
        assert all(parameter.requires_grad == (name == "unet") for parameter in network.parameters())


def test_only_the_1x_config_says_that_it_predicts_noise():
    read = {}
    for name in ("sd15", "sd21"):
        read[name] = json.loads((CONFIGS / name / "scheduler" / "scheduler_config.json").read_text())
    assert read["sd15"]["prediction_type"] == "epsilon"
    assert "prediction_type" not in read["sd21"]


@pytest.mark.parametrize("said, meant", [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_the_prediction_type_in_a_files_metadata_counts(
    tiny: Components, config_dir: Path, tmp_path: Path, said: str, meant: str
):
    file = write_original(tiny, tmp_path / "m.safetensors", metadata={"modelspec.prediction_type": said})
    assert load_original(file, config_dir).scheduler["prediction_type"] == meant


def published(name: str) -> Components:
    """The networks of a shipped config, without memory for their weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = str(CONFIGS / name)

    def empty(cls: Any, part: str) -> Any:
        return cls.from_config(cls.load_config(folder, subfolder=part))

    with torch.device("meta"):
        return Components.of(
            unet=empty(UNet2DConditionModel, "unet"),
            vae=empty(AutoencoderKL, "vae"),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")),
            tokenizer=None,  # pyright: ignore[reportArgumentType]
            scheduler={},
            provenance=Provenance(name),
        )


# The parameter counts of the published models.
COUNTS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_shipped_configs_describe_the_published_models(name: str):
    networks = published(name)
    for part, count in COUNTS[name].items():
        assert sum(parameter.numel() for parameter in getattr(networks, part).parameters()) == count, part


def test_the_test_layout_is_that_of_published_files():
    """Names and shapes from Stable Diffusion 1.5 and 2.1, so that the tests above prove more than a round trip."""
    v1, v2 = published("sd15"), published("sd21")
    unet, vae, clip = unet_tensors(v1.unet), vae_tensors(v1.vae), clip_tensors(v1.text_encoder)
    assert (len(unet), len(vae), len(clip)) == (686, 248, 196)
    expected = {
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.time_embed.2.weight": (1280, 1280),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.mid.block_2.conv2.weight": (512, 512, 3, 3),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    }
    written = unet | vae | clip
    assert {key: tuple(written[key].shape) for key in expected} == expected

    with torch.device("meta"):
        unet, clip = unet_tensors(v2.unet), open_clip_tensors(v2.text_encoder)
    expected = {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": (3072,),
        "cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.ln_final.weight": (1024,),
    }
    written = unet | clip
    assert {key: tuple(written[key].shape) for key in expected} == expected


def test_the_vocabulary_is_clips(tiny: Components):
    digest = hashlib.sha256(OPENAI_MERGES.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert len(tiny.tokenizer) == 49408
    ids = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407]  # as published for CLIP
    assert tiny.tokenizer(CAPTION).input_ids == ids


def header_only(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return path


K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
VAE, CLIP = "first_stage_model.encoder.conv_in.weight", "cond_stage_model.transformer.text_model.final_layer_norm.bias"
OPEN_CLIP = "cond_stage_model.model.ln_final.bias"


@pytest.mark.parametrize("width, text, name", [(768, CLIP, "sd15"), (1024, OPEN_CLIP, "sd21")])
def test_the_config_is_chosen_by_the_width_of_the_text(tmp_path: Path, width: int, text: str, name: str):
    file = header_only(tmp_path / "m.safetensors", {K: (4, width), VAE: (1,), text: (1,)})
    assert check_single_file(file) == name


@pytest.mark.parametrize(
    "keys, said",
    [
        ([K.replace("input_blocks.1", "input_blocks.4"), "conditioner.embedders.0.x"], "seems to be SDXL"),
        ([K, VAE, CLIP, "model.diffusion_model.label_emb.0.0.weight"], "an unCLIP model"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "seems to be a LoRA"),
        (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "seems to be a LoRA"),
        (["down_blocks.0.resnets.0.norm1.weight", "conv_in.weight"], "seems to be the UNet alone"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "seems to be the VAE alone"),
        (["text_model.final_layer_norm.weight"], "seems to be the text encoder alone"),
        (["control_model.input_blocks.0.0.weight"], "seems to be a ControlNet"),
        (["emb_params"], "seems to be a textual inversion"),
        ([VAE, CLIP], "there is no UNet"),
        (["model.diffusion_model.joint_blocks.0.x", VAE, CLIP], "not the UNet of Stable Diffusion"),
        ([K, CLIP], r"there is no VAE \(first_stage_model"),
        ([K, VAE], r"there is no text encoder \(cond_stage_model"),
        ([K, VAE, CLIP], "width 640; that of Stable Diffusion 1.x is 768"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_what_it_seems_to_be(tmp_path: Path, keys: list[str], said: str):
    file = header_only(tmp_path / "m.safetensors", dict.fromkeys(keys, (4, 640)))
    with pytest.raises(UserError, match=said) as caught:
        StableDiffusion(pretrained=str(file)).check()
    assert caught.value.fix
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"PK\x03\x04" + bytes(100), bytes(64), b"\x10" + bytes(7) + b"[" * 16]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="no safetensors file"):
        StableDiffusion(pretrained=str(tmp_path / "m.safetensors")).check()


def test_an_inpainting_file_is_named_as_such(tmp_path: Path):
    shapes: dict[str, tuple[int, ...]] = {"model.diffusion_model.input_blocks.0.0.weight": (4, 9, 3, 3)}
    shapes |= dict.fromkeys([K, VAE, CLIP], (4, 768))
    file = header_only(tmp_path / "m.safetensors", shapes)
    with pytest.raises(UserError, match="takes 9 channels: it seems to be an inpainting model"):
        StableDiffusion(pretrained=str(file)).check()


def test_a_file_that_was_cut_short_is_refused_before_anything_is_loaded(file: Path):
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 1000)
    with pytest.raises(UserError, match=f"cut short: {size - 1000} of {size} bytes"):
        StableDiffusion(pretrained=str(file)).check()


@pytest.mark.parametrize(
    "gone, part",
    [
        ("model.diffusion_model.middle_block.0.in_layers.2.weight", "unet"),
        ("first_stage_model.decoder.conv_in.bias", "vae"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias", "text_encoder"),
    ],
)
def test_a_file_that_lacks_a_tensor_is_refused_by_its_name(
    config_dir: Path, tensors: dict[str, torch.Tensor], tmp_path: Path, gone: str, part: str
):
    file = tmp_path / "model.safetensors"
    assert gone in tensors
    save_file({key: value for key, value in tensors.items() if key != gone}, file)
    with pytest.raises(UserError, match=f"lacks 1 of the {part}'s tensors"):
        getattr(load_original(file, config_dir), part)


@pytest.mark.parametrize(
    "key, part",
    [
        ("model.diffusion_model.out.2.weight", "unet"),
        ("first_stage_model.decoder.conv_in.bias", "vae"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder"),
    ],
)
def test_tensors_of_another_shape_are_refused(
    config_dir: Path, tensors: dict[str, torch.Tensor], tmp_path: Path, key: str, part: str
):
    file = tmp_path / "model.safetensors"
    save_file(tensors | {key: torch.zeros(3)}, file)
    with pytest.raises(UserError, match=f"cannot read the {part}"):
        getattr(load_original(file, config_dir), part)


def test_tensors_that_the_model_has_no_place_for_are_refused(
    config_dir: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
):
    file = tmp_path / "model.safetensors"
    extra = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.fuser.alpha"
    save_file(tensors | {extra: torch.zeros(1)}, file)
    with pytest.raises(UserError, match="unet in the file has 1 tensors too many"):
        _ = load_original(file, config_dir).unet


@pytest.mark.parametrize("option", ["revision", "variant"])
def test_options_that_mean_nothing_for_a_file_are_refused(original: Path, option: str):
    with pytest.raises(UserError, match=f"{option} means nothing"):
        StableDiffusion.model_validate({"pretrained": str(original), option: "fp16"}).check()


def test_provenance_of_a_file_is_its_sha256(original: Path):
    digest = hashlib.sha256(original.read_bytes()).hexdigest()
    facts = Provenance(str(original), None, {original.name: digest})
    assert StableDiffusion(pretrained=str(original)).provenance() == facts
