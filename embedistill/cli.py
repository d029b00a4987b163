"""The command line: parse, call, print. Results on stdout; progress and errors on stderr.

Exit codes: 0 done, 1 failed or below the margin, 2 wrong use, 3 undecided: more items would be needed.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import traceback
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedistill.errors import EmbedistillError, UsageError, explain_os_error
from embedistill.recipe import Recipe, find_recipe, list_recipes, list_settings, load_recipe

if TYPE_CHECKING:
    from embedistill.report.document import Report
    from embedistill.search import Hit

app = typer.Typer(
    help="Distil a large sentence-embedding model into a small fast one, and say how much was kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
cache_app = typer.Typer(help="The teachers' embeddings on disk.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

RecipeArgument = Annotated[str, typer.Argument(help="Name of a shipped recipe, or a .yaml file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, as key=value: training.minutes=30", show_default=False)
]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder with sts/NAME.jsonl, retrieval/NAME/, ...")]
CacheOption = Annotated[Path | None, typer.Option(help="Folder for models and teacher embeddings, shared by runs.")]
MarginOption = Annotated[float | None, typer.Option(help="Share that may be lost: the verdict; default: 0.03.")]
IndexOption = Annotated[
    Literal["flat", "hnsw", "ivfpq"], typer.Option(help="FAISS index that retrieval is measured with.")
]
SegmentMarginOption = Annotated[
    float | None, typer.Option(help="Share that a part of a task may lose; default: twice the margin.")
]
KeyArgument = Annotated[str, typer.Argument(help="Key of an encoding, or its beginning: embedistill cache list.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


def main() -> None:
    """Run the command line, and turn what goes wrong into one message and an exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends as one message and an exit code
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exc()
        sys.exit(_report_failure(error))


def _report_failure(error: Exception) -> int:
    match error:
        case EmbedistillError():
            known = error
        case OSError():
            known = explain_os_error(error)
        case _:
            do = "run it again with --debug, and report what it says; what is finished on disk is kept"
            known = EmbedistillError(type(error).__name__, str(error) or "no message", do=do)
    Console(stderr=True, highlight=False).print(f"Error: {known}", markup=False, soft_wrap=True)
    return known.exit_code


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    if show_version:
        typer.echo(version("embedistill"))
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME.")] = None,
    cache_dir: CacheOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Distil a teacher as a recipe says, and report how much was kept. A run that was stopped goes on."""
    loaded = load_recipe(recipe, *(overrides or []), *([f"evaluation.data={json.dumps(str(data))}"] if data else []))
    _hush()
    from embedistill.pipeline import distill
    from embedistill.ranks import rank

    finished = distill(loaded, run_dir, cache_dir)
    if rank() > 0:  # of several processes, the first reports
        return
    _print_report(finished.report, as_json)
    if not as_json:
        _print_next_steps(loaded, finished.folder)
    _exit(finished.report)


@app.command()
def encode(
    recipe: RecipeArgument, overrides: Overrides = None, cache_dir: CacheOption = None, as_json: JsonOption = False
) -> None:
    """Encode the whole corpus of a recipe with its teacher into the cache, however large, and stop there."""
    loaded = load_recipe(recipe, *(overrides or []))
    _hush()
    from embedistill.precomputation import encode_corpus

    encoded = encode_corpus(loaded, cache_dir)
    typer.echo(json.dumps({"encoded": encoded}) if as_json else f"{encoded:,} texts encoded, the others were there")


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe, and say all that is wrong with it at once."""
    loaded = load_recipe(recipe, *(overrides or []))
    typer.echo(f"{find_recipe(recipe)}: valid; embedistill run makes runs/{loaded.name}")


@app.command()
def plan(
    recipe: RecipeArgument, overrides: Overrides = None, cache_dir: CacheOption = None, as_json: JsonOption = False
) -> None:
    """Say what a recipe's student and three neighbours will cost: size, speed on this machine, hours."""
    loaded = load_recipe(recipe, *(overrides or []))
    _hush()
    from embedistill import outlook

    found = outlook.plan(loaded, cache_dir)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        _console().print(outlook.to_table(found, loaded.name))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, a model id, or the folder of a run: its student.")],
    task: Annotated[
        list[str] | None, typer.Option(help="A set, or a .jsonl file; may be given again; default: all of --data.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A folder or a model id: adds how much of it is kept.")] = None,
    data: DataOption = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="A model to compare beside it; may be given again.")
    ] = None,
    margin: MarginOption = None,
    segment_margin: SegmentMarginOption = None,
    index: IndexOption = "flat",
    misspelt: Annotated[bool, typer.Option(help="Score also with typing errors.")] = False,
    documents: Annotated[
        Literal["student", "teacher"],
        typer.Option(help="Who encodes documents; teacher: the student's queries on these are judged."),
    ] = "student",
    floors: Annotated[
        bool, typer.Option(help="Beside the student of a run: itself untrained, word vectors, the teacher's PCA.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for every item's values, report.json, report.html.")] = None,
    cache_dir: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on tasks and, with --teacher, say how much of it the model keeps.

    Exit 0: as much as the margin asks, or no teacher; 1: less; 3: undecided.
    """
    _hush()
    from embedistill import judgement

    found = judgement.evaluate(
        model,
        task,
        teacher=teacher,
        data=data,
        baselines=baseline or [],
        margin=margin,
        segment_margin=segment_margin,
        index=index,
        misspelt=misspelt,
        documents=documents,
        floors=floors,
        out=out,
        cache_dir=cache_dir,
    )
    _print_report(found, as_json)
    _exit(found)


@app.command()
def benchmark(
    model: Annotated[str, typer.Argument(help="A folder or a model id.")],
    task: Annotated[
        list[str] | None, typer.Option(help="A task of mteb; may be given again; default: all of --data.")
    ] = None,
    data: DataOption = None,
    out: Annotated[Path, typer.Option(help="Folder of mteb's results and of .eval_results/.")] = Path("mteb"),
    cache_dir: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run tasks of mteb with its own evaluators, on data from a folder or the Hub; what was run is not run again."""
    _hush()
    from embedistill import judgement

    scores = judgement.benchmark(model, task, data=data, out=out, cache_dir=cache_dir)
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
    else:
        _print_table(["task", "main score"], [[name, f"{score:.4f}"] for name, score in scores.items()])


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    margin: MarginOption = None,
    segment_margin: SegmentMarginOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and report.html.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the students of runs on the tasks they share."""
    _hush()
    from embedistill import judgement

    found = judgement.compare(*runs, margin=margin, segment_margin=segment_margin, out=out)
    _print_report(found, as_json)
    _exit(found)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")], as_json: JsonOption = False
) -> None:
    """Print the report of a run, and write its page again."""
    from embedistill.report.document import load_report
    from embedistill.report.rendering import write_page

    loaded = load_report(run_dir)
    page = write_page(loaded, run_dir)
    _print_report(loaded, as_json)
    if not as_json:
        typer.echo(f"Page: {page}")


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="An index, or the run that has one.")],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    results: Annotated[int, typer.Option(min=1, help="How many results.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Find the texts of an index that are nearest to a question."""
    _hush()
    from embedistill.search import search_index

    hits = search_index(index, [query], results)[0]
    if as_json:
        typer.echo(json.dumps([asdict(hit) for hit in hits], indent=2, ensure_ascii=False))
    else:
        _print_hits(query, hits)


