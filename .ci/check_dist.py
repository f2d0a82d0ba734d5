"""Check what `make dist` built: a wheel and an sdist with all files of the packages and no others.

A file of package data that is missing, a module left behind by an earlier build, and a version that says
something else than the package are errors.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("hooked_models", "writesae_lens", "writesae_lens_cli")
BESIDE = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
LARGEST = 8 * 2**20


def sources() -> set[str]:
    """The files of the packages in the checkout."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*")]
    return {
        str(file.relative_to(ROOT)) for file in files if file.is_file() and "__pycache__" not in file.parts
    }


def stated(file: str, name: str) -> str:
    """What a line ``name = "..."`` of a file says."""
    found = re.search(f'^{name} = "(.+)"$', (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "not stated"


def difference(name: str, found: set[str], expected: set[str]) -> list[str]:
    """A line for what a file lacks and one for what it should not hold."""
    lists = {"lacks": expected - found, "should not hold": found - expected}
    return [f"{name} {what} {', '.join(sorted(names)[:8])}" for what, names in lists.items() if names]


def problems(folder: Path) -> list[str]:
    """What is wrong with the wheel and the sdist in a folder."""
    version = stated("pyproject.toml", "version")
    stem = f"writesae_lens-{version}"
    wheel, sdist = folder / f"{stem}-py3-none-any.whl", folder / f"{stem}.tar.gz"
    built = {file.name for file in folder.iterdir()}
    if built != {wheel.name, sdist.name}:
        return [f"{folder} holds {', '.join(sorted(built))}, not just {wheel.name} and {sdist.name}"]
    wrong = [
        f"{file.name} has more than {LARGEST} bytes"
        for file in (wheel, sdist)
        if file.stat().st_size > LARGEST
    ]
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith(f"{stem}.dist-info/")}
    wrong += difference(wheel.name, held, sources())
    with tarfile.open(sdist) as archive:
        held = {file.name.removeprefix(f"{stem}/") for file in archive.getmembers() if file.isfile()}
    held = {name for name in held if not name.startswith("writesae_lens.egg-info/")}
    wrong += difference(sdist.name, held, sources() | BESIDE)
    for package in ("hooked_models", "writesae_lens"):
        own = stated(f"{package}/__init__.py", "__version__")
        wrong += (
            [] if own == version else [f"{package}.__version__ is {own}, in pyproject.toml it is {version}"]
        )
    return wrong


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    sys.stdout.write(("\n".join(found) or "wheel and sdist hold the packages' files and no others") + "\n")
    sys.exit(bool(found))
