"""Teacher embeddings beside what a user would run instead: ratios of one run, all taking turns on the same texts.

    python eval/bench_encode.py --texts all.parquet --sts STSBenchmark.jsonl --out eval/results/encode.json

First the best setting of sentence-transformers' own encode is looked for on a sample (bf16 weights, batch sizes, ONNX,
OpenVINO). Then `encode(texts)` as a user writes it, that best setting, and embedistill encode every slice of the texts
in turn; embedistill into an empty cache, with all that belongs to it. `--backends` names another interpreter, whose
environment has sentence-transformers[onnx,openvino], where these do not go with the own one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TEACHER = "sentence-transformers/all-mpnet-base-v2"
BATCHES = (32, 64, 128)
SETTINGS = {
    "own": [("torch", "bfloat16")],
    "other": [("onnx", "float32"), ("openvino", "LATENCY"), ("openvino", "THROUGHPUT")],
}
ROUNDS = 2
WARM_TEXTS = 100_000


def work(model: str, backend: str, setting: str) -> None:
    """Encode what comes in, a JSON line at a time, with sentence-transformers alone; answer with seconds."""
    import torch
    from sentence_transformers import SentenceTransformer

    given: dict[str, Any] = {"torch_dtype": getattr(torch, setting)} if backend == "torch" else {"export": True}
    if backend == "openvino":
        given["ov_config"] = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": setting}
    loaded = SentenceTransformer(model, backend=backend, model_kwargs=given, device="cpu", local_files_only=True)
    for line in sys.stdin:
        request = json.loads(line)
        options = {} if request["batch"] is None else {"batch_size": request["batch"]}
        start = time.perf_counter()
        vectors = loaded.encode(request["texts"], **options)
        seconds = time.perf_counter() - start
        if request["save"]:
            np.save(request["save"], np.asarray(vectors, np.float32))
        print(f"took {seconds}", flush=True)


class Contender:
    """sentence-transformers in a process of its own, which idles while the others have their turn."""

    def __init__(self, python: str, model: Path, backend: str, setting: str, batch: int | None) -> None:
        self._model = f"{backend} {setting}"
        command = [python, __file__, "--worker", str(model), backend, setting]
        self.batch = batch
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    @property
    def name(self) -> str:
        """What it runs."""
        return f"{self._model} {'encode(texts)' if self.batch is None else f'batch {self.batch}'}"

    def encode(self, texts: list[str], save: Path | None = None) -> float:
        """Return the seconds that it took."""
        request = {"texts": texts, "batch": self.batch, "save": str(save) if save else None}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        for line in self._process.stdout or ():
            if line.startswith("took "):
                return float(line.split()[1])
        raise RuntimeError(f"{self.name} ended")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def find_best(model: Path, texts: list[str], backends: str | None) -> tuple[dict[str, Any], tuple[str, str, str, int]]:
    """Return texts/s by setting, the better of two rounds in which all take turns, and the fastest setting."""
    rates: dict[str, Any] = {}
    found: dict[str, tuple[str, str, str, int]] = {}
    settings = [(sys.executable, *setting) for setting in SETTINGS["own"]]
    settings += [(backends, *setting) for setting in SETTINGS["other"] if backends]
    contenders = [Contender(*setting[:1], model, *setting[1:], None) for setting in settings]
    for number in range(ROUNDS):
        for batch in BATCHES:
            for setting, contender in zip(settings, contenders, strict=True):
                contender.batch = batch
                try:
                    contender.encode(texts[:batch])
                    rate = round(len(texts) / contender.encode(texts), 1)
                    rates[contender.name] = max(rate, rates.get(contender.name, 0.0))
                    found[contender.name] = (*setting, batch)
                    print(f"  round {number}: {contender.name}: {rate} texts/s", flush=True)
                except (RuntimeError, BrokenPipeError) as error:
                    print(f"  round {number}: {contender.name}: {error}", flush=True)
    for contender in contenders:
        contender.close()
    return rates, found[max(found, key=lambda name: rates[name])]


def measure_sts(path: Path, encode: Any) -> float:
    """Return Spearman x 100 of cosine and gold score."""
    from scipy.stats import spearmanr

    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    first, second = (encode([pair[side] for pair in pairs]) for side in ("sentence1", "sentence2"))
    return float(100 * spearmanr((first * second).sum(1), [pair["score"] for pair in pairs])[0])


def measure_warm(folder: Path) -> float:
    """Return the seconds that a cache which is opened anew takes to look 100 thousand texts up."""
    from embedistill.cache.shards import Encoded
    from embedistill.cache.store import EmbeddingCache

    encoding = {"dim": 768, "storage_dtype": "float16"}
    filled, rng = EmbeddingCache(folder, encoding), np.random.default_rng(0)
    for start in range(0, WARM_TEXTS, 8192):
        texts = [f"text number {number}" for number in range(start, min(start + 8192, WARM_TEXTS))]
        filled.add(texts, Encoded.of(rng.normal(size=(len(texts), 768)).astype(np.float32)))
    wanted = [f"text number {number}" for number in rng.permutation(WARM_TEXTS)]
    start_time = time.perf_counter()
    vectors = EmbeddingCache(folder, encoding).lookup(wanted)
    seconds = time.perf_counter() - start_time
    assert vectors.shape == (WARM_TEXTS, 768)
    return seconds


def main() -> None:  # noqa: PLR0915 - one run, from top to bottom
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="parquet file with a column text")
    parser.add_argument("--sts", type=Path, help=".jsonl with sentence1, sentence2, score")
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--slice", type=int, default=5_000)
    parser.add_argument("--sample", type=int, default=500, help="texts to find the best setting on")
    parser.add_argument("--backends", help="interpreter with sentence-transformers[onnx,openvino]")
    parser.add_argument("--best", nargs=3, help="backend, setting and batch size found earlier: openvino LATENCY 64")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    import pyarrow.parquet as pq

    from embedistill.encoding.cached import CachedTeacher
    from embedistill.encoding.hardware import choose_dtype, measure_products
    from embedistill.encoding.local import LocalEncoder, cut_batches
    from embedistill.encoding.packed import count_flops
    from embedistill.stages import describe_hardware, list_versions
    from embedistill.teacher import default_cache_dir, load, locate

    texts = pq.read_table(options.texts)["text"].slice(0, options.count).to_pylist()
    texts = list(dict.fromkeys(texts))
    located = locate(options.teacher, models_dir=default_cache_dir() / "models")
    out: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": describe_hardware(),
        "versions": list_versions(),
        "texts": len(texts),
    }

    rates: dict[str, Any] | str
    if options.best:
        best = (options.backends or sys.executable, *options.best[:2], int(options.best[2]))
        rates = "not looked for"
    else:
        rates, best = find_best(located.path, texts[-options.sample :], options.backends)
    out["settings_on_a_sample"] = rates
    plain, tuned = (
        Contender(sys.executable, located.path, "torch", "float32", None),
        Contender(best[0], located.path, *best[1:]),
    )
    dtype = choose_dtype("auto")
    scratch = Path(tempfile.mkdtemp(prefix="bench-encode-"))
    encoder = LocalEncoder(located, dtype)
    teacher = CachedTeacher(encoder, scratch / "cache")
    for contender in (plain, tuned):
        contender.encode(texts[:64])
    encoder.run(encoder.prepare(texts[:64], "plain"))  # warm, as the others are

    seconds: dict[str, list[float]] = {"plain": [], "best": [], "embedistill": []}
    peaks, worst, tokens, flops, padded = [], [], 0, 0.0, 0
    for start in range(0, len(texts), options.slice):
        some = texts[start : start + options.slice]
        saved = scratch / "plain.npy"
        seconds["plain"].append(plain.encode(some, saved))
        seconds["best"].append(tuned.encode(some))
        before = measure_products()[dtype]
        began = time.perf_counter()
        teacher.encode_missing(some)
        seconds["embedistill"].append(time.perf_counter() - began)
        peaks += [before, measure_products()[dtype]]
        rows = teacher.cache().locate(some)
        expected = np.load(saved)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        found = teacher.cache().read(rows)
        worst.append(float(((expected * found).sum(1) / np.linalg.norm(found, axis=1)).min()))
        lengths = [len(ids) for ids in encoder.prepare(some, "plain").ids]
        tokens, flops = tokens + sum(lengths), flops + count_flops(load(located)[0].model, lengths)
        padded += sum(len(b) * max(lengths[i] for i in b) for b in cut_batches(lengths, 4096, padded=True))
        done = start + len(some)
        rate = {name: done / sum(took) for name, took in seconds.items()}
        peak = sum(peaks) / len(peaks)
        out |= {
            "done": done,
            "contenders": {"plain": plain.name, "best": tuned.name, "embedistill": str(dtype)},
            "seconds": seconds,
            "texts_per_second": {name: round(value, 1) for name, value in rate.items()},
            "times_plain": round(rate["embedistill"] / rate["plain"], 2),
            "times_best": round(rate["embedistill"] / rate["best"], 2),
            "tokens_per_second": round(tokens / sum(seconds["embedistill"])),
            "product_gflops": round(peak / 1e9),
            "share_of_products": round(flops / sum(seconds["embedistill"]) / peak, 3),
            "padding_of_padded_batches": round(1 - tokens / padded, 4),
            "worst_cosine": round(min(worst), 6),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(out, indent=2) + "\n")
        print(json.dumps({name: out[name] for name in ("done", "texts_per_second", "share_of_products")}), flush=True)
    for contender in (plain, tuned):
        contender.close()
    if options.sts:
        model = load(located)
        out["sts"] = {
            "fp32": round(measure_sts(options.sts, lambda some: model.encode(some, normalize_embeddings=True)), 3),
            "embedistill": round(measure_sts(options.sts, teacher.vectors), 3),
        }
    out["seconds_to_look_up_100_thousand"] = round(measure_warm(scratch / "warm"), 2)
    options.out.write_text(json.dumps(out, indent=2) + "\n")
    shutil.rmtree(scratch)
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main()
