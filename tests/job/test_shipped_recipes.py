"""Every recipe, on the public shape of its model: it composes, fits, and says what it takes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from roll_sft import stages
from roll_sft.config.schema import RunConfig, on_device
from roll_sft.job.memory import estimate
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.source import family_of
from roll_sft.run import compose, shipped_configurations
from tests.job.test_presets import (
    GPT_OSS_20B,
    LLAMA_70B,
    OF_40_GB,
    OF_80_GB,
    QWEN3_30B_A3B,
    QWEN_7B,
    Gpus,
)


def llama(hidden: int, ffn: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    """The config.json of a Llama 3 model: its published numbers."""
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    return {**LLAMA_70B, **sizes, "num_attention_heads": heads, "num_key_value_heads": groups}


def olmo2(hidden: int, ffn: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    """The config.json of an OLMo 2 model."""
    kind = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "vocab_size": 100352}
    plain = {**llama(hidden, ffn, layers, heads, groups), **kind, "max_position_embeddings": 4096}
    del plain["rope_scaling"]
    return plain


def qwen3(hidden: int, ffn: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    """The config.json of a Qwen3 model."""
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936}
    plain = {**llama(hidden, ffn, layers, heads, 8), **kind, "head_dim": 128}
    del plain["rope_scaling"]
    return {**plain, "max_position_embeddings": 40960, "tie_word_embeddings": tied}


GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
LLAMA_8B = llama(4096, 14336, 32, 32, 8)
NODE = Gpus(8, OF_80_GB, 8)
RECIPES: dict[str, tuple[dict[str, Any], Gpus]] = {
    "gemma3_1b_sft": (GEMMA_3_1B, Gpus(1, OF_80_GB, 8)),
    "gpt_oss_20b_sft": (GPT_OSS_20B, NODE),
    "llama3_1_70b_sft": (LLAMA_70B, Gpus(32, OF_80_GB, 8)),
    "llama3_1_8b_sft": (LLAMA_8B, NODE),
    "olmo2_13b_sft": (olmo2(5120, 13824, 40, 40, 40), NODE),
    "olmo2_32b_sft": (olmo2(5120, 27648, 64, 40, 8), NODE),
    "olmo2_7b_sft": (olmo2(4096, 11008, 32, 32, 32), NODE),
    "openrlhf_llama3_8b_sft": (LLAMA_8B, NODE),
    "qwen3_0_6b_sft": (qwen3(1024, 3072, 28, 16, tied=True), Gpus(1, OF_40_GB, 8)),
    "qwen3_14b_sft": (qwen3(5120, 17408, 40, 40, tied=False), NODE),
    "qwen3_1_7b_sft": (qwen3(2048, 6144, 28, 16, tied=True), Gpus(1, OF_80_GB, 8)),
    "qwen3_30b_a3b_sft": (QWEN3_30B_A3B, Gpus(16, OF_80_GB, 8)),
    "qwen3_32b_sft": (qwen3(5120, 25600, 64, 64, tied=False), NODE),
    "qwen3_4b_sft": (qwen3(2560, 9728, 36, 32, tied=True), NODE),
    "qwen3_8b_sft": (qwen3(4096, 12288, 36, 32, tied=False), NODE),
    "roll_qwen2_5_7b_sft": (QWEN_7B, NODE),
    "trlx_alpaca_sft": (llama(3072, 8192, 28, 24, 8) | {"tie_word_embeddings": True}, NODE),
    "tulu3_8b_sft": (LLAMA_8B, NODE),
}
FOLDER = shipped_configurations() / "recipes"
ESTIMATE = r"# Estimate: (\d+) GiB on each of (\d+) GPUs; a step holds at most ([\d,]+) tokens\."


def config_of(folder: Path, name: str, *given: str) -> RunConfig:
    """Recipe `name` with its model's config.json in `folder`, and a row of data."""
    (folder / "config.json").write_text(json.dumps(RECIPES[name][0]))
    columns = ("question", "response") if "openrlhf" in name else ("instruction", "output")
    row = dict(zip(columns, ("2 + 3?", "5"), strict=True))
    (folder / "rows.jsonl").write_text(json.dumps(row))
    words = [f"model.path={folder}", f"data.train=[{{path: {folder}/rows.jsonl}}]", "dry_run=true"]
    composed = compose([f"--config-name=recipes/{name}", *words, *given])
    assert composed is not None
    return on_device(composed[0], "cuda")


def memory_gib(config: RunConfig) -> float:
    assert config.model.path is not None
    hf_config = load_hf_config(config.model.path, trust_remote_code=False)
    return estimate(config, family_of(hf_config).shape(hf_config)).total_gib


def test_every_recipe_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_and_says_what_it_takes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, gpus = config_of(tmp_path, name), RECIPES[name][1]
    stages.run(config, composed_yaml="")
    assert "in all (estimate)" in capsys.readouterr().out
    found = memory_gib(config)
    assert found < gpus.room_gib
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    said = re.search(ESTIMATE, text)
    assert said is not None
    tokens = config.train.global_batch_size * config.data.sequence_length
    wanted = (f"{found:.0f}", str(config.parallel.num_workers), f"{tokens:,}")
    assert said.groups() == wanted
    assert config.parallel.num_workers == gpus.number
    assert "# Numbers: " in text


def test_adapters_are_one_group_away(tmp_path: Path) -> None:
    adapters = config_of(tmp_path, "qwen3_8b_sft", "lora=lora")
    quantized = config_of(tmp_path, "qwen3_8b_sft", "lora=qlora", "parallel=gpu_1")
    assert adapters.lora.rank == quantized.lora.rank == 16
    assert memory_gib(adapters) < memory_gib(config_of(tmp_path, "qwen3_8b_sft"))
    assert memory_gib(quantized) < Gpus(1, OF_80_GB, 8).room_gib
