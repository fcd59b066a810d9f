"""TRL's preparation of the same rows: SFTTrainer with assistant masks and packing, one process.

Run by an interpreter that has trl; prints the tokens it kept and the CPU seconds of
reading the rows and of its `_prepare_dataset` as one JSON line.

    python trl_prepare.py FOLDER
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import datasets
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

MAX_LENGTH = 8192


def main() -> None:
    """Prepares once and prints."""
    folder = Path(sys.argv[1])
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            max_position_embeddings=MAX_LENGTH,
        )
    )
    started = time.process_time()
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    measured = {"cpu_s": time.process_time() - started}
    original = SFTTrainer._prepare_dataset

    def timed(*arguments: object, **options: object) -> object:
        started = time.process_time()
        prepared = original(*arguments, **options)
        measured["cpu_s"] += time.process_time() - started
        measured["tokens"] = sum(map(sum, prepared["seq_lengths"]))
        return prepared

    SFTTrainer._prepare_dataset = timed
    with tempfile.TemporaryDirectory() as output:
        options = SFTConfig(
            output_dir=output,
            max_length=MAX_LENGTH,
            packing=True,
            assistant_only_loss=True,
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_steps=1,
        )
        SFTTrainer(
            model=model,
            args=options,
            train_dataset=rows,
            processing_class=tokenizer,
        )
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
