"""Part: a class that YAML names by `kind` is both its config schema and its code.

A *family* (Objective, Source, Hook, ...) is a direct subclass of `Part` that names its `home`, the package or module
whose files define its kinds. A kind is any class below it that sets `kind`. There is no list to keep: a family finds
its kinds by importing its home, and plug-ins add theirs by being imported before validation.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    field_validator,
    model_serializer,
)
from pydantic_core import PydanticCustomError, core_schema

from trainer.errors import UserError

NUMBERS = {int, float, int | None, float | None}


class Section(BaseModel):
    """A frozen group of config values that refuses unknown keys, NaN, infinity, and booleans in place of numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any, info: Any) -> Any:
        # Pydantic reads True as 1, so that `warmup_steps: true` would silently warm up for one step.
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in NUMBERS:
            raise PydanticCustomError("bool_for_number", "Input should be a number, not a boolean")
        return value


class Part(Section):
    """A section of the config whose class is chosen by its `kind`."""

    kind: ClassVar[str]
    home: ClassVar[str]
    default_kind: ClassVar[str | None]
    family: ClassVar[type[Part]]
    _kinds: ClassVar[dict[str, type[Part]]]

    def __init_subclass__(cls, home: str | None = None, default_kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # the two names are for __pydantic_init_subclass__, which runs later

    @classmethod
    def __pydantic_init_subclass__(cls, home: str | None = None, default_kind: str | None = None, **_: Any) -> None:
        if home is not None:
            cls.home, cls.default_kind, cls.family, cls._kinds = home, default_kind, cls, {}
        elif "kind" in cls.__dict__:
            known = cls.family._kinds.setdefault(cls.kind, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise UserError(
                    f"{cls.family.__name__.lower()} kind {cls.kind!r} is defined twice",
                    f"{known.__module__} and {cls.__module__}",
                    "rename one of them",
                )

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """Every kind of this family, by name; the first call imports the family's home."""
        home = importlib.import_module(cls.home)
        for module in pkgutil.iter_modules(getattr(home, "__path__", [])):
            importlib.import_module(f"{cls.home}.{module.name}")
        return {name: cls._kinds[name] for name in sorted(cls._kinds)}  # pyright: ignore[reportReturnType]

    @classmethod
    def parse(cls, value: Any) -> Self:
        """The part that the mapping `value` describes; raises ValidationError with the path of each fault."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("not_a_mapping", "Input should be a mapping with a `kind`")
        kinds = cls.kinds()
        kind = value.get("kind", cls.default_kind)
        if kind is None:
            raise PydanticCustomError("missing_kind", "`kind` is missing; one of {kinds}", {"kinds": ", ".join(kinds)})
        if not isinstance(kind, str) or kind not in kinds:
            raise PydanticCustomError("unknown_kind", "unknown kind {seen}", {"seen": repr(kind), "kinds": list(kinds)})
        return kinds[kind].model_validate({key: item for key, item in value.items() if key != "kind"})

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        if "home" in cls.__dict__:
            return core_schema.no_info_plain_validator_function(cls.parse)
        return handler(source)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        if "home" not in cls.__dict__:
            return handler(schema)
        options = []
        for kind, part in cls.kinds().items():
            option = part.model_json_schema()
            option["properties"] = {"kind": {"const": kind}} | option.get("properties", {})
            if kind != cls.default_kind:
                option["required"] = ["kind", *option.get("required", [])]
            options.append(option)
        return {"oneOf": options} if options else {"type": "object", "required": ["kind"]}

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: Any) -> dict[str, Any]:
        return {"kind": self.kind} | handler(self)


@contextmanager
def temporary_kinds() -> Iterator[None]:
    """Within it plug-ins may define kinds; at its end they are forgotten, and their modules can be imported anew.

    For the tests of plug-ins and for notebooks: a kind once defined would stay for the life of the process.
    """
    before = {family: set(family._kinds) for family in Part.__subclasses__()}
    try:
        yield
    finally:
        for family in Part.__subclasses__():
            for kind in set(family._kinds) - before.get(family, set()):
                module = family._kinds[kind].__module__
                if module.partition(".")[0] != __name__.partition(".")[0]:
                    del family._kinds[kind]
                    sys.modules.pop(module, None)
