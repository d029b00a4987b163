"""embedistill recipes: the recipes that come with the package, and what can be set in one."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from embedistill.cli.options import JsonOption, RecipeArgument
from embedistill.cli.printing import print_table
from embedistill.errors import UsageError
from embedistill.files import write_text
from embedistill.recipe import find_recipe, list_recipes, list_settings

app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)


@app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the recipes."""
    lines = {path.stem: _describe_recipe(path) for path in list_recipes()}
    if as_json:
        typer.echo(json.dumps(lines, indent=2, ensure_ascii=False))
    else:
        print_table(["recipe", "what for"], [list(line) for line in lines.items()])


def _describe_recipe(path: Path) -> str:
    """Return the first sentence of a recipe's header."""
    header = [
        line.lstrip("# ")
        for line in takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    ]
    return re.split(r"(?<=[.:;]) ", " ".join(header))[0].rstrip(".:;") + "."


@app.command("show")
def show_command(recipe: RecipeArgument) -> None:
    """Print a recipe."""
    typer.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@app.command("copy")
def copy_command(
    recipe: RecipeArgument, target: Annotated[Path, typer.Argument(help="New file.")] = Path("recipe.yaml")
) -> None:
    """Copy a recipe to a file of your own, which names its runs after the file."""
    if target.exists():
        raise UsageError(str(target), "exists already", do="choose another name")
    name = re.sub(r"[^\w.-]", "-", target.stem)
    text = find_recipe(recipe).read_text(encoding="utf-8")
    write_text(target, re.sub(r"^name: .*$", f"name: {json.dumps(name)}", text, count=1, flags=re.MULTILINE))
    typer.echo(f"{target}: now edit it, then: embedistill run {target}")


@app.command("settings")
def settings_command(as_json: JsonOption = False) -> None:
    """List every setting of a recipe, with its default and what it means."""
    settings = [asdict(setting) for setting in list_settings()]
    if as_json:
        typer.echo(json.dumps(settings, indent=2, ensure_ascii=False))
    else:
        print_table(["setting", "default", "meaning"], [list(setting.values()) for setting in settings])
