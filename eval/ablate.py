r"""What each setting of the training is worth: trainings of equal length from one start, on dev data.

    python eval/ablate.py mpnet-14m --data DATA --out eval/results/ablation --runs runs/ablation \
        corpus.source=all.parquet corpus.text_column=text training.minutes=null training.steps=400 -- \
        plain: 'ranking:training.objectives.ranking=1;training.neighbours=8'

Behind `--` stand the variants, NAME:key=value;key=value each. The first run encodes and builds; every variant starts
from a copy of it, is trained, and is scored on dev sets. A variant whose results are there is not run again. Steps are
as many however busy the machine is: start it twice, with OMP_NUM_THREADS=1, and the two share the work.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import filelock

from embedistill import Run, distill, load_recipe
from embedistill.evaluation.loading import load_tasks
from embedistill.evaluation.scoring import score_model
from embedistill.evaluation.trial import STUDENT, make_candidate
from embedistill.files import read_json, write_json, write_text, written_aside
from embedistill.recipe import Recipe, dump_recipe
from embedistill.teacher import locate

DEV = ["STSBenchmark.dev", "TIME", "CISI"]


def main() -> None:
    """Run what is missing, and print all there is."""
    split = sys.argv.index("--")
    name, *given = sys.argv[1:split]
    options = dict(zip(given[:6:2], given[1:6:2], strict=True))
    data, out, runs = (Path(options[option]) for option in ("--data", "--out", "--runs"))
    watched = [f"evaluation.data={json.dumps(str(data))}", f"evaluation.tasks=[{', '.join(DEV)}]"]
    common = [*given[6:], *watched]  # no text of the dev sets is trained on
    for folder in (out, runs):
        folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(runs / "base.lock"):
        if not (runs / "base" / "untrained").is_dir():
            distill(load_recipe(name, *common, "name=base"), runs / "base", until="student")
    for variant in sys.argv[split + 1 :]:
        label, _, settings = variant.partition(":")
        changes = [one for one in settings.split(";") if one]
        if wrong := [one for one in changes if not one.startswith("training.")]:
            sys.exit(
                f"{label}: {wrong[0]} is not of training, and the start is the same for all: another --runs and --out"
            )
        found, lock = out / f"{label}.json", filelock.FileLock(runs / f"{label}.lock", blocking=False)
        if found.is_file():
            if (before := read_json(found)["settings"]) != settings:
                sys.exit(
                    f"{label}: measured with {before!r} before, not {settings!r}: another label, or delete {found}"
                )
            continue
        try:
            with lock:
                recipe = load_recipe(name, *common, *changes, f"name={label}")
                run = train_from(runs / "base", runs / label, recipe)
                write_json(found, {"settings": settings, **measure(run, data)})
        except filelock.Timeout:
            continue  # another process is at it
    print(json.dumps({path.stem: read_json(path) for path in sorted(out.glob("*.json"))}, indent=1))


def train_from(base: Path, folder: Path, recipe: Recipe) -> Run:
    """Train one variant from the start that the base run made."""
    if not folder.exists():
        with written_aside(folder) as part:
            shutil.copytree(base, part)
            write_text(part / "recipe.yaml", dump_recipe(recipe))
    return distill(recipe, folder, until="training")


def measure(run: Run, data: Path) -> dict[str, Any]:
    """Return the readings on the way and what the student comes to on dev sets."""
    tasks = load_tasks(DEV, data, skip_missing=False)
    student = make_candidate(STUDENT, locate(str(run.folder / "model"), models_dir=run.folder))
    results = score_model(tasks, student.encode, role=student.role, model=str(run.folder))
    log = [json.loads(line) for line in (run.folder / "training_log.jsonl").read_text().splitlines()]
    return {
        "figures": {f"{result.task} {name}": value for result in results for name, value in result.metrics.items()},
        "steps": max(entry["step"] for entry in log),
        "cosine": {entry["step"]: entry["dev_cosine"] for entry in log if "dev_cosine" in entry},
    }


if __name__ == "__main__":
    main()
