"""The config's reference page and JSON Schema, both made from the classes that validate it."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

from trainer.config import Config
from trainer.registry import Part, Section

HEAD = """# Config reference

Made by `difftrain schema --markdown`; a test keeps it current. Every run is described by one YAML file with these
sections. An unknown key is an error that names the file, the line and the nearest known key. `--set section.key=value`
overrides single values. A section that can be of several kinds chooses one by `kind`.
"""


def json_schema() -> str:
    """JSON Schema of the config, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def markdown() -> str:
    """docs/config.md: each section, kind and key with type, bounds, default and meaning."""
    pages = [HEAD]
    for name, field in Config.model_fields.items():
        options = [field.annotation, *typing.get_args(field.annotation)]
        classes = [option for option in options if isinstance(option, type) and issubclass(option, Section)]
        if not classes:
            pages.append(f"## `{name}`\n\n{field.description}\n")
            continue
        section = classes[0]
        need = "required" if field.is_required() else "absent = off" if field.default is None else "optional"
        pages.append(f"## `{name}`\n\n{_first_paragraph(section)} ({need})\n")
        if field.description:
            pages.append(f"{field.description}\n")
        if issubclass(section, Part):
            for kind, part in section.kinds().items():
                default = " (the default)" if kind == section.default_kind else ""
                pages.append(f"### `{name}.kind: {kind}`{default}\n\n{_first_paragraph(part)}\n\n{_table(part)}")
        else:
            pages.append(_table(section))
    return "\n".join(pages)


def _first_paragraph(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _table(section: type[Section]) -> str:
    if not section.model_fields:
        return "No keys of its own.\n"
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    properties = section.model_json_schema()["properties"]
    for key, field in section.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.get_default(), default=str)}`"
        rows.append(
            f"| `{key}` | {_type(field.annotation)}{_bounds(properties[key])} | {default} | {field.description} |"
        )
    return "\n".join(rows) + "\n"


def _type(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if isinstance(annotation, types.UnionType):
        return " or ".join("null" if option is types.NoneType else _type(option) for option in arguments)
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type(arguments[0])}"
    if typing.get_origin(annotation) is dict or issubclass(annotation, Section):
        return "mapping"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}[annotation.__name__]


def _bounds(schema: dict[str, Any]) -> str:
    bounded = next((option for option in schema.get("anyOf", []) if option.get("type") != "null"), schema)
    words = {
        "minimum": ">=",
        "exclusiveMinimum": ">",
        "maximum": "<=",
        "exclusiveMaximum": "<",
        "multipleOf": "multiple of",
    }
    return "".join(f", {word} {_number(bounded[key])}" for key, word in words.items() if key in bounded)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
