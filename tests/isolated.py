"""Make environments with exactly the packages that an install line of the documents installs.

They consist of links into the environment of the tests, so no registry is used and no module is
compiled again. Only the packages that the install line names and their requirements can be imported
there; the checkout cannot.
"""

from __future__ import annotations

import configparser
import json
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePath

from packaging.requirements import Requirement

from tests.processes import ROOT


def python_command(install_line: str, folder: Path) -> list[str]:
    """The command of a Python that can import only what `pip install …` installs.

    The path of a script is to be appended. The links are made in `folder`.
    """
    roots, distributions = [], _closure(_requirements(install_line))
    for each in distributions:
        _link(each, folder)
    if "." in shlex.split(install_line):
        (folder / "relay").symlink_to(ROOT / "relay")
    roots.append(str(folder))
    # -I and -S: neither the folder nor the user's nor the environment's packages are on the path.
    start = f"import runpy, sys; sys.path += {roots!r}; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    return [sys.executable, "-I", "-S", "-c", start]


def _requirements(install_line: str) -> list[Requirement]:
    program, command, *names = shlex.split(install_line)
    assert (program, command) == ("pip", "install"), install_line
    found = [Requirement(name) for name in names if name != "."]
    if "." in names:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        found += [Requirement(line) for line in setup["options"]["install_requires"].strip().splitlines()]
    return found


def _closure(wanted: list[Requirement]) -> list[Distribution]:
    """The distributions of `wanted` and of their requirements, by the markers of this Python."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, "") for requirement in wanted]
    while waiting:
        requirement, of_extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError:
            raise AssertionError(f"{requirement} is not among the packages of the tests") from None
        found[requirement.name.lower()] = installed
        for extra in ("", *requirement.extras):
            if (requirement.name.lower(), extra) not in seen:
                seen.add((requirement.name.lower(), extra))
                waiting += [(Requirement(text), extra) for text in installed.requires or ()]
    return list(found.values())


def _link(installed: Distribution, folder: Path) -> None:
    files = [file for file in installed.files or () if ".." not in file.parts]
    packages = {file.parent for file in files if file.name == "__init__.py" or file.parent.suffix == ".dist-info"}
    linked: set[PurePath] = set()
    for file in files:
        # Several distributions may share a folder without __init__.py (google, opentelemetry).
        whole = next((parent for parent in [*reversed(file.parents)][1:] if parent in packages), file)
        if whole not in linked:
            linked.add(whole)
            (folder / whole).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / whole).exists():
                (folder / whole).symlink_to(Path(str(installed.locate_file(whole))))


def link_node_modules(install_line: str, installed: Path, folder: Path) -> None:
    """Link what `npm install …` installs from the node_modules of `installed` into `folder`."""
    program, command, *names = shlex.split(install_line)
    assert (program, command) == ("npm", "install"), install_line
    waiting, linked = [*names], set[str]()
    while waiting:
        name = waiting.pop()
        if name in linked:
            continue
        linked.add(name)
        target = installed / "node_modules" / name
        assert target.is_dir(), f"{name} is not among the packages of {installed}"
        link = folder / "node_modules" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
        waiting += [needed for needed in _dependencies(target) if (installed / "node_modules" / needed).is_dir()]


def _dependencies(package: Path) -> Iterator[str]:
    manifest = json.loads((package / "package.json").read_text())
    yield from manifest.get("dependencies", {})
    yield from manifest.get("optionalDependencies", {})
    optional = manifest.get("peerDependenciesMeta", {})
    yield from (name for name in manifest.get("peerDependencies", {}) if not optional.get(name, {}).get("optional"))


# Node does not resolve the links, so the imports of a package are searched among them too.
NODE_COMMAND = ["node", "--preserve-symlinks", "--preserve-symlinks-main"]
