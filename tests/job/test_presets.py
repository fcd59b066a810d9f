"""Every shipped configuration of a GPU machine, dry-run on the public shape of its model."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from roll_sft import stages
from roll_sft.config.schema import RunConfig, layout_of, on_device
from roll_sft.job.layouts import Gpus, candidates, variants
from roll_sft.job.memory import estimate
from roll_sft.job.step_time import Work
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import family_of
from roll_sft.run import compose, shipped_configurations
from tests.doors import cells, write_rows


def qwen(hidden: int, ffn: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    """The config.json of a Qwen2.5 model: its published numbers."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": layers <= 36 and hidden <= 2048,  # up to 3B
        "vocab_size": 151936 if hidden <= 2048 else 152064,
    }


LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "rms_norm_eps": 1e-05,
    "rope_theta": 150000,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "swiglu_limit": 7.0,
    "router_aux_loss_coef": 0.9,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}
GLM_4_5_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "attention_bias": True,
    "use_qk_norm": False,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 131072,
    "num_nextn_predict_layers": 1,
    "vocab_size": 151552,
    "tie_word_embeddings": False,
}
QWEN_7B = qwen(3584, 18944, 28, 28, 4)
OF_40_GB, OF_80_GB, OF_141_GB = 40.0, 80.0, 141.0


class Preset(NamedTuple):
    model: dict[str, Any]  # its config.json
    parameters: str  # as the plan counts them
    gpus: Gpus


def nodes(number: int, memory_gib: float) -> Gpus:
    return Gpus(8 * number, memory_gib, 8)


PRESETS = {
    "qwen0_5b_sft": Preset(qwen(896, 4864, 24, 14, 2), "494,032,768", Gpus(1, OF_40_GB, 8)),
    "qwen1_5b_sft": Preset(qwen(1536, 8960, 28, 12, 2), "1,543,714,304", Gpus(1, OF_80_GB, 8)),
    "qwen3b_sft": Preset(qwen(2048, 11008, 36, 16, 2), "3,085,938,688", Gpus(1, OF_80_GB, 8)),
    "qwen7b_sft": Preset(QWEN_7B, "7,615,616,512", nodes(1, OF_80_GB)),
    "qwen7b_long_sft": Preset(QWEN_7B, "7,615,616,512", nodes(1, OF_80_GB)),
    "qwen14b_sft": Preset(qwen(5120, 13824, 48, 40, 8), "14,770,033,664", nodes(1, OF_80_GB)),
    "qwen32b_sft": Preset(qwen(5120, 27648, 64, 40, 8), "32,763,876,352", nodes(1, OF_80_GB)),
    "qwen3_30b_a3b_sft": Preset(QWEN3_30B_A3B, "30,532,122,624", nodes(1, OF_141_GB)),
    "qwen3_30b_a3b_2_nodes_sft": Preset(QWEN3_30B_A3B, "30,532,122,624", nodes(2, OF_80_GB)),
    "gpt_oss_20b_sft": Preset(GPT_OSS_20B, "20,914,757,184", nodes(1, OF_80_GB)),
    "glm_4_5_air_sft": Preset(GLM_4_5_AIR, "106,852,245,504", nodes(2, OF_141_GB)),
    "llama70b_2_nodes_sft": Preset(LLAMA_70B, "70,553,706,496", nodes(2, OF_141_GB)),
    "llama70b_sft": Preset(LLAMA_70B, "70,553,706,496", nodes(4, OF_80_GB)),
    "llama70b_8_nodes_sft": Preset(LLAMA_70B, "70,553,706,496", nodes(8, OF_80_GB)),
}
# Tokens of a sample that the layouts are chosen for, as of public instruction sets.
MEAN_TOKENS, MEAN_LONG_TOKENS = 400, 8000


def config_of(folder: Path, name: str, *given: str) -> RunConfig:
    """Configuration `name` with a row of data and its model's config.json in `folder`."""
    (folder / "config.json").write_text(json.dumps(PRESETS[name].model))
    rows = write_rows(folder / "rows.jsonl", [{"instruction": "Add 2 and 3.", "output": "5"}])
    data = (f"model.path={folder}", f"data.train=[{{path: {rows}}}]")
    composed = compose([f"--config-name={name}", *data, "dry_run=true", *given])
    assert composed is not None
    return on_device(composed[0], "cuda")


def shape_of(config: RunConfig) -> ModelShape:
    assert config.model.path is not None
    hf_config = load_hf_config(config.model.path, trust_remote_code=False)
    return family_of(hf_config).shape(hf_config)


def test_every_configuration_but_the_small_ones_is_here() -> None:
    shipped = {path.stem for path in shipped_configurations().glob("*.yaml")}
    assert shipped == {*PRESETS, "base", "demo"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_gpus_and_no_layout_that_fits_is_much_quicker(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, parameters, gpus = PRESETS[name]
    config = config_of(tmp_path, name)
    stages.run(config, composed_yaml="")
    plan = capsys.readouterr().out
    assert parameters in plan
    size, unit = cells(plan, "in all (estimate)")[1].split()[:2]
    assert unit == "GiB"
    assert float(size) < gpus.room_gib, plan
    samples = config.train.global_batch_size
    mean = MEAN_LONG_TOKENS if name == "qwen7b_long_sft" else MEAN_TOKENS
    work = Work(tokens=mean * samples, samples=samples, pack_tokens=0)
    shape = shape_of(config)
    first = candidates(config, shape, work, gpus)[0]
    (ours,) = [
        each
        for each in variants(config, shape, work, gpus)
        if each.layout == layout_of(config.parallel)
        and each.config.train.recompute == config.train.recompute
    ]
    assert ours.time.total_s < 1.15 * first.time.total_s, f"{first.degrees} is quicker"


@pytest.mark.parametrize(
    ("name", "given", "fits"),
    [
        ("qwen3b_sft", ["train.micro_batch_tokens=8192"], False),
        ("qwen3b_sft", ["train.micro_batch_tokens=8192", "train.recompute=full"], True),
        ("qwen14b_sft", ["parallel=gpus_8_tp2"], False),
        ("qwen32b_sft", ["train.recompute=none"], False),
        ("qwen32b_sft", ["parallel.num_workers=16", "train.recompute=none"], True),
        ("llama70b_sft", ["parallel=gpus_16_tp8_pp2"], False),
        ("qwen3_30b_a3b_2_nodes_sft", ["parallel=gpus_8_ep8"], False),
    ],
)
def test_what_a_comment_offers_fits_and_what_it_rules_out_does_not(
    name: str, given: list[str], fits: bool, tmp_path: Path
) -> None:
    config = config_of(tmp_path, name, *given)
    found = estimate(config, shape_of(config)).total_gib
    assert (found < PRESETS[name].gpus.room_gib) == fits, found
