"""Every field of the config is described, bounded and read by the code."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from pathlib import Path

import annotated_types

import trainer
from trainer.config import Config
from trainer.registry import NUMBERS, Part, Section


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Every section of the config and every kind of it, with the name of the section."""
    yield "", Config
    for name, field in Config.model_fields.items():
        options = [field.annotation, *typing.get_args(field.annotation)]
        for option in options:
            if isinstance(option, type) and issubclass(option, Part):
                yield from ((name, part) for part in option.kinds().values())
            elif isinstance(option, type) and issubclass(option, Section):
                yield name, option


def test_every_field_says_what_it_means():
    for name, section in sections():
        for key, field in section.model_fields.items():
            if section is Config and key != "plugins" and key != "hooks":
                continue  # a section, which says it itself
            assert field.description, f"{name}.{key} of {section.__name__} has no description"
            assert field.description.endswith("."), f"{name}.{key}: {field.description!r}"


UNBOUNDED = {"LogitNormal.mean": "a logit is any number"}


def test_every_number_has_a_lower_bound_or_a_reason_to_have_none():
    seen = set()
    for _, section in sections():
        for key, field in section.model_fields.items():
            if field.annotation not in NUMBERS:
                continue
            seen.add(f"{section.__name__}.{key}")
            bounded = any(isinstance(each, annotated_types.Ge | annotated_types.Gt) for each in field.metadata)
            assert bounded or f"{section.__name__}.{key}" in UNBOUNDED, f"{section.__name__}.{key} takes any number"
    assert set(UNBOUNDED) <= seen
    assert len(seen) > 30


# Under which names the code holds a section, beside the section's own name.
HELD_AS = {"model": {"family"}, "data": {"source"}, "ema": {"spec"}, "": {"config"}}


class Reads(ast.NodeVisitor):
    """(holder, field) of each attribute that is read, where `self` counts as the class around it."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self.unpacked: dict[str, set[str]] = {}  # holder -> classes made by Class(**holder.model_dump())
        self._class = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = outer

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found.add((self._holder(node.value), node.attr))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            match keyword:
                case ast.keyword(arg=None, value=ast.Call(func=ast.Attribute(attr="model_dump", value=value))):
                    self.unpacked.setdefault(self._holder(value), set()).add(self._holder(node.func))
        self.generic_visit(node)

    def _holder(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id="self"):
                return f"class {self._class}"
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return name
        return ""


def test_every_field_is_read_somewhere():
    reads = Reads()
    for path in Path(trainer.__file__).parent.rglob("*.py"):
        reads.visit(ast.parse(path.read_text(encoding="utf-8")))
    unread = []
    for name, section in sections():
        holders = {name, *HELD_AS.get(name, ())}
        classes = {base.__name__ for base in section.__mro__ if issubclass(base, Section)}
        classes |= {made for holder in holders for made in reads.unpacked.get(holder, ())}
        holders |= {f"class {each}" for each in classes}
        unread += [
            f"{section.__name__}.{key}"
            for key in section.model_fields
            if not any((holder, key) in reads.found for holder in holders)
        ]
    assert unread == []
