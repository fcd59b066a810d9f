"""The chat template and `train_on` of a configuration, from samples to what an export carries."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from roll_sft.base.errors import ConfigError
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig
from roll_sft.data.chat.templates import chat_template
from roll_sft.job.in_process import prepare_job
from tests import doors
from tests.doors import NUM_ROWS
from tests.tiny import tiny_tokenizer

assets = doors.assets


def config(assets: Path, folder: Path, **data: Any) -> RunConfig:
    return build_config(
        {
            "model": {"path": str(assets / "model")},
            "data": {
                "train": [{"path": str(assets / "rows.jsonl")}],
                "cache_dir": str(folder / "cache"),
                "sequence_length": 200,
                **data,
            },
        }
    )


def test_an_export_carries_the_template_that_was_trained_with(assets: Path, tmp_path: Path) -> None:
    job = prepare_job(config(assets, tmp_path, chat_template="alpaca"))
    tokens, _ = job.data.train.sample(0)
    assert "\n\n### Response:\nIt is 0. It is 0." in tiny_tokenizer().decode(tokens)
    job.save_assets(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == chat_template("alpaca", tiny_tokenizer())
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generation["eos_token_id"]


def test_what_is_trained_on_decides_the_address_and_not_where_a_model_stops(
    assets: Path, tmp_path: Path
) -> None:
    jobs = [
        prepare_job(config(assets, tmp_path, train_on=train_on))
        for train_on in ("assistant", "all")
    ]
    assert len({job.state.sources["rows"] for job in jobs}) == 2
    for number, job in enumerate(jobs):
        job.save_assets(tmp_path / str(number))
        generation = json.loads((tmp_path / str(number) / "generation_config.json").read_text())
        assert 2 in generation["eos_token_id"]
    answers, everything = (job.data.train.supervised for job in jobs)
    assert len(answers) == len(everything) == NUM_ROWS
    assert (everything == jobs[1].data.train.lengths - 1).all()
    assert (answers < everything).all()


def test_an_unknown_template_is_refused(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.chat_template: 'chatlm'.*\bchatml\b"):
        prepare_job(config(assets, tmp_path, chat_template="chatlm"))
