"""Bodies of the commands of ``writesae-lens``, which are declared in the package `writesae_lens_cli`."""

from writesae_lens_cli import app, main

__all__ = ["app", "main"]
