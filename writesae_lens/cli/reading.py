"""The bodies of ``writesae-lens read`` and ``writesae-lens steer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from writesae_lens.cli.subjects import load_saes, read_prompt_text, read_text, token_of, warnings_as_lines
from writesae_lens.errors import WriteSAEError
from writesae_lens.locks import locked
from writesae_lens.use.reading import read_prompt
from writesae_lens.use.steer import steer


def run_read(
    references: list[str],
    prompt: str | None,
    text: Path | None,
    n_features: int,
    out: Path,
    model: str | None,
    device: str,
) -> None:
    """Read the prompt, print it coloured, save records and page, print the headline."""
    content = read_prompt_text(prompt, text)
    loaded, saes = load_saes(references, model, device)
    with locked(out), warnings_as_lines():
        result = read_prompt(loaded, saes, content, n_features)
        result.save(out)
    result.show()
    typer.echo(f"\npage: {out / 'read.html'}")
    typer.echo(result.headline)


def run_steer(
    references: list[str],
    features: list[str],
    sizes: list[float],
    promoted: list[str],
    texts: tuple[str | None, Path | None, Path | None],
    out: Path,
    model: str | None,
    device: str,
    options: dict[str, Any],
) -> None:
    """Steer, print the continuations, save records and dose curve, print the headline.

    Args:
        references: of the SAEs.
        features: as `parse_feature` reads them.
        sizes: one for all features, or one each.
        promoted: tokens to follow.
        texts: the prompt, the file of the prompt, and the file of the text that sizes are measured on.
        out: folder of the result.
        model: its name.
        device: of model and SAEs.
        options: further ones of `steer`.
    """
    prompt, file, sizes_text = texts
    content = read_prompt_text(prompt, file)
    tokens = None if sizes_text is None else read_text(sizes_text)
    names = [parse_feature(feature) for feature in features]
    if len(sizes) not in (1, len(names)):
        raise WriteSAEError(f"{len(sizes)} sizes for {len(names)} features: give one --size, or one each")
    if len(set(names)) < len(names):
        raise WriteSAEError("one --feature is given twice: each must be another")
    chosen = dict(zip(names, sizes * len(names) if len(sizes) == 1 else sizes, strict=False))
    if promoted:
        options["promoted"] = tuple(map(token_of, promoted))
    loaded, saes = load_saes(references, model, device)
    with locked(out), warnings_as_lines():
        result = steer(loaded, saes, chosen, content, tokens=tokens, **options)
        result.save(out)
    result.show()
    typer.echo(f"\nsaved: {out}")
    typer.echo(result.headline)


def parse_feature(text: str) -> int | tuple[int, ...]:
    """A feature from ``12``, ``12+600`` (a pair), ``1:3:12`` or ``1:3:12+600`` (with its cell).

    Raises:
        WriteSAEError: the text is none of these.
    """
    *cell, of_sae = text.split(":")
    parts = [*cell, *of_sae.split("+")]
    if len(cell) not in (0, 2) or len(parts) - len(cell) > 2 or not all(x.strip().isdecimal() for x in parts):
        raise WriteSAEError(
            f"--feature is a number, a pair of codes KEY+VALUE, or one of these after LAYER:HEAD:, such as "
            f"1:3:12; got {text!r:.60}"
        )
    numbers = tuple(map(int, parts))
    return numbers[0] if len(numbers) == 1 else numbers
