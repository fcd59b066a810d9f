import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig
from roll_sft.demo import corpus, demo

COLUMNS = {"instruction", "input", "output"}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "outputs" / "assets"
    demo.make_assets(folder)
    return folder


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_assets_are_byte_equal_in_a_process_with_another_hash_seed(assets, tmp_path):
    again = tmp_path / "again"
    script = f"import pathlib, roll_sft.demo.demo as d; d.make_assets(pathlib.Path({str(again)!r}))"
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(demo.__file__).parents[1])},
    )
    assert contents(again) == contents(assets)


def test_examples_do_not_depend_on_what_this_process_imported(monkeypatch):
    before = corpus.documentation_examples()
    monkeypatch.setattr(inspect, "getfile", lambda thing: "patched")
    assert corpus.documentation_examples() == before


def test_data_has_the_promised_rows_in_alpaca_columns(assets):
    train = read_rows(assets / "train.jsonl")
    validation = read_rows(assets / "validation.jsonl")
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
    rows = read_rows(assets / "train.jsonl") + read_rows(assets / "validation.jsonl")
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
    assert corpus.first_paragraphs(text) == answer


def test_tokenizer_reads_back_from_disk_as_it_was_trained(assets):
    rows = read_rows(assets / "train.jsonl")
    trained = demo.train_tokenizer([corpus.Example(**row) for row in rows])
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
    for row in read_rows(assets / "train.jsonl"):
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


def test_the_run_asks_for_the_assets_by_their_paths_alone():
    ours, other = str(demo.ASSETS / "model"), "models/Qwen2.5-0.5B"
    sources = [SourceConfig(path=str(demo.ASSETS / "train.jsonl"))]
    run = functools.partial(RunConfig, run_name="x")
    assert demo.is_asked(run(model=ModelConfig(path=ours)))
    assert demo.is_asked(run(model=ModelConfig(path=other), data=DataConfig(train=sources)))
    assert not demo.is_asked(run(model=ModelConfig(path=other)))
    assert not demo.is_asked(run())


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        demo.make_assets(tmp_path / "outputs" / "demo_assets")


def test_an_answer_is_shown_beside_the_right_one(assets, tmp_path, monkeypatch, capsys):
    config = AutoConfig.from_pretrained(str(assets / "model"))
    AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path / "hf"))
    AutoTokenizer.from_pretrained(str(assets / "model")).save_pretrained(str(tmp_path / "hf"))
    monkeypatch.setattr(demo, "ASSETS", assets)
    demo.show_answer(tmp_path / "hf")
    text = capsys.readouterr().out
    for label in ("question: ", "answer: ", "truth: "):
        assert label in text
