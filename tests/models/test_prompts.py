from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from trainer.errors import UserError
from trainer.models.base import Components
from trainer.models.clip_bpe import clip_tokenizer
from trainer.models.tiny import Tiny


@pytest.fixture(scope="module")
def tiny() -> Components:
    return Tiny().load(seed=0)


def of_words(count: int) -> str:
    return " ".join(["cat"] * count)


def pipeline_of(components: Components):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    # diffusers 0.42 still looks for the level that transformers 5 took out of CLIPTextModel.
    components.text_encoder.__dict__["text_model"] = components.text_encoder
    return StableDiffusionPipeline(
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        unet=components.unet,
        scheduler=DDIMScheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_embeddings_equal_those_of_the_diffusers_pipeline(clip_skip: int):
    tiny, family = Tiny().load(seed=0), Tiny(clip_skip=clip_skip)
    captions = ["a red circle on a white background", "", of_words(100)]
    tokens, _ = family.tokenize(tiny.tokenizer, captions)
    with torch.no_grad():
        ours = family.encode_text(tiny.text_encoder, tokens)
        theirs, _ = pipeline_of(tiny).encode_prompt(captions, "cpu", 1, False, clip_skip=clip_skip or None)
    assert torch.equal(ours, theirs)


def test_clip_skip_changes_the_embedding(tiny: Components):
    tokens, _ = Tiny().tokenize(tiny.tokenizer, ["a cat"])
    with torch.no_grad():
        skipped = [Tiny(clip_skip=n).encode_text(tiny.text_encoder, tokens) for n in range(3)]
    assert not torch.allclose(skipped[0], skipped[1])
    assert not torch.allclose(skipped[1], skipped[2])


def test_clip_skip_must_leave_a_layer():
    with pytest.raises(UserError, match="3 layers to skip, but the text encoder has 3"):
        Tiny(clip_skip=3).load(seed=0)


def test_75_tokens_fit_and_76_are_cut_and_counted(tiny: Components):
    tokens, cut = Tiny().tokenize(tiny.tokenizer, [of_words(75), of_words(76), of_words(3)])
    assert cut == 1
    assert tokens.shape == (3, 1, 77)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_caption_may_fill_as_many_chunks_as_the_config_says(tiny: Components, chunks: int):
    family = Tiny(prompt_chunks=chunks)
    captions = [of_words(75 * chunks), of_words(75 * chunks + 1)]
    tokens, cut = family.tokenize(tiny.tokenizer, captions)
    assert cut == 1
    assert tokens.shape == (2, chunks, 77)
    with torch.no_grad():
        assert family.encode_text(tiny.text_encoder, tokens).shape == (2, 77 * chunks, 64)


def test_chunks_hold_all_tokens_in_order_each_between_bos_and_eos(tiny: Components):
    tokenizer = tiny.tokenizer
    caption = " ".join(["red", "green", "blue", "one", "two", "three", "four"] * 20)
    (chunks,), cut = Tiny(prompt_chunks=3).tokenize(tokenizer, [caption])
    assert cut == 0
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in row[1:] for row in chunks.tolist())
    inner = [token for row in chunks.tolist() for token in row if token not in tokenizer.all_special_ids]
    assert inner == tokenizer(caption, add_special_tokens=False).input_ids


def test_the_chunks_of_a_caption_are_encoded_apart_and_joined(tiny: Components):
    family = Tiny(prompt_chunks=2)
    tokens, _ = family.tokenize(tiny.tokenizer, [of_words(80)])
    with torch.no_grad():
        whole = family.encode_text(tiny.text_encoder, tokens)
        parts = [family.encode_text(tiny.text_encoder, tokens[:, i : i + 1]) for i in range(2)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1))


def test_the_rest_of_a_chunk_is_padded_with_the_tokenizers_own_pad_token():
    tokenizer = clip_tokenizer([("c", "a"), ("ca", "t</w>")], pad_token="!")
    tokens, _ = Tiny().tokenize(tokenizer, ["cat"])
    names = tokenizer.convert_ids_to_tokens(tokens[0, 0].tolist())
    assert names == ["<|startoftext|>", "cat</w>", "<|endoftext|>"] + ["!"] * 74


def test_the_text_encoder_is_frozen_unless_it_is_to_be_trained():
    tiny = Tiny().load(seed=0)
    assert list(Tiny().trainable(tiny)) == ["unet"]
    assert not any(parameter.requires_grad for parameter in tiny.text_encoder.parameters())
    assert not any(parameter.requires_grad for parameter in tiny.vae.parameters())
    assert all(parameter.requires_grad for parameter in tiny.unet.parameters())


@pytest.mark.parametrize("clip_skip", [0, 2])
def test_every_parameter_that_is_trained_gets_a_gradient(clip_skip: int):
    family = Tiny(train_text_encoder=True, clip_skip=clip_skip)
    tiny = family.load(seed=0)
    modules = family.trainable(tiny)
    assert list(modules) == ["unet", "text_encoder"]
    tokens, _ = family.tokenize(tiny.tokenizer, ["a cat", "two red dogs"])
    cond = family.encode_text(tiny.text_encoder, tokens)
    family.predict(tiny.unet, torch.randn(2, 4, 4, 4), torch.tensor([3, 500]), cond).square().sum().backward()
    for module in modules.values():
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        assert trained
        assert all(parameter.grad is not None for parameter in trained)


def test_options_out_of_bounds_are_refused_without_loading_anything():
    for wrong in ({"clip_skip": -1}, {"prompt_chunks": 0}, {"prompt_chunk": 2}):
        with pytest.raises(ValidationError):
            Tiny.model_validate(wrong)
