import inspect
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from roll_sft import demo, demo_data

COLUMNS = {"instruction", "input", "output"}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "outputs" / "assets"
    demo.make_assets(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_assets_are_byte_equal_in_a_process_with_another_hash_seed(assets, tmp_path):
    again = tmp_path / "again"
    script = f"import pathlib, roll_sft.demo as d; d.make_assets(pathlib.Path({str(again)!r}))"
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(demo.__file__).parents[1])},
    )
    assert contents(again) == contents(assets)


def test_examples_do_not_depend_on_what_this_process_imported(monkeypatch):
    before = demo_data.documentation_examples()
    monkeypatch.setattr(inspect, "getfile", lambda thing: "patched")
    assert demo_data.documentation_examples() == before


def test_data_has_the_promised_rows_in_alpaca_columns(assets):
    train = demo.read_jsonl(assets / "train.jsonl")
    validation = demo.read_jsonl(assets / "validation.jsonl")
    assert (len(train), len(validation)) == (2400, 100)
    assert all(row.keys() == COLUMNS for row in train + validation)
    answers = [row["output"] for row in train + validation]
    assert len(set(answers)) == len(answers), "an answer in validation must not be trained on"
    assert any(row["input"] for row in train)
    assert not all(row["input"] for row in train)


def named_in(row: dict[str, str]) -> str:
    """The Python name a row asks about, whichever phrasing it has."""
    return (row["input"] or row["instruction"].split("`")[1]).strip("`")


# Run in a bare interpreter, as the examples were: libraries patch the standard one on import.
# A name may be both a module and what its package has under that name (unittest.main), and a method
# may be documented in its class and nowhere else (zoneinfo.ZoneInfo.no_cache on Python 3.12).
PRINT_STRANGERS = """
import functools, importlib, inspect, json, sys
def texts(name):
    parts = name.split('.')
    for size in range(1, len(parts) + 1):
        try:
            module = importlib.import_module('.'.join(parts[:size]))
            yield functools.reduce(getattr, parts[size:], module).__doc__ or ''
            owner = functools.reduce(getattr, parts[size:-1], module)
            yield vars(owner)[parts[-1]].__doc__ or ''
        except (ImportError, AttributeError, KeyError, TypeError):
            pass
for name, answer in json.load(sys.stdin):
    found = [*texts(name), *texts('builtins.' + name)]
    if not any(inspect.cleandoc(text).startswith(answer) for text in found):
        print(name)
"""


def test_every_answer_is_the_beginning_of_the_documentation_it_is_asked_for(assets):
    rows = demo.read_jsonl(assets / "train.jsonl") + demo.read_jsonl(assets / "validation.jsonl")
    strangers = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PRINT_STRANGERS],
        input=json.dumps([(named_in(row), row["output"]) for row in rows]),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert strangers == ""
    assert all(40 <= len(row["output"]) <= 600 for row in rows)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("One.", "One."),
        ("One.\n\nTwo.", "One.\n\nTwo."),
        ("One.\n\n" + "x" * 600, "One."),
        ("x" * 600, "x" * 600),
        ("x" * 601, ""),
        ("x" * 598 + "\n\n" + "Two.", "x" * 598),
        ("", ""),
    ],
)
def test_an_answer_is_cut_between_paragraphs_only(text, answer):
    assert demo_data.first_paragraphs(text) == answer


def test_tokenizer_reads_back_from_disk_as_it_was_trained(assets):
    rows = demo.read_jsonl(assets / "train.jsonl")
    trained = demo.train_tokenizer([demo_data.Example(**row) for row in rows])
    loaded = AutoTokenizer.from_pretrained(str(assets / "model"))
    texts = [row["output"] for row in rows] + [
        "caf\u00e9 \u4e2d\u6587 \U0001f600\t x==1\r\n  12345"
    ]
    for text in texts:
        ids = loaded(text)["input_ids"]
        assert ids == trained(text)["input_ids"]
        assert loaded.decode(ids) == text


def test_tokenizer_renders_chatml_and_ends_a_turn_with_eos(assets):
    tokenizer = AutoTokenizer.from_pretrained(str(assets / "model"))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n")
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    special = tokenizer("<|im_start|><|im_end|><|endoftext|>")["input_ids"]
    assert len(special) == 3, "each special token is one id"


def test_model_configuration_loads_and_fits_the_tokenizer(assets):
    config = AutoConfig.from_pretrained(str(assets / "model"))
    tokenizer = AutoTokenizer.from_pretrained(str(assets / "model"))
    assert isinstance(config, Qwen2Config)
    assert config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_every_example_fits_the_models_positions(assets):
    tokenizer = AutoTokenizer.from_pretrained(str(assets / "model"))
    for row in demo.read_jsonl(assets / "train.jsonl"):
        messages = [
            {"role": "user", "content": f"{row['instruction']}\n{row['input']}"},
            {"role": "assistant", "content": row["output"]},
        ]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert len(ids) <= demo.MAX_POSITIONS


def test_complete_assets_are_kept_and_incomplete_ones_made_again(assets, tmp_path):
    folder = tmp_path / "assets"
    demo.make_assets(folder)
    train = folder / "train.jsonl"
    train.write_text("mine")
    demo.make_assets(folder)
    assert train.read_text() == "mine"
    (folder / "model" / "config.json").unlink()
    demo.make_assets(folder)
    assert contents(folder) == contents(assets)
    assert [path.name for path in tmp_path.iterdir()] == ["assets"], "no draft is left behind"


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        ([], "outputs/demo"),
        (["run_name=second"], "outputs/second"),
        (["output_dir=/tmp/x", "run_name=second"], "/tmp/x"),
        (["output_dir=a", "++output_dir='b c'"], "b c"),
        (["train.output_dir=a"], "outputs/demo"),
    ],
)
def test_output_dir_follows_the_overrides(argv, folder):
    assert demo.output_dir(argv) == Path(folder)


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        ([], True),
        (["train.max_steps=5"], True),
        (["dry_run=false"], True),
        (["dry_run=true"], False),
        (["+prepare_only=True"], False),
        (["--cfg", "job"], False),
    ],
)
def test_results_are_shown_only_after_training(argv, answer):
    assert demo.trains(argv) is answer


@pytest.fixture
def finished_run(assets: Path, tmp_path: Path) -> Path:
    """A run's folder with an untrained model in it."""
    config = AutoConfig.from_pretrained(str(assets / "model"))
    AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path / "hf"))
    AutoTokenizer.from_pretrained(str(assets / "model")).save_pretrained(str(tmp_path / "hf"))
    steps = [{"step": 1, "train_loss": 8.25}, {"step": 2, "train_loss": 7.5}]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return tmp_path


@pytest.fixture
def shown(assets: Path) -> Callable[[Path], str]:
    def show(folder: Path) -> str:
        screen = io.StringIO()
        demo.show_results(folder, assets / "validation.jsonl", Console(file=screen, width=200))
        return screen.getvalue()

    return show


def test_results_name_the_loss_every_file_and_an_answer(finished_run, shown):
    text = shown(finished_run)
    assert "loss 8.2500 at step 1 -> 7.5000 at step 2" in text
    size = (finished_run / "hf" / "model.safetensors").stat().st_size
    assert f"{size:,}" in text
    for path in finished_run.rglob("*.*"):
        assert str(path.relative_to(finished_run)) in text
    for label in ("question: ", "answer: ", "truth: "):
        assert label in text


def test_results_say_when_no_model_was_exported(finished_run, shown):
    (finished_run / "hf").rename(finished_run.parent / "elsewhere")
    text = shown(finished_run)
    assert "no model was exported" in text
    assert "answer:" not in text
