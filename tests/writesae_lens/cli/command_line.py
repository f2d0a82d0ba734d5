"""The command line in this process, for its packages take seconds to import."""

import contextlib
import io
import os
import re
import sys
from typing import Any, NamedTuple
from unittest import mock

import writesae_lens_cli


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: Any, cwd: Any = None) -> Done:
    """Exit status and output of ``writesae-lens ARGUMENTS``."""
    out, err, before, status = io.StringIO(), io.StringIO(), os.getcwd(), 0
    argv = ["writesae-lens", *map(str, arguments)]
    try:
        os.chdir(cwd or before)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", argv),
        ):
            writesae_lens_cli.main()
    except SystemExit as left:
        status = int(left.code or 0)
    finally:
        os.chdir(before)
    return Done(status, out.getvalue(), err.getvalue())


def words(text: str) -> str:
    """The words of an output, without the frames and line ends of a terminal."""
    return " ".join(re.sub(r"[^\x00-\x7f]", " ", text).split())
