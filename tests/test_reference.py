"""docs/config.md and docs/config.schema.json are made from the config's classes; these tests keep them current."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config import Config
from trainer.config_reference import json_schema, markdown
from trainer.registry import Part

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize(
    ("name", "make", "command"),
    [
        ("config.md", markdown, "difftrain schema --markdown > docs/config.md"),
        ("config.schema.json", json_schema, "difftrain schema > docs/config.schema.json"),
    ],
)
def test_the_reference_is_current(name: str, make, command: str):
    path = DOCS / name
    current = path.is_file() and path.read_text(encoding="utf-8") == make()
    assert current, f"docs/{name} is not what the code says now; run: {command}"


def test_the_schema_and_the_page_name_every_section_and_kind():
    schema, page = json.loads(json_schema()), markdown()
    assert set(schema["properties"]) == set(Config.model_fields)
    for name, field in Config.model_fields.items():
        assert f"## `{name}`" in page
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            for kind in field.annotation.kinds():
                assert f"### `{name}.kind: {kind}`" in page
                assert f'"const": "{kind}"' in json_schema()


def test_the_page_says_type_bound_default_and_meaning_of_a_key():
    page = markdown()
    (row,) = [line for line in page.splitlines() if line.startswith("| `max_grad_norm` |")]
    assert row.split(" | ")[1:3] == ["number or null, > 0", "`1.0`"]
    (row,) = [line for line in page.splitlines() if line.startswith("| `max_steps` |")]
    assert row.split(" | ")[1:3] == ["integer, >= 1", "required"]
    assert all(line.count("|") == 5 for line in page.splitlines() if line.startswith("| `"))
