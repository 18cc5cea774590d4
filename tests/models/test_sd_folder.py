from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.models.base import Components, Provenance
from trainer.models.folder import load_diffusers_folder, save_diffusers_folder
from trainer.models.sd import StableDiffusion
from trainer.models.tiny import Tiny

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
CAPTION = "A red circle, naïve 漢字"


@pytest.fixture(scope="module")
def tiny() -> Components:
    return Tiny().load(seed=3)


@pytest.fixture(scope="module")
def saved(tiny: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_diffusers_folder(tiny, path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def sd(pretrained: Path | str, **options: str) -> StableDiffusion:
    return StableDiffusion.model_validate({"pretrained": str(pretrained), **options})


def assert_same_weights(a: Components, b: Components) -> None:
    for name in ("unet", "vae", "text_encoder"):
        left, right = getattr(a, name).state_dict(), getattr(b, name).state_dict()
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}.{key}"


def refused(model: StableDiffusion) -> UserError:
    def load_all() -> None:  # each is loaded when it is asked for
        components = model.load(seed=0)
        _ = components.unet, components.vae, components.text_encoder

    with pytest.raises(UserError) as caught:
        load_all()
    for line in (caught.value.what, caught.value.where, caught.value.fix):
        assert line
        assert "\n" not in line
    return caught.value


def test_a_saved_set_loads_back_bit_for_bit(tiny: Components, saved: Path):
    back = sd(saved).load(seed=0)
    assert_same_weights(tiny, back)
    assert back.scheduler == tiny.scheduler
    assert back.vae.config["scaling_factor"] == tiny.vae.config["scaling_factor"]
    family = sd(saved)
    tokens, _ = family.tokenize(back.tokenizer, [CAPTION])
    assert torch.equal(tokens, Tiny().tokenize(tiny.tokenizer, [CAPTION])[0])
    x_t, time = torch.randn(1, 4, 5, 5), torch.tensor([500])
    with torch.no_grad():
        cond = family.encode_text(tiny.text_encoder, tokens)
        assert torch.equal(family.encode_text(back.text_encoder, tokens), cond)
        assert torch.equal(family.predict(back.unet, x_t, time, cond), family.predict(tiny.unet, x_t, time, cond))


def test_loaded_weights_no_longer_hang_on_their_file(tiny: Components, folder: Path):
    back = sd(folder).load(seed=0)
    _ = back.unet, back.vae, back.text_encoder
    for file in folder.rglob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.write(bytes(file.stat().st_size))
    assert_same_weights(tiny, back)


def test_saving_what_was_loaded_writes_the_same_files(saved: Path, tmp_path: Path):
    save_diffusers_folder(sd(saved).load(seed=0), tmp_path)
    for file in saved.rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / file.relative_to(saved)).read_bytes()


def test_the_pipeline_of_diffusers_reads_the_folder(tiny: Components, saved: Path):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(saved, local_files_only=True)
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt([CAPTION], "cpu", 1, False)
        ours = Tiny().encode_text(tiny.text_encoder, Tiny().tokenize(tiny.tokenizer, [CAPTION])[0])
    assert torch.equal(theirs, ours)
    assert torch.equal(pipeline.unet.conv_in.weight, tiny.unet.conv_in.weight)


def test_the_text_encoder_is_saved_under_the_names_that_other_tools_know(saved: Path):
    assert all(key.startswith("text_model.") for key in load_file(saved / "text_encoder" / "model.safetensors"))


