"""The mix with more queries of mpnet-14m and mpnet-6l: texts by cost, titled passages, and queries, once each.

    python eval/join_corpora.py runs/by-cost runs/passages queries.parquet --out corpus-and-queries.parquet

All texts of the first run, the passages that the second trains on, without their titles, and a file of queries; the
commands that make the two runs are in eval/README.md.
"""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedistill.corpus.reading import Columns, read_corpus
from embedistill.corpus.records import load_corpus, normalise
from embedistill.files import written_aside


def main() -> None:
    """Join the texts of two runs and a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="all of its texts, those that it holds out too")
    parser.add_argument("passages", type=Path, help="a run: the texts that it trains on, without their titles")
    parser.add_argument("queries", help="a file, or what else a corpus can be")
    parser.add_argument("--out", type=Path, required=True, help="a .parquet with the column text")
    given = parser.parse_args()
    records = chain(*load_corpus(given.run / "corpus.parquet").values())
    passages = load_corpus(given.passages / "corpus.parquet")["train"]
    queries = (record for record in read_corpus(given.queries, Columns()) if record)
    texts = chain(
        (record.text for record in records),
        (record.document for record in passages),
        (record.text for record in queries),
    )
    unique: dict[str, str] = {}
    for text in texts:
        unique.setdefault(normalise(text), text)
    with written_aside(given.out) as part:
        pq.write_table(pa.table({"text": list(unique.values())}), part, compression="zstd")
    print(f"{len(unique):,} texts in {given.out}")


if __name__ == "__main__":
    main()
