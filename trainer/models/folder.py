"""The diffusers folder layout: one subfolder a component, safetensors only, no code from the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.errors import UserError
from trainer.models.base import Components, Provenance, sha256_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import CLIPTokenizer

Network = TypeVar("Network", bound="nn.Module")

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CONVERT = "convert the weights to .safetensors: pickled files can run code and are not read"


def load_diffusers_folder(folder: Path, variant: str | None = None, source: str | None = None) -> Components:
    """The components of a local folder, in fp32 on the CPU; raises UserError if one is missing or cannot be read."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    chosen = chosen_variants(folder, variant)

    def load(name: str, cls: Any, **dtype: torch.dtype) -> Any:
        with reading(f"the {name}", folder / name), _no_progress_bars():
            network, report = cls.from_pretrained(
                str(folder),
                subfolder=name,
                variant=chosen[name],
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **dtype,
            )
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"the weights of the {name} lack {len(missing)} of its tensors, the first {missing[0]}",
                str(folder / name),
                "its config.json and its weights do not belong together, or this is another kind of model",
            )
        return in_own_memory(network)

    def hashes() -> dict[str, str]:
        files = {name: weight_files(folder, name, chosen[name]) for name in ("vae", "text_encoder")}
        tokenizer = sorted(path for path in (folder / "tokenizer").iterdir() if path.is_file())
        return {
            "vae": sha256_of([folder / "vae" / "config.json", *files["vae"]]),
            "text_encoder": sha256_of([folder / "text_encoder" / "config.json", *files["text_encoder"], *tokenizer]),
        }

    def config_of(name: str, cls: Any) -> Any:
        with reading(f"the {name}", folder / name):
            return cls.load_config(str(folder), subfolder=name, local_files_only=True)

    with reading("the text_encoder", folder / "text_encoder"):
        text_config = CLIPTextConfig.from_pretrained(str(folder), subfolder="text_encoder", local_files_only=True)
    return Components(
        tokenizer=load_tokenizer(folder / "tokenizer", text_config.max_position_embeddings),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        provenance=Provenance(source or str(folder)),
        unet_config=config_of("unet", UNet2DConditionModel),
        vae_config=config_of("vae", AutoencoderKL),
        text_config=text_config,
        load_unet=lambda: load("unet", UNet2DConditionModel, torch_dtype=torch.float32),
        load_vae=lambda: load("vae", AutoencoderKL, torch_dtype=torch.float32),
        load_text_encoder=lambda: load("text_encoder", CLIPTextModel, dtype=torch.float32),
        hash_encoders=hashes,
    )


