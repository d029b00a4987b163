"""Options that several commands have, and the libraries below them kept quiet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="Name of a shipped recipe, or a .yaml file.")]
CacheOption = Annotated[Path | None, typer.Option(help="Folder for models and teacher embeddings, shared by runs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


def hush() -> None:
    """Keep the bars and chatter of the libraries below off the screen: we show our own."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
