"""Exit 0 if this Python's environment holds the tested set and an editable install of this checkout, else 1.

It reads installed metadata instead of leaving a stamp, so it also notices what was upgraded or removed by hand, and it
accepts an environment that somebody installed with pip. Needs nothing but what it looks for; takes a fraction of a
second, where pip would take ten and need the network.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPOSITORY = Path(__file__).resolve().parents[1]


def fault() -> str | None:
    """What is missing or of another version than the tested one; None if nothing is."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return "packaging is not installed"

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        own = distribution(project["name"])
    except PackageNotFoundError:
        return f"{project['name']} is not installed"
    if editable_folder(own) != REPOSITORY:
        return f"{project['name']} is not installed from {REPOSITORY}"
    if {script.name: script.value for script in own.entry_points} != project["scripts"]:
        return "the commands have changed"

    def applying(lines: list[str], extras: set[str]) -> list[Requirement]:
        """The requirements among `lines` that this Python and these extras call for."""
        requirements = [Requirement(line) for line in lines]
        return [r for r in requirements if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras | {""})]

    pinned = tested_versions()
    extras = project["optional-dependencies"]
    wanted = applying([*project["dependencies"], *extras["text2image"], *extras["dev"]], set())
    seen = set()
    while wanted:
        requirement = wanted.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        name = normalised(requirement.name)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            return f"{name} is not installed"
        version = installed.version.partition("+")[0]  # 2.13.0+cpu is a build of 2.13.0
        if version != pinned.get(name, version) or not requirement.specifier.contains(version, prereleases=True):
            return f"{name} is {installed.version}, tested: {pinned.get(name, requirement.specifier)}"
        wanted += applying(installed.requires or [], requirement.extras)
    return None


def tested_versions() -> dict[str, str]:
    """Package to version, from constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {normalised(name): version.strip() for name, version in pins}


def editable_folder(installed: Distribution) -> Path | None:
    """The checkout that an editable install runs from, None for any other install."""
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlsplit(origin["url"]).path)).resolve()


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    found = fault()
    if found:
        print(found, file=sys.stderr)
    sys.exit(found is not None)
