"""The demonstration: real text, a small model, the main job end to end, and an answer at the end.

`python -m roll_sft.demo [overrides]` makes its own data from the documentation of Python's standard
library, so it needs no network. It runs the main job with `--config-name demo` on that data, shows
the loss and the files it wrote, and lets the exported model answer through transformers. Overrides
go to the main job.

Promises: the assets depend on the versions of Python, tokenizers and transformers alone, byte for
byte; a folder with the final name is complete, because it is made under another name and renamed.
"""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

from roll_sft.demo_data import Example, documentation_examples
from roll_sft.errors import DataError, RollSftError

ASSETS = Path("outputs/demo_assets")  # conf/demo.yaml names the same folder
NUM_TRAIN = 2400
NUM_VALIDATION = 100
MAX_NEW_TOKENS = 64
REPETITION_PENALTY = 1.3  # a model this small falls into loops without it
VOCAB_SIZE = 4096  # of the tokenizer and of the embedding, special tokens included
MAX_POSITIONS = 512  # tokens; the longest example has fewer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def main(argv: list[str]) -> int:
    """Make the assets, run the main job with overrides `argv`, show its results; the exit code."""
    try:
        make_assets(ASSETS)
    except RollSftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    # Imported here, so that the assets can be made and tested without Ray or Megatron-Core.
    from roll_sft import run

    code = run.main(["--config-name", "demo", *argv])
    if code == 0 and trains(argv):
        show_results(output_dir(argv), ASSETS / "validation.jsonl", Console())
    return code


def make_assets(folder: Path) -> None:
    """Fill `folder` with train.jsonl, validation.jsonl and model/, unless it is complete."""
    if is_complete(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        write_assets(draft)
        if folder.exists() and not is_complete(folder):  # someone removed a part of it
            shutil.rmtree(folder)
        if not folder.exists():
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of the assets."""
    names = ("train.jsonl", "validation.jsonl", "model/tokenizer.json", "model/config.json")
    return all((folder / name).is_file() for name in names)


def write_assets(folder: Path) -> None:
    """Write data, tokenizer and model configuration into the existing `folder`."""
    examples = documentation_examples()
    needed = NUM_TRAIN + NUM_VALIDATION
    if len(examples) < needed:
        raise DataError(
            f"demo: {len(examples)} documentation strings found in Python's standard library, "
            f"{needed} are needed; use a Python that was built with documentation strings"
        )
    write_jsonl(folder / "validation.jsonl", examples[:NUM_VALIDATION])
    write_jsonl(folder / "train.jsonl", examples[NUM_VALIDATION:needed])
    tokenizer = train_tokenizer(examples[NUM_VALIDATION:needed])
    tokenizer.save_pretrained(str(folder / "model"))
    model_config(tokenizer).save_pretrained(str(folder / "model"))


def write_jsonl(path: Path, examples: list[Example]) -> None:
    """One JSON object a line, UTF-8."""
    lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in examples]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def train_tokenizer(examples: list[Example]) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens with ChatML's special tokens and template.

    It is of Qwen2's class, with Qwen2's way to split words, because AutoTokenizer builds that class
    for every folder whose config.json says qwen2: another way to split would be lost on loading.
    """
    untrained: Any = Qwen2Tokenizer(  # Any: transformers leaves its training without types
        eos_token=TURN_END, pad_token=END_OF_TEXT, additional_special_tokens=[TURN_START]
    )
    tokenizer: Qwen2Tokenizer = untrained.train_new_from_iterator(
        (f"{row.instruction}\n{row.input}\n{row.output}" for row in examples),
        vocab_size=VOCAB_SIZE,
        length=len(examples),
        show_progress=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = MAX_POSITIONS
    return tokenizer


def model_config(tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    """A Qwen2 of about 1.2 million parameters, every feature of the family present."""
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def override(argv: list[str], key: str) -> str | None:
    """The value the last override gives to `key`, without quotes; None if there is none."""
    for argument in reversed(argv):
        name, equals, value = argument.lstrip("+").partition("=")
        if equals and name == key:
            return value.strip("\"'")
    return None


def trains(argv: list[str]) -> bool:
    """Whether the main job trains: not for a dry run, a preparation, or a flag such as --cfg."""
    switches = [override(argv, key) or "" for key in ("dry_run", "prepare_only")]
    asked_off = any(value.lower() in ("true", "yes", "on", "1") for value in switches)
    return not asked_off and not any(argument.startswith("-") for argument in argv)


def output_dir(argv: list[str]) -> Path:
    """Where the main job writes under the overrides `argv`."""
    return Path(override(argv, "output_dir") or f"outputs/{override(argv, 'run_name') or 'demo'}")


def show_results(folder: Path, validation: Path, console: Console) -> None:
    """Print the loss, every file written under `folder`, and one answer of the exported model."""
    steps = read_jsonl(folder / "steps.jsonl")
    first, last = steps[0], steps[-1]
    table = Table("file", "bytes", title="files written", title_justify="left", highlight=True)
    table.columns[0].overflow = "fold"
    table.columns[1].justify = "right"
    written = [*ASSETS.rglob("*"), *folder.rglob("*"), *folder.parent.glob("mlflow.db")]
    for path in sorted(path for path in written if path.is_file()):
        table.add_row(str(path), f"{path.stat().st_size:,}")
    console.print(table)
    console.print(
        f"loss {first['train_loss']:.4f} at step {first['step']} -> "
        f"{last['train_loss']:.4f} at step {last['step']}",
        highlight=False,
    )
    if not (folder / "hf").is_dir():
        console.print(f"no model was exported to {folder / 'hf'}, so none answers")
        return
    row = read_jsonl(validation)[0]
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    for label, text in (
        ("question", question),
        ("answer", generate(folder / "hf", question)),
        ("truth", row["output"]),
    ):
        console.print(f"{label:>8}: {text}", markup=False, highlight=False)


def generate(model_folder: Path, question: str) -> str:
    """The greedy answer of the model in `model_folder` to one user turn, without special tokens."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model_folder))
    model: Any = AutoModelForCausalLM.from_pretrained(str(model_folder))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(
        **prompt,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        repetition_penalty=REPETITION_PENALTY,
    )
    answer_ids = output[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer_ids, skip_special_tokens=True))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every line of `path` as an object."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
