"""Memory and time of encoding 100 thousand and 1 million texts that are never all in memory.

    python eval/bench_stream.py --out eval/results/stream.json

A tiny random teacher stands for the real one, so that what is measured is all the rest: reading, tokenising, batches,
cache and index. Each size is encoded by `embedistill encode` in a process of its own, into an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import make_teacher, write_sentence

RECIPE = """\
name: stream
teacher: {{model: {model}, dtype: float32}}
corpus: {{source: {source}}}
student: {{layers: 1}}
"""


def write_texts(path: Path, count: int) -> None:
    """Write distinct made-up texts to a parquet file, in constant memory."""
    rng = random.Random(0)
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for start in range(0, count, 10_000):
            texts = [f"{write_sentence(rng, rng.randint(4, 16))} {start + number}" for number in range(10_000)]
            writer.write_table(pa.table({"text": texts}))


def measure(folder: Path, model: Path, count: int) -> dict[str, Any]:
    """Encode, and return seconds and peak memory of the process."""
    write_texts(folder / f"{count}.parquet", count)
    recipe = folder / f"{count}.yaml"
    recipe.write_text(RECIPE.format(model=model, source=folder / f"{count}.parquet"))
    command = [
        sys.executable,
        "-m",
        "embedistill",
        "encode",
        str(recipe),
        "--cache-dir",
        str(folder / str(count)),
        "--json",
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    printed = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status or json.loads(printed) != {"encoded": count}:
        raise RuntimeError(f"{command} ended with {status}: {printed}")
    return {
        "texts": count,
        "seconds": round(seconds, 1),
        "microseconds_a_text": round(1e6 * seconds / count, 1),
        "peak_megabytes": round(usage.ru_maxrss / 1024, 1),
    }


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-stream-") as name:
        model = make_teacher(Path(name) / "teacher")
        rows = []
        for size in options.sizes:
            rows.append(measure(Path(name), model, size))
            print(json.dumps(rows[-1]), flush=True)
    first, last = rows[0], rows[-1]
    ratios = {key: round(last[key] / first[key], 3) for key in ("peak_megabytes", "microseconds_a_text")}
    out = {"command": " ".join(["python", *sys.argv]), "sizes": rows, "ratios": ratios}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(out, indent=2) + "\n")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
