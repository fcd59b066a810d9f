"""TRL's training steps on the same rows and model: SFTTrainer with assistant masks and packing.

Run by an interpreter that has trl; prints the tokens of its steps and their CPU seconds as one JSON
line. One packed row of at most LENGTH tokens is a step.

    python trl_train.py FOLDER LENGTH STEPS
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

WARM_UP = 2


class Clock(TrainerCallback):
    """CPU seconds from the end of the warm-up to the end of the last step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.process_time())


def main() -> None:
    """Trains once and prints."""
    folder, length, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    clock, tokens = Clock(), list[int]()
    with tempfile.TemporaryDirectory() as output:
        options = SFTConfig(
            output_dir=output,
            max_length=length,
            packing=True,
            assistant_only_loss=True,
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            dataloader_num_workers=0,
            max_steps=WARM_UP + steps,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
            args=options,
            train_dataset=datasets.Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=AutoTokenizer.from_pretrained(folder / "tok"),
            callbacks=[clock],
        )
        collate = trainer.data_collator

        def counted(examples: Any) -> Any:
            batch = collate(examples)
            tokens.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counted
        trainer.train()
    taken = tokens[WARM_UP : WARM_UP + steps]
    print(json.dumps({"tokens": sum(taken), "cpu_s": clock.times[-1] - clock.times[WARM_UP - 1]}))


if __name__ == "__main__":
    main()
