"""Reading random batches from a large cache: milliseconds, and the memory of the process that reads.

    python eval/bench_cache.py --rows 10_000_000 --out eval/results/cache.json

The cache is filled with made-up vectors in shards as the encoder writes them; 10 million rows of 768 dimensions take 16
GB of disk. What reads is a process of its own, as a training would be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from embedistill.cache.shards import Encoded
from embedistill.cache.store import EmbeddingCache

DIM, SHARD, BATCH, BATCHES = 768, 8192, 256, 200
ENCODING = {"dim": DIM, "storage_dtype": "float16"}


def fill(root: Path, rows: int) -> float:
    """Fill a cache, and return the seconds it took."""
    encoded = Encoded.of(np.random.default_rng(0).normal(size=(SHARD, DIM)).astype(np.float32))
    cache, start = EmbeddingCache(root, ENCODING), time.perf_counter()
    for first in range(0, rows, SHARD):
        cache.add([f"text number {number}" for number in range(first, first + SHARD)], encoded)
    return time.perf_counter() - start


def read(root: Path, rows: int) -> dict[str, Any]:
    """Open a cache, find and read random batches, and say what that took."""
    rng = np.random.default_rng(1)
    before, start = anonymous_megabytes(), time.perf_counter()
    cache = EmbeddingCache(root, ENCODING)
    opened = time.perf_counter() - start
    found, taken = [], []
    for _ in range(BATCHES):
        texts = [f"text number {number}" for number in rng.integers(0, rows, BATCH)]
        start = time.perf_counter()
        places = cache.locate(texts)
        located = time.perf_counter()
        cache.read(places)
        found.append(located - start)
        taken.append(time.perf_counter() - located)
    return {
        "rows": len(cache),
        "seconds_to_open": round(opened, 3),
        "locate_ms": summarise(found),
        "read_ms": summarise(taken),
        "more_megabytes": round(anonymous_megabytes() - before, 1),
    }


def summarise(seconds: list[float]) -> dict[str, float]:
    """Return median and 95th percentile in milliseconds."""
    return {name: round(1e3 * float(np.quantile(seconds, at)), 2) for name, at in (("p50", 0.5), ("p95", 0.95))}


def anonymous_megabytes() -> float:
    """Return the memory of this process that is no file's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where there is space; default: a temporary folder")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read, options.rows)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-cache-", dir=options.folder) as name:
        filled = fill(Path(name), options.rows)
        command = [sys.executable, __file__, "--rows", str(options.rows), "--read", name]
        measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    out = {"command": " ".join(["python", *sys.argv]), "seconds_to_fill": round(filled, 1), **measured}
    print(json.dumps(out, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
