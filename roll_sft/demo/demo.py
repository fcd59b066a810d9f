"""The demonstration: real text, a small model, and an answer at the end.

`--config-name demo` trains on data that is made here, on demand, from the documentation of Python's
standard library, so it needs no network. After the run the exported model answers a question.

Promises: the assets depend on the versions of Python, tokenizers and transformers alone, byte for
byte; a folder with the final name is complete, because it is made under another name and renamed.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roll_sft.base.console import stdout_console
from roll_sft.base.errors import ConfigError, DataError
from roll_sft.config.schema import RunConfig
from roll_sft.demo.corpus import Example, documentation_examples

if TYPE_CHECKING:  # transformers takes seconds to import, and each run imports this module
    from transformers import Qwen2Config, Qwen2Tokenizer

LOG = logging.getLogger(__name__)
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


def is_asked(config: RunConfig) -> bool:
    """Whether `config` names something that `make_assets` makes."""
    sources = (*config.data.train, *config.data.validation)
    paths = (config.model.path, *(source.path for source in sources))
    return any(ASSETS in Path(path).parents for path in paths if path)


def make_assets(folder: Path) -> None:
    """Fill `folder` with train.jsonl, validation.jsonl and model/, unless it is complete.

    Raises `ConfigError` where it cannot be written.
    """
    if is_complete(folder):
        return
    LOG.info("making the demonstration's data and model in %s", folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        write_assets(draft)
        if folder.exists() and not is_complete(folder):  # someone removed a part of it
            shutil.rmtree(folder)
        if not folder.exists():
            draft.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written: {error.strerror}; the demonstration makes its data in"
            " the current folder, so change to one that you may write to"
        ) from error
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


def train_tokenizer(examples: list[Example]) -> "Qwen2Tokenizer":
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens with ChatML's special tokens and template.

    It is of Qwen2's class, with Qwen2's way to split words, because AutoTokenizer builds that class
    for every folder whose config.json says qwen2: another way to split would be lost on loading.
    """
    from transformers import Qwen2Tokenizer

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


def model_config(tokenizer: "Qwen2Tokenizer") -> "Qwen2Config":
    """A Qwen2 of about 1.2 million parameters, every feature of the family present."""
    from transformers import Qwen2Config

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


def show_answer(model_folder: Path) -> None:
    """Print a question of the validation data, the model's answer, and the right one."""
    row = json.loads((ASSETS / "validation.jsonl").read_text(encoding="utf-8").splitlines()[0])
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    console = stdout_console()
    for label, text in (
        ("question", question),
        ("answer", generate(model_folder, question)),
        ("truth", row["output"]),
    ):
        console.print(f"{label:>8}: {text}")


def generate(model_folder: Path, question: str) -> str:
    """The greedy answer of the model in `model_folder` to one user turn, without special tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

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