@pytest.mark.parametrize("left", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_a_tokenizer_reads_its_vocabulary_from_either_form_of_files(
    tiny: Components, folder: Path, left: tuple[str, ...]
):
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        if file not in left:
            (folder / "tokenizer" / file).unlink()
    tokenizer = sd(folder).load(seed=0).tokenizer
    assert tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    assert tokenizer(CAPTION).input_ids == tiny.tokenizer(CAPTION).input_ids
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (tiny.tokenizer.pad_token_id, 77)


def test_a_tokenizer_without_its_length_takes_that_of_the_text_encoder(folder: Path):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    assert sd(folder).load(seed=0).tokenizer.model_max_length == 77


def test_the_pad_token_of_the_folder_is_honoured(folder: Path):
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    assert sd(folder).load(seed=0).tokenizer.pad_token_id == 0


def halve(folder: Path, variant: str | None = None) -> None:
    """Half-precision weights of the UNet, beside the others or in their place."""
    half = {key: value.half() for key, value in load_file(folder / UNET).items()}
    name = UNET if variant is None else UNET.with_suffix(f".{variant}.safetensors")
    save_file(half, folder / name, metadata={"format": "pt"})


def test_half_precision_weights_load_as_fp32(tiny: Components, folder: Path):
    halve(folder)
    back = sd(folder).load(seed=0)
    weights = back.unet.state_dict()
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert torch.equal(weights["conv_in.weight"], tiny.unet.conv_in.weight.half().float())


def test_a_variant_is_taken_only_for_the_networks_that_have_one(tiny: Components, folder: Path):
    halve(folder, "fp16")
    back = sd(folder, variant="fp16").load(seed=0)
    assert torch.equal(back.unet.conv_in.weight, tiny.unet.conv_in.weight.half().float())
    assert torch.equal(back.vae.decoder.conv_in.weight, tiny.vae.decoder.conv_in.weight)
    assert back.provenance.files is not None
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in back.provenance.files
    assert UNET.as_posix() not in back.provenance.files
    assert torch.equal(sd(folder).load(seed=0).unet.conv_in.weight, tiny.unet.conv_in.weight)


def test_sharded_weights_load(tiny: Components, folder: Path):
    (folder / UNET).unlink()
    tiny.unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    back = sd(folder).load(seed=0)
    assert_same_weights(tiny, back)
    assert len([name for name in back.provenance.files or {} if name.startswith("unet/")]) > 1


def test_provenance_is_the_sha256_of_every_weight_file(saved: Path):
    expected = {
        file.relative_to(saved).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in saved.rglob("*.safetensors")
    }
    assert len(expected) == 3
    assert sd(saved).provenance() == Provenance(str(saved), None, expected)
    assert sd(saved).load(seed=0).provenance.files == expected


def test_provenance_notices_that_a_file_was_replaced(folder: Path):
    before = sd(folder).provenance().files
    halve(folder)
    after = sd(folder).provenance().files
    assert before is not None
    assert after is not None
    assert [name for name in before if before[name] != after[name]] == [UNET.as_posix()]


@pytest.mark.parametrize(
    "missing", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "vae/config.json", "text_encoder/config.json"]
)
def test_a_missing_part_is_named(folder: Path, missing: str):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert missing in refused(sd(folder)).what


def test_a_tokenizer_folder_without_tables_is_refused(folder: Path):
    for name in ("tokenizer.json", "vocab.json"):
        (folder / "tokenizer" / name).unlink()
    assert "vocab.json" in refused(sd(folder)).what


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path):
    (tmp_path / "picture.png").touch()
    assert "not a diffusers folder" in refused(sd(tmp_path)).what


def test_pickled_weights_are_not_read(folder: Path):
    (folder / UNET).rename(folder / UNET.with_suffix(".bin"))
    error = refused(sd(folder))
    assert "diffusion_pytorch_model.bin" in error.what
    assert error.fix is not None
    assert "pickled files can run code" in error.fix


def test_a_folder_with_nothing_of_the_variant_is_refused(folder: Path):
    assert "'fp16'" in refused(sd(folder, variant="fp16")).what


def test_a_folder_with_only_a_variant_says_so(folder: Path):
    halve(folder, "fp16")
    (folder / UNET).unlink()
    error = refused(sd(folder))
    assert "diffusion_pytorch_model.fp16.safetensors" in error.what
    assert error.fix == "name theirs as model.variant"


def test_another_family_is_refused_by_what_gives_it_away(folder: Path):
    (folder / "text_encoder_2").mkdir()
    assert "text_encoder_2" in refused(sd(folder)).what


def test_damaged_weights_are_one_line(folder: Path):
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-1000])
    error = refused(sd(folder))
    assert "unet" in error.what
    assert error.where == str(folder / "unet")


def test_weights_that_lack_a_tensor_are_refused_by_its_name(folder: Path):
    for name, key in ((UNET, "conv_in.weight"), (Path("text_encoder", "model.safetensors"), "final_layer_norm.bias")):
        whole = load_file(folder / name)
        part = {each: value for each, value in whole.items() if not each.endswith(key)}
        save_file(part, folder / name, metadata={"format": "pt"})
        error = refused(sd(folder))
        assert "lack 1 of its tensors" in error.what
        assert key in error.what
        save_file(whole, folder / name, metadata={"format": "pt"})


