"""CLIP's tokenizer, from nothing but a list of merges (Sennrich et al. 2016; Radford et al. 2021).

CLIP numbers its tokens in a fixed order: the 256 bytes, the 256 bytes that end a word, one token a merge, and the two
special ones. So merges alone say everything, and a text with any byte in it has a token for each.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
MAX_LENGTH = 77  # tokens, with bos and eos
OPENAI_MERGES = Path(__file__).parent / "sd_configs" / "bpe_simple_vocab_16e6.txt.gz"

Merge = tuple[str, str]


def clip_tokenizer(merges: Sequence[Merge], pad_token: str = EOS, max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """A tokenizer of 514 + len(merges) tokens and `max_length` places."""
    from transformers import CLIPTokenizer

    # transformers 5 takes the tables as objects; it ignores `vocab_file` and `merges_file` without a word.
    return CLIPTokenizer(
        vocab=vocabulary(merges),
        merges=list(merges),  # pyright: ignore[reportArgumentType]
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=pad_token,
        model_max_length=max_length,
    )


def vocabulary(merges: Sequence[Merge]) -> dict[str, int]:
    """Token -> id, in CLIP's order."""
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *(a + b for a, b in merges), BOS, EOS]
    return {token: index for index, token in enumerate(tokens)}


def openai_merges() -> list[Merge]:
    """The 48,894 merges that OpenAI's CLIP and OpenCLIP use, from the file that OpenAI published."""
    lines = gzip.decompress(OPENAI_MERGES.read_bytes()).decode("utf-8").split("\n")
    # The file holds the merges of a larger vocabulary behind a title line; CLIP takes the first that make 49,408.
    pairs = (line.split() for line in lines[1 : 1 + 49_408 - 514])
    return [(first, second) for first, second in pairs]


def merges_for(words: Iterable[str]) -> list[Merge]:
    """Merges that make each of the lower-case `words` one token.

    Words are taken in order, and each adds the merges it still lacks behind all earlier ones. A later merge never
    outranks an earlier one, so it cannot change how an earlier word is put together.
    """
    ranks: dict[Merge, int] = {}
    for word in words:
        letters = [byte_letters()[byte] for byte in word.encode()]
        pieces = merge([*letters[:-1], letters[-1] + END_OF_WORD], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = merge(pieces, ranks)
    return list(ranks)


def merge(pieces: list[str], ranks: dict[Merge, int]) -> list[str]:
    """`pieces` after all merges that apply, lowest rank first."""
    while pairs := [pair for pair in pairwise(pieces) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == best:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


@cache
def byte_letters() -> Mapping[int, str]:
    """A printable letter for each byte, in CLIP's order: printable bytes stand for themselves, the rest come after."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
