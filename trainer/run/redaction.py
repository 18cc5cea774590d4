"""Keeps secrets out of every file of a run: logins in URLs, tokens, keys, and values of options that are named so."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

REDACTED = "[redacted]"

SECRET_WORDS = {"token", "secret", "password", "passwd", "passphrase", "credential", "credentials", "apikey", "auth"}
KEY_OWNERS = {"api", "access", "secret", "private", "auth", "account", "signing", "encryption", "wandb", "service"}

_URL_LOGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?!git@)(?:[^/\s\"'<>:@]*:[^\s\"'<>]+|[^/\s\"'<>]+)@", re.I)
_KNOWN_FORMS = re.compile(
    r"""
    -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    | (?<![A-Za-z0-9]) (?:
        hf_[A-Za-z0-9]{16,} | hf_(?=[A-Za-z]*[0-9])[A-Za-z0-9]{8,} | api_org_[A-Za-z0-9]{16,}
      | sk-[A-Za-z0-9_-]{16,} | r8_[A-Za-z0-9]{16,} | wandb_v1_[A-Za-z0-9_]{16,}
      | gh[oprsu]_[A-Za-z0-9]{16,} | github_pat_[A-Za-z0-9_]{16,} | glpat-[A-Za-z0-9_-]{16,}
      | (?:AKIA|ASIA)[A-Z0-9]{12,} | AIza[A-Za-z0-9_-]{30,} | xox[abeprs]-[A-Za-z0-9-]{10,}
      | pypi-[A-Za-z0-9_-]{16,} | npm_[A-Za-z0-9]{20,} | dop_v1_[a-f0-9]{16,}
      | eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*
    )""",
    re.VERBOSE | re.DOTALL,
)
_HTTP_LOGIN = re.compile(r"\b(?P<scheme>Bearer\s+|Basic\s+(?=\S{16}))[A-Za-z0-9+/=._~-]{8,}", re.I)
_ASSIGNMENT = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]*)["']?\s*[=:]\s*(?!//)(?P<value>"[^"]*"|'[^']*'|[^\s&"',;]+)""",
)
_OPTION = re.compile(r"""(?<!\S)(?P<name>--?[A-Za-z][\w.-]*)(?:=|\s+)(?P<value>"[^"]*"|'[^']*'|(?!-)\S+)""")
_OPAQUE = re.compile(r"[\"']?(?=.*[0-9])[A-Za-z0-9+/_=.-]{20,}[\"']?")


def redact(text: str) -> str:
    """`text` with logins in URLs and everything that looks like a key or token replaced by [redacted].

    Besides the known forms, it finds the very values that this process's secret-named variables hold (HF_TOKEN, ...).
    It rather hides a harmless word than shows a secret. A second pass changes nothing more.
    """
    for value in _values_of_secret_variables():
        text = text.replace(value, REDACTED)
    text = _URL_LOGIN.sub(rf"\g<scheme>{REDACTED}@", text)
    text = _KNOWN_FORMS.sub(REDACTED, text)
    text = _HTTP_LOGIN.sub(rf"\g<scheme>{REDACTED}", text)
    text = _hide_values(text, _OPTION, lambda name, value: _is_secret_option(name))
    return _hide_values(text, _ASSIGNMENT, _assigns_secret)


def redact_argv(argv: Sequence[str]) -> list[str]:
    """The command line without the values of `--*token* X`, `--*key*=X`, `a.password=X`, and what `redact` finds."""
    shown: list[str] = []
    value_is_secret = False
    for argument in argv:
        name, sign, value = argument.partition("=")
        if value_is_secret and not argument.startswith("--"):
            shown.append(REDACTED)
        elif sign and (_is_secret_option(name) or _assigns_secret(name, value)):
            shown.append(f"{name}={REDACTED}")
        else:
            shown.append(redact(argument))
        value_is_secret = not sign and _is_secret_option(argument)
    return shown


def redact_tree(value: Any, name: str = "") -> Any:
    """A copy of the JSON-like `value` with every string in it redacted, wholly so below a key that names a secret."""
    if isinstance(value, str):
        return REDACTED if value and _assigns_secret(name, value) else redact(value)
    if isinstance(value, dict):
        return {key: redact_tree(item, name if _assigns_secret(name, "") else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(item, name) for item in value]
    return value


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name may hold a secret."""
    return not SECRET_WORDS.isdisjoint(_words(name)) or _words(name)[-1] == "key"


def _hide_values(text: str, pattern: re.Pattern[str], is_secret: Callable[[str, str], bool]) -> str:
    """`text` with the `value` of each match replaced where `is_secret(name, value)`; else the value is searched too."""
    shown, position = [], 0
    while match := pattern.search(text, position):
        secret = is_secret(match["name"], match["value"])
        shown += [text[position : match.start("value")], REDACTED if secret else ""]
        position = match.end("value") if secret else match.start("value")
    return "".join([*shown, text[position:]])


def _words(name: str) -> list[str]:
    """`wandbApiKey`, `WANDB_API_KEY` and `tracking.wandb-api-key` all end in the words `api`, `key`."""
    return re.split(r"[-_.]", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


def _is_secret_option(name: str) -> bool:
    """Whether the option `--name` has `token` or `key` anywhere in it, or a secret word; a tokenizer is none."""
    plain = name.lower().replace("tokenizer", "")
    return name.startswith("-") and ("token" in plain or "key" in plain or not SECRET_WORDS.isdisjoint(_words(name)))


def _assigns_secret(name: str, value: str) -> bool:
    """Whether `name = value` shows a secret: by the name's last word, or an opaque value of some `..._key`.

    Only the last word counts, so that `pad_token_id=49407` and `image_key=jpg` can still be read.
    """
    if value.startswith(REDACTED):
        return False
    *owners, last = _words(name)
    return last in SECRET_WORDS or (
        last == "key" and (bool(KEY_OWNERS.intersection(owners[-1:])) or _OPAQUE.fullmatch(value) is not None)
    )


def _values_of_secret_variables() -> list[str]:
    """What the secret-named environment variables hold, longest first; short values and paths are no secrets."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= 8 and is_secret_name(name) and not value.startswith("/")
    }
    return sorted(values, key=lambda value: (-len(value), value))