def test_weights_of_another_shape_are_refused(folder: Path):
    weights = load_file(folder / UNET)
    save_file(weights | {"conv_in.weight": torch.zeros(8, 4, 3, 3)}, folder / UNET, metadata={"format": "pt"})
    assert "unet" in refused(sd(folder)).what


def test_an_inpainting_model_is_named_as_such(tiny: Components, folder: Path):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    weights = load_file(folder / UNET)
    save_file(weights | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}, folder / UNET, metadata={"format": "pt"})
    assert "an inpainting model" in refused(sd(folder)).what


def test_a_text_encoder_of_another_model_is_refused(folder: Path):
    from transformers import CLIPTextConfig, CLIPTextModel

    narrow = CLIPTextConfig(
        vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(narrow).save_pretrained(folder / "text_encoder")
    assert "width 64 but the text encoder's is 32" in refused(sd(folder)).what


def test_a_model_that_is_not_there_is_refused_before_anything_is_loaded(saved: Path, tmp_path: Path):
    (tmp_path / "model.ckpt").touch()
    (tmp_path / "notes.txt").touch()
    for pretrained, said in (
        (tmp_path / "absent", "does not exist"),
        ("a/b/c", "no hub id"),
        ("./model", "no hub id"),
        ("~nobody/model", "no hub id"),
        ("x" * 5000 + "/", "no hub id"),
        ("org/model.safetensors", "does not exist"),
        (tmp_path / "model.ckpt", "can run code"),
        ("absent.ckpt", "can run code"),
        (tmp_path / "notes.txt", "neither a folder nor"),
    ):
        with pytest.raises(UserError, match=said):
            sd(pretrained).check()
    with pytest.raises(UserError, match="revision means nothing"):
        sd(saved, revision="main").check()


def test_hub_ids_pass_the_check():
    for hub_id in ("gpt2", "org/name", "stable-diffusion-v1-5/stable-diffusion-v1-5", "org/Some_model-2.1"):
        sd(hub_id, revision="main", variant="fp16").check()
        assert sd(hub_id, revision="main").provenance() == Provenance(hub_id, "main")


def test_check_and_provenance_need_neither_torch_nor_the_network(saved: Path):
    code = """
import socket, sys
for name in ("torch", "diffusers", "transformers", "huggingface_hub", "numpy", "safetensors"):
    sys.modules[name] = None
socket.socket = None
from trainer.models.base import ModelFamily
for value in ({"kind": "tiny"}, {"kind": "sd", "pretrained": sys.argv[1]}, {"kind": "sd", "pretrained": "org/name"}):
    family = ModelFamily.parse(value)
    family.check()
    print(family.provenance().source)
"""
    ran = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["tiny", str(saved), "org/name"], ran.stderr


def test_a_hub_model_loads_from_the_cache_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"
    commits = {"main": "a" * 40, "old": "b" * 40}
    for seed, (branch, commit) in enumerate(commits.items()):
        save_diffusers_folder(Tiny().load(seed), repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    halve(repository / "snapshots" / commits["main"], "fp16")
    first, second = (Tiny().load(seed).unet.conv_in.weight for seed in range(2))
    for options, commit, weight in (
        ({}, "a" * 40, first),
        ({"revision": "old"}, "b" * 40, second),
        ({"revision": "b" * 40}, "b" * 40, second),
        ({"variant": "fp16"}, "a" * 40, first.half().float()),
    ):
        back = sd("org/name", **options).load(seed=0)
        assert back.provenance.revision == commit
        assert torch.equal(back.unet.conv_in.weight, weight)
    for model in (sd("org/absent"), sd("org/name", revision="absent")):
        assert "not complete in the local cache" in refused(model).what


def test_loading_twice_in_one_process_does_not_mix_folders(tiny: Components, saved: Path, tmp_path: Path):
    other = Tiny().load(seed=4)
    save_diffusers_folder(other, tmp_path)
    assert_same_weights(load_diffusers_folder(saved), tiny)
    assert_same_weights(load_diffusers_folder(tmp_path), other)
