"""The floors of the house: what may import what, and what must stay light. Read from the source with `ast`.

An import under `if TYPE_CHECKING:` is exempt everywhere: it never runs, so it cannot make a cycle or a slow start.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trainer
import trainer.commands
from trainer.cli import COMMANDS

PACKAGE = Path(trainer.__file__).parent

# From the ground up. A module imports from lower floors, from its own package, and, if it is a top-level module, from
# other top-level modules of its own floor. A package stands on one floor with all that is in it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "files", "registry", "yaml_text"),  # the standard library, pydantic and yaml
    ("rng", "schedule"),  # what maths and data both draw from
    ("ema", "hook", "lr", "muon", "objectives", "optimizers", "timesteps", "weighting"),  # maths, not data or networks
    ("cached", "data"),  # know no network
    ("adherence", "denoiser", "encoder_cache", "grid", "kernels", "latents", "models", "sampler"),  # knows no run
    ("config", "config_file", "config_reference"),  # types its fields with the parts below
    ("run",),  # the run directory, without torch
    (  # one run
        *("checkpoint", "control", "device", "encoding", "failure", "loop", "peers", "preflight", "resume", "runtime"),
        *("state", "step", "training", "watchdog"),
    ),
    ("hooks",),  # what happens around its steps
    (  # whole jobs
        *("auto_values", "cache_job", "comparison", "draw", "dry_run", "launch", "repetition", "replay"),
        *("reproduction", "summary", "verification"),
    ),
    ("__main__", "cli", "commands", "train"),  # the command line
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

# Libraries that only some of them may import. torchvision: none, for a broken one that is installed breaks the others.
USERS = {"accelerate": {"runtime"}, "diffusers": {"models"}, "transformers": {"models"}, "torchvision": set()}

# What a light start must do without: all that the base install does not bring, and what that would bring along.
HEAVY = (
    *("torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "datasets", "peft", "safetensors"),
    *("tokenizers", "huggingface_hub", "tqdm", "torchvision"),
)


def sources() -> dict[str, tuple[Path, ast.Module]]:
    """Dotted name -> file and tree of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path, ast.parse(path.read_text(encoding="utf-8"))
    return found


SOURCES = sources()


def running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `node`, without what stands under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (each for other in child.orelse for each in (other, *running(other)))
        else:
            yield child
            yield from running(child)


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of the modules that some code of `tree` imports, at the top or inside a function."""
    found = set()
    for node in running(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            found |= submodules or {str(node.module)}
    return found


IMPORTS = {name: imports(tree) for name, (_, tree) in SOURCES.items()}
OURS = {name: {each for each in found if each in SOURCES and each != "trainer"} for name, found in IMPORTS.items()}


def room(module: str) -> str:
    """The top-level module or package of `trainer` that a module is, or is in."""
    return module.split(".")[1]


THERE = {room(name) for name in SOURCES if name != "trainer"}


def test_every_module_has_a_floor():
    homeless = sorted(THERE - FLOOR.keys())
    assert not homeless, f"give {', '.join(homeless)} a floor: add it to FLOORS in {Path(__file__).name}"
    gone = sorted(FLOOR.keys() - THERE)
    assert not gone, f"take {', '.join(gone)} out of FLOORS in {Path(__file__).name}: there is no such module"


def test_modules_import_only_from_lower_floors_and_siblings():
    wrong = []
    for module, imported in OURS.items():
        for other in imported if module != "trainer" else ():
            here, there = room(module), room(other)
            both_top_level = module.count(".") == other.count(".") == 1 and not {here, there} & packages()
            same_floor = FLOOR[here] == FLOOR[there] and (here == there or both_top_level)
            if not (FLOOR[there] < FLOOR[here] or same_floor):
                wrong.append(f"{module} (floor {FLOOR[here]}) imports {other} (floor {FLOOR[there]})")
    assert not wrong, "; ".join(wrong)
    assert not OURS["trainer"], "trainer/__init__.py imports nothing of the package"


def packages() -> set[str]:
    return {room(name) for name, (path, _) in SOURCES.items() if path.name == "__init__.py" and name != "trainer"}


def test_no_imports_go_in_a_circle():
    # A module also runs the __init__ of each package above it.
    parents = {name: {name.rsplit(".", depth)[0] for depth in range(1, name.count("."))} for name in SOURCES}
    try:
        TopologicalSorter({name: OURS[name] | parents[name] for name in SOURCES}).prepare()
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("library", USERS)
def test_a_library_is_imported_only_where_it_may_be(library: str):
    users = {
        name
        for name, imported in IMPORTS.items()
        if any(each.split(".")[0] == library for each in imported)
        and (name == "trainer" or room(name) not in USERS[library])
    }
    assert not users, f"{library} is imported by {', '.join(sorted(users))}"


def test_the_run_directory_is_read_and_written_without_heavy_libraries():
    for name, imported in IMPORTS.items():
        if name.startswith("trainer.run"):
            assert name.startswith("trainer.runtime") or not {each.split(".")[0] for each in imported} & {*HEAVY}, name


def test_no_top_level_name_hides_a_library():
    """A launcher that runs trainer/train.py as a file searches that folder first for `import datasets`."""
    libraries = {name.lower() for name in sys.stdlib_module_names}
    libraries |= {name.lower() for name in importlib.metadata.packages_distributions()} - {"trainer"}
    assert {"logging", "yaml", "pydantic"} <= libraries
    hidden = {name for name in THERE - {"__main__"} if name.lower() in libraries}
    assert not hidden


def test_no_file_is_longer_than_400_lines():
    for path, _ in SOURCES.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, f"{path.name}: look for the seam"


def test_no_except_catches_everything_unnamed():
    for name, (_, tree) in SOURCES.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{name}:{node.lineno}"


def test_the_command_line_lists_the_commands_that_there_are():
    assert set(COMMANDS) == {module.name for module in pkgutil.iter_modules(trainer.commands.__path__)}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_an_example_that_it_understands(name: str):
    command = importlib.import_module(f"trainer.commands.{name}")
    assert command.__doc__
    assert callable(command.run)
    parser = argparse.ArgumentParser(prog=f"difftrain {name}", exit_on_error=False)
    command.add_arguments(parser)
    program, *arguments = re.sub(r"\s*>.*", "", command.EXAMPLE).split(" ", 2)
    assert (program, arguments[0]) == ("difftrain", name)
    parser.parse_args(re.findall(r'"[^"]*"|\S+', arguments[1]) if len(arguments) > 1 else [])
    documented = {option for action in parser._actions for option in action.option_strings} - {"-h"}
    assert all(action.help for action in parser._actions), f"some option of {sorted(documented)} has no help"


LIGHT = """
import contextlib, io, sys
for name in {heavy!r}:
    sys.modules[name] = None  # importing it now fails
from trainer.cli import COMMANDS, main
import trainer.config, trainer.config_file
from trainer.config_reference import json_schema, markdown

def said(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    assert code == 0, (arguments, code)
    return out.getvalue()

for name in COMMANDS:
    assert name in said("--help")
    assert f"difftrain {{name}}" in said(name, "--help")
assert said("schema") == json_schema()
assert said("schema", "--markdown") == markdown()
assert "valid:" in said("validate", "--config", {config!r}, "--output-dir", {folder!r})
loaded = [name for name in {heavy!r} if sys.modules[name] is not None]
assert not loaded, loaded
"""


def test_help_schema_and_validation_work_with_the_base_install_alone(tiny_config: Path, tmp_path: Path):
    script = LIGHT.format(heavy=HEAVY, config=str(tiny_config), folder=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("config.resolved.yaml", "env.json", "run_manifest.json")
    }
