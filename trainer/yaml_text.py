"""YAML text as plain values, each with the line it stands on.

YAML 1.2 scalars: `1e-4` is a float and only true/false are booleans (PyYAML's YAML 1.1 reads the first as a string and
`no` as False). A number remembers how it was written, so that a commit like `1e5` or a name like `007` can be had where
the schema wants text. Duplicate keys are refused, and so is text that is, or by aliases grows, larger than a config.
"""

from __future__ import annotations

import re
from typing import Any, Self

import yaml
from yaml.composer import ComposerError

from trainer.errors import UserError

Path = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 40


class Written:
    """A number whose str() is what was written."""

    text: str

    def written_as(self, text: str) -> Self:
        """This number, with its text."""
        self.text = text
        return self

    def __str__(self) -> str:
        return self.text


class WrittenInt(Written, int):
    """An integer of a YAML text."""


class WrittenFloat(Written, float):
    """A float of a YAML text."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}
    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; refuses the one too many before the rest is read, which would take seconds."""
        self.composed += 1
        if self.composed > MAX_NODES:
            raise ComposerError(None, None, "larger than a config can be", self.peek_event().start_mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def parse_yaml(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """The value of a YAML document, and the 1-based line of every node by its path; raises UserError with the line."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{len(text)} characters are too many for a config", name, f"the limit is {MAX_BYTES}")
    try:
        root = yaml.compose(text, Loader=_Loader)
        lines: dict[Path, int] = {}
        return (None if root is None else _value(root, (), lines, name, [0])), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"not valid YAML: {error.problem}", f"{name}:{mark.line + 1}" if mark else name) from None
    except RecursionError:
        raise UserError("nested deeper than a config can be", name) from None
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", name) from None


def _value(node: yaml.Node, path: Path, lines: dict[Path, int], name: str, count: list[int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    count[0] += 1
    if count[0] > MAX_NODES or len(path) > MAX_DEPTH:
        raise UserError("aliases or nesting make this larger than a config can be", f"{name}:{line}")
    if isinstance(node, yaml.MappingNode):
        mapping = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            where = f"{name}:{key_node.start_mark.line + 1}"
            if key is None:
                raise UserError("a key must be plain text", where)
            if key in mapping:
                dotted = ".".join(map(str, (*path, key)))
                first = lines[(*path, key)]
                raise UserError(f"key `{dotted}` stands here a second time", where, f"the first is on line {first}")
            lines[(*path, key)] = key_node.start_mark.line + 1
            mapping[key] = _value(value_node, (*path, key), lines, name, count)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), lines, name, count) for index, item in enumerate(node.value)]
    return _scalar(node, f"{name}:{line}")


def _scalar(node: yaml.Node, where: str) -> Any:
    text = node.value
    match node.tag.rpartition(":")[2]:
        case "str":
            return text
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return WrittenInt(text.replace("_", ""), 0 if "x" in text else 10).written_as(text)
        case "float":
            bare = text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")
            return WrittenFloat(bare).written_as(text)
    raise UserError(f"tag {node.tag} is not allowed in a config", where)