def in_own_memory(network: Network) -> Network:
    """`network`, its weights copied off the file that diffusers and transformers leave them mapped to.

    Mapped weights change under a run, or kill it, when their file is written to. They also lie where the file has
    them, which need not be where the kernels for aligned memory can be used: the same weights then give other last
    bits. The mapped pages count as memory of the process until the copy is done, but they are the file's own.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()
    return network


def load_tokenizer(folder: Path, longest: int) -> CLIPTokenizer:
    """The tokenizer of a folder with tokenizer.json, or only vocab.json and merges.txt; for `longest` tokens."""
    from transformers import CLIPTokenizer

    if (folder / "tokenizer.json").is_file():
        expected = read_json(folder / "tokenizer.json")["model"]["vocab"]
    elif (folder / "merges.txt").is_file():
        expected = read_json(folder / "vocab.json")
    else:
        raise UserError("there is neither tokenizer.json nor vocab.json with merges.txt", str(folder))
    with reading("the tokenizer", folder):
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    # transformers 5 makes a tokenizer of two tokens, without a word, where it overlooks the files.
    vocabulary = tokenizer.get_vocab()
    if any(vocabulary.get(token) != index for token, index in expected.items()):
        raise UserError(
            "the tokenizer did not take up its own vocabulary", str(folder), "check the files of the folder"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def save_diffusers_folder(components: Components, path: Path) -> None:
    """Writes the folder that diffusers' pipelines, and `load_diffusers_folder`, read back."""
    import diffusers
    from safetensors.torch import save_file

    components.unet.save_pretrained(str(path / "unet"))
    components.vae.save_pretrained(str(path / "vae"))

    config = components.text_encoder.config
    config.architectures = ["CLIPTextModel"]
    config.save_pretrained(str(path / "text_encoder"))
    # With the prefix that transformers 5 dropped and strips on loading: older versions and other tools need it.
    weights = {f"text_model.{key}": value.contiguous() for key, value in components.text_encoder.state_dict().items()}
    save_file(weights, path / "text_encoder" / "model.safetensors", metadata={"format": "pt"})

    tokenizer = components.tokenizer
    tokenizer.save_pretrained(str(path / "tokenizer"))
    # The two files that transformers before version 5 reads.
    model = read_json(path / "tokenizer" / "tokenizer.json")["model"]
    write_json(path / "tokenizer" / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (path / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")

    scheduler = {"_class_name": "DDIMScheduler"} | components.scheduler
    (path / "scheduler").mkdir(exist_ok=True)
    write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    write_json(
        path / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def chosen_variants(folder: Path, variant: str | None) -> dict[str, str | None]:
    """The variant to load of each component: `variant` where there is one, else the plain weights.

    Reads no weight. Raises UserError if the folder has not all that is needed, or nothing of the wanted variant.
    """
    if not (folder / "model_index.json").is_file() and not (folder / "unet" / "config.json").is_file():
        raise UserError(
            "this is not a diffusers folder: it has neither model_index.json nor unet/config.json",
            str(folder),
            "give the folder that holds unet/, vae/, text_encoder/ and tokenizer/, or one .safetensors file",
        )
    if (folder / "text_encoder_2").is_dir() or (folder / "transformer").is_dir():
        other = "text_encoder_2" if (folder / "text_encoder_2").is_dir() else "transformer"
        raise UserError(
            f"this is no Stable Diffusion 1.x or 2.x: it has a {other}/", str(folder), "kind `sd` takes only those"
        )
    needed = [*(f"{name}/config.json" for name in STEMS), "tokenizer", "scheduler/scheduler_config.json"]
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise UserError(
            f"the folder lacks {', '.join(missing)}", str(folder), "copy or download all of the model's folder"
        )
    found: dict[str, str | None] = {}
    for name in STEMS:
        if variant is not None and weight_files(folder, name, variant):
            found[name] = variant
        elif weight_files(folder, name, None):
            found[name] = None
        else:
            _refuse_without_weights(folder / name)
    if variant is not None and variant not in found.values():
        raise UserError(
            f"no component has weights of the variant {variant!r}", str(folder), "leave model.variant out, or mend it"
        )
    return found


def weight_files(folder: Path, name: str, variant: str | None) -> list[Path]:
    """The safetensors files, one or several shards, of one component in one variant, in order; empty if none."""
    patterns = [pattern for pattern in weight_patterns(name, variant) if pattern.endswith(".safetensors")]
    files = [path for path in (folder / name).iterdir() if any(fnmatchcase(path.name, each) for each in patterns)]
    return sorted(files)


def weight_patterns(name: str, variant: str | None) -> list[str]:
    """What the files of one component's weights are called: a single one, shards, or the index of the shards."""
    stem, shard = STEMS[name], "-?????-of-?????"
    if variant is None:
        return [f"{stem}.safetensors", f"{stem}{shard}.safetensors", f"{stem}.safetensors.index.json"]
    return [  # diffusers has put the variant behind the shard's number, and before it
        f"{stem}.{variant}.safetensors",
        f"{stem}.{variant}{shard}.safetensors",
        f"{stem}{shard}.{variant}.safetensors",
        f"{stem}.safetensors.index.{variant}.json",
    ]


def _refuse_without_weights(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    if others := [name for name in names if name.endswith(".safetensors")]:
        variants = ", ".join(others)
        raise UserError(f"there are only these weights: {variants}", str(folder), "name theirs as model.variant")
    if pickles := [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]:
        raise UserError(f"there are only pickled weights: {', '.join(pickles)}", str(folder), CONVERT)
    raise UserError("there are no weights", str(folder), "copy or download all of the model's folder")


@contextmanager
def reading(what: str, path: Path) -> Iterator[None]:
    """Turns what libraries raise on files they cannot read into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        # The libraries explain at length, under titles that end in a colon; the first line beside is the cause.
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith(":")]
        cause = lines[0][:300] if lines else type(error).__name__
        raise UserError(
            f"cannot read {what}: {cause}", str(path), "the file is damaged, or not of this kind of model"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError if it cannot be read."""
    with reading(path.name, path):
        return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading weights from disk is quick and the log is read by people."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
