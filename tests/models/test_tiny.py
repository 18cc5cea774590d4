from __future__ import annotations

import hashlib
import json
import unicodedata

import pytest
import torch

from trainer.models.base import Components
from trainer.models.clip_bpe import clip_tokenizer, merges_for, vocabulary
from trainer.models.tiny import WORDS, Tiny

NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def tiny() -> Components:
    return Tiny().load(seed=7)


def weights(components: Components) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value for name in NETWORKS for key, value in getattr(components, name).state_dict().items()
    }


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(tiny: Components):
    with torch.random.fork_rng():
        torch.manual_seed(123)
        torch.randn(5)
        again = weights(Tiny().load(seed=7))
    assert again.keys() == weights(tiny).keys()
    assert all(torch.equal(value, again[key]) for key, value in weights(tiny).items())


def test_another_seed_gives_other_weights(tiny: Components):
    other = weights(Tiny().load(seed=8))
    drawn = [key for key, value in weights(tiny).items() if value.unique().numel() > 1]
    assert drawn
    assert not any(torch.equal(other[key], weights(tiny)[key]) for key in drawn)


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    Tiny().load(seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_network_is_under_half_a_million_parameters(tiny: Components):
    for name in NETWORKS:
        network: torch.nn.Module = getattr(tiny, name)
        assert 100_000 < sum(parameter.numel() for parameter in network.parameters()) < 500_000


@pytest.mark.parametrize("image_size", [32, 40, 48, 56, 64, 72])
def test_any_image_size_from_32_up_in_steps_of_8_goes_through(tiny: Components, image_size: int):
    family = Tiny()
    shape = family.latent_shape(tiny.vae_config, image_size, image_size)
    assert shape == (4, image_size // 8, image_size // 8)
    tokens, _ = family.tokenize(tiny.tokenizer, ["a red circle", "two dogs"])
    with torch.no_grad():
        latents = tiny.vae.encode(torch.rand(2, 3, image_size, image_size)).latent_dist.mean  # pyright: ignore
        assert latents.shape[1:] == shape
        assert tiny.vae.decode(latents, return_dict=False)[0].shape == (2, 3, image_size, image_size)
        cond = family.encode_text(tiny.text_encoder, tokens)
        assert family.predict(tiny.unet, latents, torch.tensor([0, 999]), cond).shape == latents.shape


@pytest.mark.parametrize("seed", range(4))
def test_latents_have_about_unit_variance(seed: int):
    vae = Tiny().load(seed).vae
    colours = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    pictures = torch.nn.functional.interpolate(colours, size=(64, 64))
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist  # pyright: ignore
    mean, std = posterior.mean * vae.config["scaling_factor"], posterior.std * vae.config["scaling_factor"]
    assert 0.5 < mean.square().mean().sqrt() < 1.5
    assert std.max() < 0.2  # the noise of the posterior does not drown it


def test_text_and_time_reach_the_answer(tiny: Components):
    family = Tiny()
    tokens, _ = family.tokenize(tiny.tokenizer, ["a red circle", "two dogs"])
    x_t = torch.randn(1, 4, 4, 4).expand(2, -1, -1, -1)
    with torch.no_grad():
        cond = family.encode_text(tiny.text_encoder, tokens)
        by_text = family.predict(tiny.unet, x_t, torch.tensor([10, 10]), cond)
        by_time = family.predict(tiny.unet, x_t, torch.tensor([10, 900]), cond[:1].expand(2, -1, -1))
    assert not torch.allclose(by_text[0], by_text[1])
    assert not torch.allclose(by_time[0], by_time[1])


def test_common_words_are_single_tokens(tiny: Components):
    assert len(set(WORDS)) == len(WORDS)
    for word in WORDS:
        assert len(tiny.tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    assert len(tiny.tokenizer("A large red Circle on a white background").input_ids) == 10


def test_a_new_word_does_not_change_how_the_old_ones_are_encoded():
    old, new = clip_tokenizer(merges_for(["circle", "cat"])), clip_tokenizer(merges_for(["circle", "cat", "catch"]))
    encode = [tokenizer.convert_ids_to_tokens(tokenizer("cat circle catch").input_ids) for tokenizer in (old, new)]
    assert encode[0][:3] == encode[1][:3] == ["<|startoftext|>", "cat</w>", "circle</w>"]
    assert encode[1][3] == "catch</w>"


def test_the_tokenizer_is_the_same_on_every_machine():
    merges = merges_for(WORDS)
    table = json.dumps([vocabulary(merges), merges]).encode()
    assert hashlib.sha256(table).hexdigest() == "33029254d8487ad67bc611097c6fa413e383230e71ae4307ca07e895ba60d801"


@pytest.mark.parametrize(
    "caption",
    [
        "A RED circle, 12 px (50%)",
        "naïve café über Ångström",
        "漢字とかな 한국어 العربية עברית हिन्दी ไทย",
        "🎉 👩‍👩‍👧 ∑ ≠ ✓",
        "e\u0301 \u200b \ufeff zero\x00byte",
        "".join(map(chr, range(0x20, 0x250))),
        "\U0010ffff\ue000",
    ],
)
def test_any_caption_decodes_to_its_lower_case(tiny: Components, caption: str):
    tokenizer = tiny.tokenizer
    ids = tokenizer(caption, add_special_tokens=False).input_ids
    assert not set(tokenizer.all_special_ids) & set(ids)  # the unknown token is one of them
    assert max(ids) < tiny.text_encoder.config.vocab_size
    wanted = unicodedata.normalize("NFC", caption).lower()
    assert "".join(str(tokenizer.decode(ids)).split()) == "".join(wanted.split())


def test_special_tokens_are_those_of_the_text_encoders_config(tiny: Components):
    tokenizer, config = tiny.tokenizer, tiny.text_encoder.config
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|startoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.vocab_size) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        len(tokenizer),
    )
