r"""What each setting of the training is worth: trainings of equal length from one start, on dev data.

    python eval/ablate.py mpnet-14m --data DATA --out eval/results/ablation.json --runs runs/ablation \
        corpus.source=all.parquet training.minutes=10 -- \
        plain: 'ranking:training.objectives.ranking=1;training.neighbours=8'

Behind `--` stand the variants, NAME:key=value;key=value each. The first run encodes and builds; every variant starts
from a copy of it. A variant that is in the results is not run again. It wants the machine for itself.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from embedistill import distill, load_recipe
from embedistill.files import read_json, write_json, write_text
from embedistill.recipe import dump_recipe

DEV = "[agreement, STSBenchmark.dev, TIME, CISI]"
MADE_AGAIN = ("training", "evaluation", "report")


def main() -> None:
    """Run what is missing, and print all there is."""
    split = sys.argv.index("--")
    recipe, *given = sys.argv[1:split]
    options = dict(zip(given[::2], given[1::2], strict=False)) if given and given[0].startswith("--") else {}
    overrides = [one for one in given if "=" in one]
    data, out, runs = (Path(options[name]) for name in ("--data", "--out", "--runs"))
    common = [*overrides, f"evaluation.tasks={DEV}", f"evaluation.data={data}", "evaluation.margin=0.03"]
    results = read_json(out) if out.is_file() else {}
    base = runs / "base"
    if not (base / "report.json").is_file():
        distill(load_recipe(recipe, *common, "training.steps=1", "name=base"), base)
    for variant in sys.argv[split + 1 :]:
        name, _, settings = variant.partition(":")
        if name not in results:
            loaded = load_recipe(recipe, *common, *(one for one in settings.split(";") if one), f"name={name}")
            results[name] = {"settings": settings, **measure(base, runs / name, dump_recipe(loaded), loaded)}
            write_json(out, results)
    print(json.dumps(results, indent=1))


def measure(base: Path, folder: Path, text: str, recipe: object) -> dict[str, object]:
    """Train one variant from the start that the base run made, and return its report's figures."""
    if not folder.exists():
        shutil.copytree(base, folder)
        write_text(folder / "recipe.yaml", text)
        record = read_json(folder / "run.json")
        for stage in MADE_AGAIN:
            record["stages"].pop(stage, None)
        write_json(folder / "run.json", record)
    distill(recipe, folder)  # type: ignore[arg-type]
    report = read_json(folder / "report.json")
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return {
        "figures": {
            f"{found['task']} {found['metric']} {role}": value
            for found in report["comparisons"]
            for role, value in found["values"].items()
        },
        "steps": max(entry["step"] for entry in log),
        "readings": [entry["dev_cosine"] for entry in log if "dev_cosine" in entry],
    }


if __name__ == "__main__":
    main()
