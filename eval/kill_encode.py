"""Kill an encoding at random moments, go on, and compare what is in the cache with an undisturbed run, bit by bit.

    python eval/kill_encode.py --kills 200

A tiny random teacher encodes made-up texts in windows of 40. A process is killed (SIGKILL) after a random time, and
the next one goes on; where one comes to its end, its cache is compared and the next begins with an empty one. Shards
have to be the very files of a run that nobody disturbed, and no text may be encoded again whose shard was there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from conftest import make_teacher, write_sentence

from embedistill.cache.store import EmbeddingCache
from embedistill.cache.upkeep import verify_caches
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.local import LocalEncoder
from embedistill.teacher import LocatedModel, locate

WINDOW = 40


class LoggedEncoder(LocalEncoder):
    """An encoder that writes down every window before it runs it."""

    window = WINDOW
    log: Path

    def run(self, prepared: Any, advance: Any = lambda _: None) -> Any:
        """Write the texts to the log, and encode them."""
        with self.log.open("a") as stream:
            stream.write(json.dumps(prepared.texts) + "\n")
        return super().run(prepared, advance)


def encode(located: LocatedModel, texts: list[str], root: Path, log: Path, seconds: float | None) -> bool:
    """Encode in a process of its own; kill it after some seconds, and say whether it was still at work."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        encoder = LoggedEncoder(located, torch.float32)
        encoder.log = log
        CachedTeacher(encoder, root).encode_missing(texts)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def read_shards(root: Path) -> dict[str, bytes]:
    """Return the bytes of every shard, by name."""
    return {path.name: path.read_bytes() for path in root.glob("*/*.arrow")}


def list_lost(root: Path, texts: list[str]) -> set[str]:
    """Return the texts without a vector."""
    manifests = list(root.glob("*/manifest.json"))
    return set(EmbeddingCache(root, json.loads(manifests[0].read_text())).missing(texts)) if manifests else set(texts)


def main() -> None:
    """Kill, go on, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-encode-"))
    located = locate(str(make_teacher(folder / "teacher", "mpnet")), models_dir=folder)
    texts = list(dict.fromkeys(write_sentence(rng, rng.randint(4, 16)) for _ in range(20_000)))
    log = folder / "log"
    start = time.perf_counter()
    encode(located, texts, folder / "whole", log, None)
    whole, took = read_shards(folder / "whole"), time.perf_counter() - start
    print(f"undisturbed: {len(texts):,} texts, {len(whole)} shards, {took:.1f} s", flush=True)

    kills = finished = again = lost_windows = 0
    while kills < options.kills or finished == 0:
        root = folder / str(finished)
        lost = list_lost(root, texts)
        log.write_text("")
        killed = encode(located, texts, root, log, rng.uniform(0, took / 8) if kills < options.kills else None)
        windows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("]")]
        begun = {text for window in windows for text in window}
        again += len(begun - lost)
        lost_windows += len(begun & list_lost(root, texts)) > 0
        kills += killed
        if not killed:
            finished += 1
            same = read_shards(root) == whole
            print(f"cache {finished}: the same files as the undisturbed run: {same}; kills so far {kills}", flush=True)
            if not same or verify_caches(root):
                sys.exit(1)
    print(f"{kills} kills, {finished} caches, all bit by bit as undisturbed")
    print(f"texts encoded again whose shard was there: {again}; kills that cost the window at work: {lost_windows}")
    sys.exit(1 if again else 0)


if __name__ == "__main__":
    main()
