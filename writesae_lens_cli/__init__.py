"""The command line ``writesae-lens``: every command with its options and help lines, and nothing heavy.

This package lies outside `writesae_lens`, because importing that imports SAELens and torch, which takes
seconds: ``--help``, ``--version`` and mistyped commands are answered without them. A command that runs
imports its body from `writesae_lens.cli`.
"""

from writesae_lens_cli import (
    attribute,
    export,
    read,
    report,
    start,
    steer,
    train,
    transfer,
)  # each module declares its commands
from writesae_lens_cli.app import app, experiment_questions, main

__all__ = [
    "app",
    "attribute",
    "experiment_questions",
    "export",
    "main",
    "read",
    "report",
    "start",
    "steer",
    "train",
    "transfer",
]
