from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.errors import UserError
from trainer.models.base import Components, Provenance, sha256
from trainer.models.folder import (
    CONVERT,
    STEMS,
    chosen_variants,
    load_diffusers_folder,
    load_tokenizer,
    read_json,
    weight_files,
)
from trainer.models.hub import fetch_folder, fetch_small_files
from trainer.models.single_file import CONFIGS, check_single_file, load_single_file, tokenizer_of
from trainer.models.unet_clip import UNetClip

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


class StableDiffusion(UNetClip):
    """Stable Diffusion 1.x and 2.x (Rombach et al. 2022): from the hub, a diffusers folder, or one original file."""

    kind = "sd"

    pretrained: str = Field(
        min_length=1, description="A hub id, a local diffusers folder, or one .safetensors file in the original layout."
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, tag or commit of a hub model; the default is its main branch."
    )
    variant: str | None = Field(
        default=None,
        pattern=r"^[\w-]+$",
        description="Weights to take where a component has them, as `fp16`, `non_ema`; the default is the plain ones.",
    )

    @property
    def path(self) -> Path:
        """Where the weights are if they are local; on the hub if there is nothing."""
        return Path(os.path.expanduser(self.pretrained))

    def check(self) -> None:
        suffix = self.path.suffix.lower()
        if os.path.isdir(self.path):
            self._refuse("revision", "a local folder has only one")
            chosen_variants(self.path, self.variant)
        elif suffix in PICKLES:
            raise UserError(f"{suffix} files can run code when they are read", self.pretrained, CONVERT)
        elif os.path.exists(self.path) and suffix != ".safetensors":
            raise UserError(
                "this is neither a folder nor a .safetensors file",
                self.pretrained,
                "give one, or the id of a hub model",
            )
        elif os.path.exists(self.path):
            self._refuse("revision", "a single file has only one")
            self._refuse("variant", "a single file has only one")
            check_single_file(self.path)
        elif suffix == ".safetensors" or not HUB_ID.fullmatch(self.pretrained):
            raise UserError(
                f"{self.pretrained!r} does not exist" + (", and is no hub id" if suffix != ".safetensors" else ""),
                "model.pretrained",
                "give a hub id as ORG/NAME, a diffusers folder, or a .safetensors file",
            )

    def provenance(self) -> Provenance:
        if os.path.isdir(self.path):
            chosen = chosen_variants(self.path, self.variant)
            files = [file for name in STEMS for file in weight_files(self.path, name, chosen[name])]
            return Provenance(
                self.pretrained, files={file.relative_to(self.path).as_posix(): sha256(file) for file in files}
            )
        if os.path.isfile(self.path):
            return Provenance(self.pretrained, files={self.path.name: sha256(self.path)})
        return Provenance(self.pretrained, self.revision)

    def load_tokenizer(self) -> CLIPTokenizer:
        self.check()
        if os.path.isfile(self.path):
            return tokenizer_of(CONFIGS / check_single_file(self.path))
        folder = self.path if os.path.isdir(self.path) else fetch_small_files(self.pretrained, self.revision)
        longest = read_json(folder / "text_encoder" / "config.json")["max_position_embeddings"]
        return load_tokenizer(folder / "tokenizer", longest)

    def load(self, seed: int) -> Components:
        """The pretrained networks; the seed decides nothing, for every weight comes from a file."""
        self.check()
        if os.path.isfile(self.path):
            components = load_single_file(self.path)
        elif os.path.isdir(self.path):
            components = load_diffusers_folder(self.path, self.variant)
        else:
            folder = fetch_folder(self.pretrained, self.revision, self.variant)
            components = load_diffusers_folder(folder, self.variant)
            # The hub's cache names a snapshot after its commit: `main` moves on, a commit does not.
            return self.fitting(replace(components, provenance=Provenance(self.pretrained, folder.name)))
        return self.fitting(replace(components, provenance=self.provenance()))

    def _refuse(self, key: str, why: str) -> None:
        if getattr(self, key) is not None:
            raise UserError(f"{key} means nothing for {self.pretrained}: {why}", f"model.{key}", "leave it out")
