"""The command line: parse, call, print. Results on stdout; progress and errors on stderr.

Exit codes: 0 done, 1 failed or below the margin, 2 wrong use, 3 undecided: more items would be needed.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from embedistill.choices import Dtype, Encodes, IndexKind
from embedistill.cli import caches, recipes
from embedistill.cli.options import CacheOption, JsonOption, RecipeArgument, hush
from embedistill.cli.printing import make_console, print_hits, print_report, print_table
from embedistill.errors import EmbedistillError, explain_os_error
from embedistill.recipe import Recipe, find_recipe, load_recipe
from embedistill.stages import Stage

if TYPE_CHECKING:
    from embedistill.report.document import Report

app = typer.Typer(
    help="Distil a large sentence-embedding model into a small fast one, and say how much was kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(recipes.app, name="recipes")
app.add_typer(caches.app, name="cache")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings to change, as key=value: training.minutes=30. A section given whole replaces the recipe's.",
        show_default=False,
    ),
]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder with sts/NAME.jsonl, retrieval/NAME/, ...")]
MarginOption = Annotated[float | None, typer.Option(help="Share that may be lost: the verdict; default: 0.03.")]
IndexOption = Annotated[IndexKind, typer.Option(help="FAISS index that retrieval is measured with.")]
SegmentMarginOption = Annotated[
    float | None, typer.Option(help="Share that a part of a task may lose; default: twice the margin.")
]


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
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; default: runs/NAME, or runs/NAME-HASH where settings are changed."),
    ] = None,
    cache_dir: CacheOption = None,
    data: DataOption = None,
    until: Annotated[
        Stage | None,
        typer.Option(help="Last stage to run; the same command without it goes on from there.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Distil a teacher as a recipe says, and report how much was kept. A run that was stopped goes on.

    Where the recipe has a margin, the exit code is the verdict: 0 PASS, 1 FAIL, 3 UNDECIDED.
    """
    loaded = load_recipe(recipe, *(overrides or []), *([f"evaluation.data={json.dumps(str(data))}"] if data else []))
    hush()
    from embedistill.pipeline import distill
    from embedistill.ranks import rank

    finished = distill(loaded, run_dir, cache_dir, until=until)
    if rank() > 0:  # of several processes, the first reports
        return
    if until:
        typer.echo(json.dumps({"folder": str(finished.folder)}) if as_json else f"{finished.folder}: {until} is done")
        return
    print_report(finished.report, as_json)
    if not as_json:
        _print_next_steps(loaded, finished.folder)
    _exit(finished.report)


@app.command()
def encode(
    recipe: RecipeArgument, overrides: Overrides = None, cache_dir: CacheOption = None, as_json: JsonOption = False
) -> None:
    """Encode the whole corpus of a recipe with its teacher into the cache, however large, and stop there."""
    loaded = load_recipe(recipe, *(overrides or []))
    hush()
    from embedistill.precomputation import encode_corpus

    encoded = encode_corpus(loaded, cache_dir)
    typer.echo(json.dumps({"encoded": encoded}) if as_json else f"{encoded:,} texts encoded, the others were there")


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe and what it reads from here, and say all that is wrong with its settings at once."""
    loaded = load_recipe(recipe, *(overrides or []))
    from embedistill.examination import check_sets
    from embedistill.sources import check_corpus

    check_corpus(loaded.corpus)
    check_sets(loaded)
    typer.echo(f"{find_recipe(recipe)}: valid; embedistill run makes runs/{loaded.name}")


@app.command()
def plan(
    recipe: RecipeArgument, overrides: Overrides = None, cache_dir: CacheOption = None, as_json: JsonOption = False
) -> None:
    """Say what a recipe's student and three neighbours will cost: size, speed on this machine, hours."""
    loaded = load_recipe(recipe, *(overrides or []))
    hush()
    from embedistill import outlook

    found = outlook.plan(loaded, cache_dir)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        make_console().print(outlook.to_table(found, loaded.name))


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
        Encodes,
        typer.Option(help="Who encodes documents; teacher: the student's queries on these are judged."),
    ] = "student",
    floors: Annotated[
        bool, typer.Option(help="Beside the student of a run: itself untrained, word vectors, the teacher's PCA.")
    ] = True,
    dtype: Annotated[
        Dtype, typer.Option(help="Products of all but the teacher; auto: bfloat16 where that is measured faster.")
    ] = "float32",
    out: Annotated[Path | None, typer.Option(help="Folder for every item's values, report.json, report.html.")] = None,
    cache_dir: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on tasks and, with --teacher, say how much of it the model keeps.

    Exit 0: as much as the margin asks, or no teacher; 1: less; 3: undecided.
    """
    hush()
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
        dtype=dtype,
        out=out,
        cache_dir=cache_dir,
    )
    print_report(found, as_json)
    _exit(found)


@app.command()
def benchmark(
    model: Annotated[str, typer.Argument(help="A folder, a model id, or the folder of a run: its student.")],
    task: Annotated[
        list[str] | None, typer.Option(help="A task of mteb; may be given again; default: all of --data.")
    ] = None,
    data: DataOption = None,
    out: Annotated[Path, typer.Option(help="Folder of mteb's results and of .eval_results/.")] = Path("mteb"),
    cache_dir: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run tasks of mteb with its own evaluators, on data from a folder or the Hub; what was run is not run again."""
    hush()
    from embedistill import leaderboard

    scores = leaderboard.benchmark(model, task, data=data, out=out, cache_dir=cache_dir)
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
    else:
        print_table(["task", "main score"], [[name, f"{score:.4f}"] for name, score in scores.items()])


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    margin: MarginOption = None,
    segment_margin: SegmentMarginOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and report.html.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the students of runs on the tasks they share. Exit code: 0 PASS, 1 FAIL, 3 UNDECIDED."""
    hush()
    from embedistill import judgement

    found = judgement.compare(*runs, margin=margin, segment_margin=segment_margin, out=out)
    print_report(found, as_json)
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
    print_report(loaded, as_json)
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
    hush()
    from embedistill.search import search_index

    hits = search_index(index, [query], results)[0]
    if as_json:
        typer.echo(json.dumps([asdict(hit) for hit in hits], indent=2, ensure_ascii=False))
    else:
        print_hits(query, hits)


def _exit(report: Report) -> None:
    if code := {"FAIL": 1, "UNDECIDED": 3}.get(report.verdict or ""):
        raise typer.Exit(code)


def _print_next_steps(recipe: Recipe, folder: Path) -> None:
    from embedistill.report.rendering import PAGE

    page = (folder / PAGE).absolute().as_uri()
    if recipe.search is None:
        typer.echo(f"Model: {folder / 'model'}\nReport: {page}")
        return
    from embedistill.search import search_index

    question = recipe.search.question
    print_hits(question, search_index(folder, [question], recipe.search.results)[0])
    typer.echo(f'\nTry next:\n  embedistill search {folder} "your question"\n  python -m webbrowser {page}')
