"""JSONL to a plan with masks of the answers, in tokens per CPU second.

    python benchmarks/prepare_speed.py
    python benchmarks/prepare_speed.py --trl /path/to/python   # an interpreter that has trl

Two denominators, each interleaved with ours: `encode_batch_fast` alone on the rendered text, in the
same process with the same threads; and TRL's own preparation, where an interpreter that has it is
named. CPU seconds, since wall time on a shared machine says little.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared import chat_data, measures
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions
from roll_sft.data.tokens.build_shard import SourceOptions
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.data.tokens.prepare import CachePlace, Source, prepare_sources

LENGTH = 8192
PACKAGES = ("tokenizers", "transformers")


def main() -> None:
    """Measures and prints one line for each denominator."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--trl", help="an interpreter that has trl", default=os.environ.get("TRL_PYTHON")
    )
    parser.add_argument("--pairs", type=int, default=measures.pairs(5))
    parser.add_argument("--rows", type=int, default=measures.size(5000, quick=1500))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chat_data.write(folder, num_rows=options.rows)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
        texts = _rendered(folder, tokenizer)
        _ours(folder, tokenizer, place=folder / "warm_up")
        _encoder(tokenizer, texts)
        pairs = [
            (_ours(folder, tokenizer, place=folder / f"{pair}"), _encoder(tokenizer, texts))
            for pair in range(options.pairs)
        ]
        measures.show(
            "prepare_over_encoder",
            [ours / encoder for ours, encoder in pairs],
            goal=">= 0.7",
            denominator="encode_batch_fast alone on the rendered text",
            packages=PACKAGES,
        )
        if options.trl is None:
            print(
                "prepare_over_trl: left out, neither --trl nor TRL_PYTHON is given", file=sys.stderr
            )
            return
        pairs = [
            (_ours(folder, tokenizer, place=folder / f"trl_{pair}"), _trl(options.trl, folder))
            for pair in range(options.pairs)
        ]
        measures.show(
            "prepare_over_trl",
            [ours / trl for ours, trl in pairs],
            goal=">= 2.5",
            denominator="TRL's SFTTrainer with assistant_only_loss and packing",
            packages=PACKAGES,
        )


def _rendered(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]


def _ours(folder: Path, tokenizer: PreTrainedTokenizerFast, *, place: Path) -> float:
    """Tokens per CPU second from the file to the plan of the first step, nothing cached."""
    started = time.process_time()
    options = SourceOptions(
        ColumnKeys(), sequence_length=LENGTH, on_bad_row="error", max_bad_fraction=0.0
    )
    ((source, report),) = prepare_sources(
        [Source(str(folder / "rows.jsonl"), "rows")],
        tokenizer=ChatTokenizer(tokenizer),
        options=options,
        place=CachePlace(place, num_proc=1),
    )
    tokens = TokenSet([source])
    plan_options = PlanOptions(
        seed=1,
        global_batch_size=128,
        shuffle=True,
        packing=True,
        micro_batch_tokens=LENGTH,
        layout=ParallelLayout(8),
        cost=CostModel(70_450.0),
    )
    Planner(tokens.lengths, tokens.supervised, options=plan_options).step(1)
    return report.tokens / (time.process_time() - started)


def _encoder(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    started, tokens = time.process_time(), 0
    for first in range(0, len(texts), 1024):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts[first : first + 1024])
        tokens += sum(len(each.ids) for each in encoded)
    return tokens / (time.process_time() - started)


def _trl(python: str, folder: Path) -> float:
    program = Path(__file__).parent / "shared" / "trl_prepare.py"
    result = subprocess.run(
        [python, str(program), str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    measured = json.loads(result.stdout.strip().splitlines()[-1])
    return float(measured["tokens"] / measured["cpu_s"])


if __name__ == "__main__":
    main()
