"""Starting on data that is in the token cache: a million rows against a thousand.

    python benchmarks/warm_start.py [--rows 1000000]

What is timed is what a run does before it needs a device: the tokenizer is loaded, the shards and
their folders are found, and the first step is planned. The cache is filled beforehand by a stand-in
for the tokenizer's work, whose samples are of no use but are kept like all others; pairs are
interleaved.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from shared import chat_data, measures
from transformers import AutoTokenizer

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.chat.chat import ChatTokenizer, TokenizedSample
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions
from roll_sft.data.tokens.build_shard import SourceOptions
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.data.tokens.prepare import CachePlace, Source, prepare_sources

FEW = 1000
SETTLED_S = 3.0  # a file that just changed is hashed again


class QuickTokenizer(ChatTokenizer):
    """Gives each row a sample of some length, without reading it."""

    def tokenize_many(self, rows: Any) -> Any:
        samples = []
        for row in rows:
            size = 20 + row.row % 300
            label_mask = np.zeros(size, np.uint8)
            label_mask[5 : size - 1] = 1
            samples.append([TokenizedSample(np.full(size, 7, np.int32), label_mask)])
        return samples


def main() -> None:
    """Measures and prints one line for the ratio and one for the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=measures.size(1_000_000, quick=100_000))
    parser.add_argument("--pairs", type=int, default=measures.pairs(5))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chat_data.write(folder, num_rows=FEW)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        write_rows(few, FEW)
        write_rows(many, options.rows)
        time.sleep(SETTLED_S)
        for path in (few, many):  # fills the cache
            _start(folder, path)
        pairs = [(_start(folder, few), _start(folder, many)) for _ in range(options.pairs)]
    packages = ("numpy", "transformers")
    measures.show(
        "warm_start_growth",
        [many / few for few, many in pairs],
        goal="<= 2",
        denominator=f"the same with {FEW} rows",
        packages=packages,
    )
    measures.show(
        "warm_start_seconds",
        [many for _, many in pairs],
        goal="<= 2",
        denominator="one second",
        packages=packages,
    )


def write_rows(path: Path, num_rows: int) -> None:
    answer = "words of an answer " * 12
    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            file.write(json.dumps({"instruction": f"question {row}", "output": answer}) + "\n")


def _start(folder: Path, path: Path) -> float:
    """Seconds from nothing to the plan of the first step."""
    started = time.perf_counter()
    tokens = token_set(folder, path)
    options = PlanOptions(
        seed=1,
        global_batch_size=128,
        shuffle=True,
        packing=True,
        micro_batch_tokens=8192,
        layout=ParallelLayout(8),
        cost=CostModel(70_450.0),
    )
    Planner(tokens.lengths, tokens.supervised, options=options).step(1)
    return time.perf_counter() - started


def token_set(folder: Path, path: Path) -> TokenSet:
    """The samples of `path`, whose tokens lie in the cache below `folder`."""
    tokenizer = QuickTokenizer(AutoTokenizer.from_pretrained(folder / "tok"))
    source_options = SourceOptions(
        ColumnKeys(), sequence_length=8192, on_bad_row="error", max_bad_fraction=0.0
    )
    ((source, _),) = prepare_sources(
        [Source(str(path), "rows")],
        tokenizer=tokenizer,
        options=source_options,
        place=CachePlace(folder / "cache", num_proc=1),
    )
    return TokenSet([source])


if __name__ == "__main__":
    main()
