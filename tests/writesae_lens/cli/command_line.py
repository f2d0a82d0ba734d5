"""The command line in this process, for its packages take seconds to import."""

import contextlib
import io
import os
import sys
from typing import Any, NamedTuple
from unittest import mock

import writesae_lens_cli


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: Any, cwd: Any = None) -> Done:
    """What ``writesae-lens ARGUMENTS`` returns and prints."""
    out, err, before, code = io.StringIO(), io.StringIO(), os.getcwd(), 0
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
        code = int(left.code or 0)
    finally:
        os.chdir(before)
    return Done(code, out.getvalue(), err.getvalue())
