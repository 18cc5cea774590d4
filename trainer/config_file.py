"""From a YAML file and `--set` overrides to a Config, or to one error that names every fault and its line."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from trainer.config import Config
from trainer.errors import UserError
from trainer.registry import Part
from trainer.yaml_text import parse_yaml

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class LoadedConfig:
    """A config and where each of its values was written."""

    config: Config
    path: Path
    text: str
    places: dict[Loc, str]  # "file:line" or "--set ..." of each value that was written down

    def where(self, dotted: str) -> str:
        """Where the value stands, or where its section does, with its dotted name."""
        return f"{_place(self.places, tuple(dotted.split('.')), str(self.path))} {dotted}"


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    output_dir: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LoadedConfig:
    """The config in the file `path` under `overrides` ("a.b=value"); raises UserError with all faults at once.

    `output_dir` overrides train.output_dir. `say` is told of every key that an override made meaningless.
    """
    path = Path(path)
    text = _read(path)
    values, lines = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError("a config is a mapping of sections", f"{path}:1", "see configs/ for complete ones")
    places: dict[Loc, str] = {loc: f"{path}:{line}" for loc, line in lines.items()}
    overridden = [_apply(override, values, places) for override in overrides]
    if output_dir is not None and isinstance(values.setdefault("train", {}), dict):
        values["train"]["output_dir"] = output_dir
    _import_plugins(values.get("plugins"), _place(places, ("plugins",), str(path)))
    for loc in overridden:
        if len(loc) == 2 and loc[1] == "kind":
            _drop_keys_of_the_old_kind(str(loc[0]), values, set(overridden), say)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_describe(error, values, places, str(path))) from None
    if config.train.output_dir is None:
        train = config.train.model_copy(update={"output_dir": str(Path("runs") / path.stem)})
        config = config.model_copy(update={"train": train})
    return LoadedConfig(config, path, text, places)


def reloaded(values: dict[str, Any], source: Path) -> LoadedConfig:
    """The config that a run recorded in `source`; raises UserError if this version no longer takes it."""
    _import_plugins(values.get("plugins"), str(source))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_describe(error, values, {}, str(source))) from None
    return LoadedConfig(config, source, config.to_yaml(), {})


def _read(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > 1_000_000:
            raise UserError(f"{path.stat().st_size} bytes are too many for a config", str(path))
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}", str(path)) from None
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        fix = f"did you mean {path.parent / near[0]}?" if near else None
        raise UserError(f"cannot read the config: {error.strerror}", str(path), fix) from None


def _apply(override: str, values: dict[str, Any], places: dict[Loc, str]) -> Loc:
    """Write one `a.b=value` into `values` and return its path."""
    dotted, equals, text = override.partition("=")
    place = f"--set {override}"
    if not equals or not all(dotted.split(".")):
        raise UserError(f"--set wants section.key=value, not {override!r}", fix="for example --set train.max_steps=100")
    value, _ = parse_yaml(text, place)
    *sections, key = dotted.split(".")
    node = values
    for depth, section in enumerate(sections):
        if node.get(section) is None:
            node[section] = {}
            places[tuple(sections[: depth + 1])] = place
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(f"`{'.'.join(sections[: depth + 1])}` is not a section", place)
    node[key] = value
    loc = (*sections, key)
    for old in [old for old in places if old[: len(loc)] == loc]:
        del places[old]
    places[loc] = place
    return loc


def _import_plugins(names: Any, where: str) -> None:
    if not isinstance(names, list):
        return  # absent, or of a wrong type that validation names
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a console script does not search the working directory
    for name in names:
        try:
            importlib.import_module(str(name))
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever a stranger's module raises)
            at = traceback.extract_tb(error.__traceback__)[-1]
            what = f"plugin {name!r} cannot be imported: {type(error).__name__}: {error}"
            own = f" ({at.filename}:{at.lineno})" if not isinstance(error, ModuleNotFoundError) else ""
            raise UserError(what + own, where, "run from its folder, install it, or mend it") from None


def _drop_keys_of_the_old_kind(
    section: str, values: dict[str, Any], kept: set[Loc], say: Callable[[str], None]
) -> None:
    part = _part(section, values)
    if part is None:
        return  # an unknown section or kind, which validation names
    lost = [key for key in values[section] if key != "kind" and key not in part.model_fields]
    lost = [key for key in lost if (section, key) not in kept]
    for key in lost:
        del values[section][key]
    if lost:
        say(f"{section}.kind={part.kind}: dropped what this kind does not have: {', '.join(lost)}")


def _part(section: str, values: dict[str, Any]) -> type[Part] | None:
    """The Part class that the section names by its kind, if it is one."""
    field = Config.model_fields.get(section)
    annotation = field.annotation if field else None
    family = next((each for each in get_args(annotation) if each is not type(None)), annotation)  # of a section or None
    node = values.get(section)
    if not isinstance(family, type) or not issubclass(family, Part) or not isinstance(node, dict):
        return None
    return family.kinds().get(str(node.get("kind", family.default_kind)))


def _describe(error: ValidationError, values: dict[str, Any], places: dict[Loc, str], path: str) -> str:
    """One line per fault: place, dotted key, what is wrong, what was probably meant."""
    faults = [
        f"{_place(places, _stands(fault), path)} {'.'.join(map(str, fault['loc']))}: {_explain(fault, values)}"
        for fault in _own_faults(error)
    ]
    if len(faults) == 1:
        return f"config: {faults[0]}"
    return "\n  ".join([f"config: {len(faults)} faults", *faults])


def _own_faults(error: ValidationError) -> list[Any]:
    """The faults, without those of lists that are too short only because a faulty item does not count."""
    faults = error.errors()
    above = {fault["loc"][:depth] for fault in faults for depth in range(len(fault["loc"]))}
    return [fault for fault in faults if fault["type"] != "too_short" or fault["loc"] not in above]


def _stands(fault: Any) -> Loc:
    return (*fault["loc"], "kind") if fault["type"] == "unknown_kind" else fault["loc"]


def _place(places: dict[Loc, str], loc: Loc, path: str) -> str:
    while loc and loc not in places:
        loc = loc[:-1]
    return places.get(loc, path)


def _explain(fault: Any, values: dict[str, Any]) -> str:
    *parents, key = fault["loc"]
    seen = fault["input"]
    match fault["type"]:
        case "extra_forbidden":
            return f"unknown key{_nearest(str(key), _keys(parents, values), values)}"
        case "unknown_kind":
            kinds = fault["ctx"]["kinds"]
            near = difflib.get_close_matches(str(seen.get("kind")), kinds, 1)
            return f"{fault['msg']}; {f'did you mean `{near[0]}`? ' if near else ''}there are {', '.join(kinds)}"
        case "missing":
            return "required, but missing"
        case _:
            message = fault["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
            message = re.sub(r"valid dictionary or instance of \w+", "section with keys of its own", message)
            message = message[0].lower() + message[1:]
            return message if isinstance(seen, dict) else f"{message}, not {seen!r}"


def _nearest(key: str, known: Sequence[str], values: dict[str, Any]) -> str:
    if match := difflib.get_close_matches(key, known, 1):
        return f"; did you mean `{match[0]}`?"
    owners = [name for name in Config.model_fields if key in _keys([name], values)]
    return f"; `{key}` belongs to section `{owners[0]}`" if owners else f"; known are {', '.join(known)}"


def _keys(parents: Sequence[str | int], values: dict[str, Any]) -> list[str]:
    """The keys that may stand below `parents`."""
    if not parents:
        return list(Config.model_fields)
    section = str(parents[0])
    part = _part(section, values)
    if part is not None:
        return _keys_below(part, values[section], parents[1:]) or ["kind", *part.model_fields]
    field = Config.model_fields.get(section)
    for option in getattr(field.annotation, "__args__", [field.annotation]) if field else []:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return list(option.model_fields)
    return []


def _keys_below(part: type[Part], node: Any, parents: Sequence[str | int]) -> list[str]:
    """The keys that may stand below `parents` in a part; none if it is no section that is known.

    A section in a section that names a kind is of the outer one's family, and has not the keys that all kinds have.
    """
    known: type[BaseModel] = part
    keys: list[str] = []
    for parent in parents:
        try:
            node = node[parent]
        except (LookupError, TypeError):
            return []
        if isinstance(parent, int):  # an item of a list, whose class the list's field has named
            continue
        field = known.model_fields.get(parent)
        kind = part.family.kinds().get(str(node.get("kind"))) if isinstance(node, dict) else None
        inner = [each for each in _classes(field.annotation if field else None) if issubclass(each, BaseModel)]
        if inner:
            known, keys = inner[0], list(inner[0].model_fields)
        elif kind is not None:
            known = kind
            keys = ["kind", *(key for key in kind.model_fields if key not in part.family.model_fields)]
    return keys


def _classes(annotation: Any) -> list[type]:
    """The classes that an annotation names, such as A and B of `tuple[A, ...] | B`."""
    if args := get_args(annotation):
        return [each for arg in args for each in _classes(arg)]
    return [annotation] if isinstance(annotation, type) else []
