"""The program ``writesae-lens``: its commands and experiments, what ``--help`` lists, and the exit status.

The experiments are not listed here: each is declared once, beside its function in writesae_lens/experiments,
and `experiment_questions` reads the declarations.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperCommand, TyperGroup

from hooked_models.errors import HookedModelError, one_line, printable

START = "Start here"
SHARE = "Train, download and publish SAEs"
TEST = "Experiments on an SAE: writesae-lens COMMAND --sae SAE"
USE = "Work with features: writesae-lens COMMAND --sae SAE --prompt TEXT"
REPORT = "All results of an SAE, all results of the paper"
PANELS = (START, SHARE, TEST, USE, REPORT)  # the groups of commands in --help, in this order

# typer brings its own copy of click or uses the installed one: this is the common base of its usage errors.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


def experiment_questions() -> dict[str, tuple[str, bool]]:
    """The question of every declared experiment by name, and whether it is about a whole model.

    First those on SAEs in the order of the paper, then those about models. They are read from the source,
    where ``@experiment("name", question="...", paper=...)`` stands above each function, unless the catalogue
    is imported already.
    """
    catalogue: Any = sys.modules.get("writesae_lens.experiments.catalogue")
    if catalogue is not None:
        every = catalogue.EXPERIMENTS | catalogue.OF_MODELS
        return {name: (experiment.question, experiment.of_model) for name, experiment in every.items()}
    package = importlib.util.find_spec("writesae_lens")  # finds a top-level package without importing it
    assert package is not None
    assert package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0], "experiments")
    declared = sorted(declaration for path in folder.glob("*.py") for declaration in _declarations(path))
    return {name: (question, of_model) for of_model, _, _, name, question in declared}


def _declarations(path: Path) -> Iterator[tuple[bool, bool, int, str, str]]:
    """Experiments that a module declares: of a model, not in the paper, number there, name, question."""
    try:
        statements = ast.parse(path.read_bytes(), filename=str(path)).body
    except SyntaxError as error:
        raise HookedModelError(f"{path}, line {error.lineno}: not valid Python ({error.msg})") from error
    for statement in statements:
        for decorator in getattr(statement, "decorator_list", ()):
            if not isinstance(decorator, ast.Call) or not ast.unparse(decorator.func).endswith("experiment"):
                continue
            literals = {keyword.arg: keyword.value for keyword in decorator.keywords}
            literals |= {"name": decorator.args[0]} if decorator.args else {}
            name, question, paper, of_model = (
                node.value if isinstance(node := literals.get(key), ast.Constant) else None
                for key in ("name", "question", "paper", "of_model")
            )
            if isinstance(name, str):
                number = paper if isinstance(paper, int) else 0
                yield bool(of_model), paper is None, number, name, str(question or "")


class Commands(TyperGroup):
    """The commands of this module, and one for every declared experiment."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._questions = experiment_questions()
        for name, (question, of_model) in self._questions.items():
            if name in self.commands:
                raise HookedModelError(f"the experiment {name!r} has the name of a command: give it another")
            panel = START if of_model else TEST
            self.add_command(TyperCommand(name, help=question, rich_help_panel=panel))
        in_order = sorted(self.commands.items(), key=lambda item: PANELS.index(item[1].rich_help_panel))  # type: ignore[attr-defined]
        self.commands = dict(in_order)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command to run: of an experiment, the one with the options of its function."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in self._questions:
            from writesae_lens.cli.experiments import command_of

            command = command_of(name)
        return name, command, rest


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="""Sparse autoencoders on the cache writes of recurrent language models.

    For a first look: writesae-lens demo. Then train an SAE, run experiments on it, and write its report.
    An SAE is named by a folder that SAELens wrote, a published best.pt, or RELEASE:ID from the Hub.""",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"writesae-lens {version('writesae-lens')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; whatever is wrong with the input is one line on stderr and exit status 2."""
    try:
        # Without standalone mode typer returns the status of a command that ended early (--help ends with 0)
        # and raises for input that it refuses.
        sys.exit(app(prog_name="writesae-lens", standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        command = "writesae-lens" if error.ctx is None else error.ctx.command_path
        message = one_line(error.format_message()).removesuffix(".")
        if not message:  # no command at all: typer has printed the help
            sys.exit(2)
        message += f"; see {command} --help"
    except typer.Abort:
        message = "interrupted"
    except (HookedModelError, OSError, SafetensorError) as error:  # the last: while weights are saved
        message = one_line(error)
    typer.echo(f"writesae-lens: {printable(message)}", err=True)
    sys.exit(2)
