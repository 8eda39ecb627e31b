"""What all commands share: the app, the options that several of them have, and how they print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ratlip.settings import load_settings, read_overrides

if TYPE_CHECKING:
    from ratlip.workspace import Workspace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The reproduction suite for RATLIP: prepare data, train, score, generate, compare, report. "
    "The notebooks do the same with explanations (`make lab`).",
)
notebook = typer.Typer(no_args_is_help=True, help="Execute notebooks, and store what they show.")
app.add_typer(notebook, name="notebook")
own = typer.Typer(no_args_is_help=True, help="Profiles of your own.")
app.add_typer(own, name="profile")
console = Console(highlight=False, emoji=False)

Profile = Annotated[str, typer.Option("--profile", "-p", help="a profile (`ratlip profiles`) or .yaml file")]
Data = Annotated[Path | None, typer.Option("--data", help="root of the dataset (not for demo, smoke)")]
Out = Annotated[Path | None, typer.Option("--out", help="where everything goes [outputs/<profile>]")]
OVERRIDE = "override a setting, e.g. -s model.conditioning=cat -s seed=1; repeatable"
Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help=OVERRIDE)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]
Accelerator = Annotated[str, typer.Option(help="auto, cpu, cuda")]
Workers = Annotated[int, typer.Option(help="loader processes")]


def say(*lines: str) -> None:
    """Print lines as they are: a path must not be broken where the terminal ends."""
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def workspace_of(profile: str, out: Path | None, pairs: list[str] | None, quiet: bool = False) -> Workspace:
    """The workspace of a profile with overrides; imported late."""
    from ratlip.workspace import Workspace

    return Workspace.of(load_settings(profile, read_overrides(pairs)), out, progress=not quiet)