@recipes_app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the recipes."""
    lines = {path.stem: _describe_recipe(path) for path in list_recipes()}
    if as_json:
        typer.echo(json.dumps(lines, indent=2, ensure_ascii=False))
    else:
        _print_table(["recipe", "what for"], [list(line) for line in lines.items()])


def _describe_recipe(path: Path) -> str:
    """Return the first sentence of a recipe's header."""
    header = [
        line.lstrip("# ")
        for line in takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    ]
    return re.split(r"(?<=[.:;]) ", " ".join(header))[0].rstrip(".:;") + "."


@recipes_app.command("show")
def show_command(recipe: RecipeArgument) -> None:
    """Print a recipe."""
    typer.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def copy_command(
    recipe: RecipeArgument, target: Annotated[Path, typer.Argument(help="New file.")] = Path("recipe.yaml")
) -> None:
    """Copy a recipe to a file of your own."""
    if target.exists():
        raise UsageError(str(target), "exists already", do="choose another name")
    shutil.copyfile(find_recipe(recipe), target)
    typer.echo(f"{target}: now edit it, then: embedistill run {target}")


@recipes_app.command("settings")
def settings_command(as_json: JsonOption = False) -> None:
    """List every setting of a recipe, with its default and what it means."""
    settings = [asdict(setting) for setting in list_settings()]
    if as_json:
        typer.echo(json.dumps(settings, indent=2, ensure_ascii=False))
    else:
        _print_table(["setting", "default", "meaning"], [list(setting.values()) for setting in settings])


@cache_app.command("list")
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
    _print_table(columns, rows)


@cache_app.command("verify")
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


@cache_app.command("prune")
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


@cache_app.command("export")
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


@cache_app.command("import")
def cache_import_command(
    file: Annotated[Path, typer.Argument(help="A .parquet file with texts and vectors.")],
    teacher: Annotated[
        str | None, typer.Option(help="Whose they are, a folder or model id; default: as the file says.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    embedding_column: Annotated[str, typer.Option(help="Column of the vectors.")] = "embedding",
    kind: Annotated[
        Literal["plain", "query", "document"], typer.Option(help="What the texts are, where the teacher has prompts.")
    ] = "plain",
    cache_dir: CacheOption = None,
) -> None:
    """Take the vectors of a parquet file into the cache; another's are first compared with the teacher's own."""
    _hush()
    from embedistill.precomputation import import_embeddings

    added = import_embeddings(
        file, teacher, cache_dir, text_column=text_column, embedding_column=embedding_column, kind=kind
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


def _hush() -> None:
    """Keep the bars and chatter of the libraries below off the screen: we show our own."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _exit(report: Report) -> None:
    if code := {"FAIL": 1, "UNDECIDED": 3}.get(report.verdict or ""):
        raise typer.Exit(code)


def _print_report(report: Report, as_json: bool) -> None:
    from embedistill.report.rendering import to_table

    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2, ensure_ascii=False))
    else:
        _console().print(to_table(report))


def _print_next_steps(recipe: Recipe, folder: Path) -> None:
    page = (folder / "report.html").absolute().as_uri()
    if recipe.search is None:
        typer.echo(f"Model: {folder / 'model'}\nReport: {page}")
        return
    from embedistill.search import search_index

    question = recipe.search.question
    _print_hits(question, search_index(folder, [question], recipe.search.results)[0])
    typer.echo(f'\nTry next:\n  embedistill search {folder} "your question"\n  python -m webbrowser {page}')


def _print_hits(query: str, hits: list[Hit]) -> None:
    console = _console()
    console.print(f"\nQ: {query}", markup=False)
    for hit in hits:
        console.print(f"  {hit.score:.3f}  {hit.text[:200]}  [{hit.source}]", markup=False)


def _print_table(columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    _console().print(table)


def _console() -> Console:
    """Return a console that does not cut tables where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
