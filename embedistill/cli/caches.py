"""embedistill cache: what the teachers encoded, listed, checked, cleared, exchanged."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from embedistill.choices import Kind
from embedistill.cli.options import CacheOption, JsonOption, hush
from embedistill.cli.printing import print_table
from embedistill.errors import UsageError

app = typer.Typer(help="The teachers' embeddings on disk.", no_args_is_help=True)

KeyArgument = Annotated[str, typer.Argument(help="Key of an encoding, or its beginning: embedistill cache list.")]


@app.command("list")
def cache_list_command(cache_dir: CacheOption = None, as_json: JsonOption = False) -> None:
    """List the encodings: whose, how many vectors, how large, when last used."""
    from embedistill.cache.upkeep import list_caches

    found = list_caches(_embeddings(cache_dir))
    if as_json:
        typer.echo(json.dumps([asdict(facts) for facts in found], indent=2, ensure_ascii=False))
        return
    columns = ["key", "teacher", "prompt", "rows", "dims", "kept as", "MB", "last used"]
    rows = [
        [
            facts.key[:12],
            facts.teacher,
            facts.prompt,
            f"{facts.rows:,}",
            str(facts.dim),
            facts.storage,
            f"{facts.bytes / 1e6:,.1f}",
            datetime.fromtimestamp(facts.last_used).astimezone().strftime("%Y-%m-%d %H:%M"),
        ]
        for facts in found
    ]
    print_table(columns, rows)


@app.command("verify")
def cache_verify_command(
    key: Annotated[str, typer.Argument(help="Only encodings whose key begins so.")] = "",
    cache_dir: CacheOption = None,
) -> None:
    """Read every shard and set aside those that are damaged; the next run encodes their texts again. Exit 1 if any."""
    from embedistill.cache.upkeep import verify_caches

    damaged = verify_caches(_embeddings(cache_dir), key)
    for path in damaged:
        typer.echo(f"damaged: {path}")
    if damaged:
        raise typer.Exit(1)
    typer.echo("every shard is as it was written")


@app.command("prune")
def cache_prune_command(
    older_than: Annotated[str | None, typer.Option(help="Delete encodings not used for so long: 30d, 12h.")] = None,
    keep: Annotated[str | None, typer.Option(help="Then delete the oldest until this much is left: 20GB.")] = None,
    cache_dir: CacheOption = None,
) -> None:
    """Delete encodings that were not used for long, and what kills and damage left behind."""
    from embedistill.cache.upkeep import prune_caches

    age = _parse_quantity("--older-than", older_than, {"m": 60, "h": 3600, "d": 86_400, "w": 604_800})
    size = _parse_quantity("--keep", keep, {"MB": 1e6, "GB": 1e9, "TB": 1e12})
    for facts in prune_caches(_embeddings(cache_dir), older_than=age, keep=size):
        typer.echo(f"deleted {facts.key[:12]}: {facts.rows:,} vectors of {facts.teacher}, {facts.bytes / 1e6:,.1f} MB")


@app.command("export")
def cache_export_command(
    key: KeyArgument,
    target: Annotated[Path, typer.Argument(help="New .parquet file with the columns text and embedding.")],
    source: Annotated[str, typer.Option(help="The texts: what corpus.source may be.")],
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    query_column: Annotated[str | None, typer.Option(help="Column of their queries, as in the recipe.")] = None,
    cache_dir: CacheOption = None,
) -> None:
    """Write the vectors of some texts to one parquet file, text and embedding, as others read it."""
    from embedistill.cache.upkeep import export_vectors, find_cache
    from embedistill.corpus.reading import Columns, describe_source, read_corpus

    if target.exists():
        raise UsageError(str(target), "exists already", do="choose another name")
    describe_source(source)
    records = read_corpus(source, Columns(text_column, query_column, bad_rows="skip"))
    texts = (text for record in records if record for text in record.texts)
    written = export_vectors(find_cache(_embeddings(cache_dir), key), texts, target)
    typer.echo(f"{target}: {written:,} texts with their vectors")


@app.command("import")
def cache_import_command(
    file: Annotated[Path, typer.Argument(help="A .parquet file with texts and vectors.")],
    teacher: Annotated[
        str | None, typer.Option(help="Whose they are, a folder or model id; default: as the file says.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe whose teacher they are of, with its prompts and number formats.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    embedding_column: Annotated[str, typer.Option(help="Column of the vectors.")] = "embedding",
    kind: Annotated[Kind, typer.Option(help="What the texts are, where the teacher has prompts.")] = "plain",
    cache_dir: CacheOption = None,
) -> None:
    """Take the vectors of a parquet file into the cache; another's are first compared with the teacher's own."""
    hush()
    from embedistill.precomputation import import_embeddings
    from embedistill.recipe import load_recipe

    if teacher and recipe:
        raise UsageError("--teacher, --recipe", "both", "one of them: a recipe has a teacher")
    added = import_embeddings(
        file,
        load_recipe(recipe) if recipe else teacher,
        cache_dir,
        text_column=text_column,
        embedding_column=embedding_column,
        kind=kind,
    )
    typer.echo(f"{added:,} vectors taken in, the others were there")


def _embeddings(cache_dir: Path | None) -> Path:
    from embedistill.teacher import default_cache_dir

    return (cache_dir or default_cache_dir()) / "embeddings"


def _parse_quantity(option: str, text: str | None, units: dict[str, float]) -> int | None:
    if text is None:
        return None
    number, unit = text.rstrip("".join(units)), text.lstrip("0123456789. ")
    if unit not in units or not number.strip().replace(".", "", 1).isdigit():
        raise UsageError(option, repr(text), f"a number and one of {', '.join(units)}", "such as 30d or 20GB")
    return round(float(number) * units[unit])
