"""Small configurations of each trainer, imported: what each key becomes, and equal steps."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import get_scheduler

from roll_sft import run
from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import RunConfig
from roll_sft.data.rows.files import find_files
from roll_sft.data.steps.learning_rate import Schedule
from roll_sft.migrate import command
from roll_sft.migrate.check import _their_rate, comparison
from roll_sft.migrate.draft import Draft
from roll_sft.migrate.given import _expanded, read_given

FILES: dict[str, str] = {
    "trl.yaml": """
        model_name_or_path: Qwen/Qwen2.5-0.5B
        dataset_name: trl-lib/Capybara
        learning_rate: 2e-4
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 8
        packing: true
        max_length: 2048
        warmup_ratio: 0.1
        lr_scheduler_type: cosine
        num_train_epochs: 1
        eos_token: <|im_end|>
        hub_token: hf_secret
        push_to_hub: true
        hub_model_id: me/model
        hub_strategy: every_save
        save_strategy: steps
        foo_bar: 3
    """,
    "openrlhf.sh": r"""
        set -x
        MODEL=meta-llama/Meta-Llama-3-8B
        deepspeed --module openrlhf.cli.train_sft \
           --max_len 2048 --dataset Open-Orca/OpenOrca --input_key question \
           --output_key response --train_batch_size 256 --micro_train_batch_size 2 \
           --max_samples 500000 --pretrain $MODEL --save_path ./ckpt/llama3-8b-sft \
           --save_steps -1 --logging_steps 1 --eval_steps -1 --zero_stage 2 \
           --max_epochs 1 --packing_samples --bf16 --flash_attn --learning_rate 5e-6 \
           --gradient_checkpointing --use_wandb $WANDB_TOKEN
    """,
    "open_instruct.sh": r"""
        python mason.py --cluster a/b --num_nodes 2 --gpus 8 -- accelerate launch \
            --mixed_precision bf16 --num_processes 8 --use_deepspeed open_instruct/finetune.py \
            --model_name_or_path meta-llama/Llama-3.1-8B --tokenizer_name meta-llama/Llama-3.1-8B \
            --max_seq_length 4096 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 \
            --learning_rate 5e-06 --lr_scheduler_type linear --warmup_ratio 0.03 --weight_decay 0 \
            --num_train_epochs 2 --output_dir output/sft_8b --reduce_loss sum \
            --dataset_mixer_list allenai/tulu-3-sft-mixture 1.0 other/set 5000 \
            --checkpointing_steps epoch --push_to_hub false --seed 8
    """,
    "olmo_core.sh": r"""
        torchrun --nproc_per_node=4 open_instruct/olmo_core_finetune.py \
            --model_name_or_path allenai/OLMo-2-1124-7B --mixer_list allenai/tulu-3 1.0 \
            --per_device_train_batch_size 2 --max_train_steps 100 --run_name olmo2 --cp_degree 2
    """,
    "roll.yaml": """
        hydra: {run: {dir: .}, output_subdir: null}
        exp_name: qwen2.5-7B-sft-config
        seed: 42
        logging_dir: ./output/logs
        output_dir: ./output_sft
        system_envs: {USE_MODELSCOPE: "1"}
        track_with: tensorboard
        tracker_kwargs: {log_dir: /data/tensorboard}
        num_gpus_per_node: 8
        save_steps: 100
        logging_steps: 1
        eval_steps: 10
        resume_from_checkpoint: false
        sequence_length: 2048
        pretrain: Qwen/Qwen2.5-7B
        prompt_key: instruction
        query_key: input
        response_key: output
        global_template: qwen2_5
        validation: {data_args: {file_name: code_alpaca_20k.json, template: qwen2_5}}
        sft_train:
          model_args: {dtype: bf16}
          training_args: {num_train_epochs: 1, learning_rate: 5.0e-6,
            per_device_train_batch_size: 2, gradient_accumulation_steps: 16}
          data_args: {file_name: code_alpaca_20k.json, template: qwen2_5,
            preprocessing_num_workers: 4}
          strategy_args:
            strategy_name: megatron_train
            strategy_config: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2,
              context_parallel_size: 2, sequence_parallel: true, use_distributed_optimizer: true}
          device_mapping: list(range(0,8))
          infer_batch_size: 2
          use_sequence_packing: true
    """,
    "verl.sh": r"""
        torchrun --nnodes=1 --nproc_per_node=8 -m verl.trainer.sft_trainer \
            data.train_files=train.parquet data.val_files=test.parquet data.train_batch_size=96 \
            data.max_length=2048 data.truncation=right optim.lr=1e-5 model.path=Qwen/Qwen2.5-3B \
            engine=megatron engine.tensor_model_parallel_size=2 trainer.total_epochs=2 \
            'trainer.logger=["console","mlflow"]' trainer.project_name=sft trainer.experiment_name=q
    """,
    "nemo.yaml": """
        sft: {max_num_epochs: 1, max_num_steps: 60, val_period: 10, seed: 42}
        checkpointing: {enabled: true, checkpoint_dir: results/sft, save_period: 10, keep_top_k: 3,
          metric_name: "val:val_loss"}
        policy:
          model_name: meta-llama/Llama-3.2-1B
          tokenizer: {name: meta-llama/Llama-3.2-1B, chat_template: default}
          train_global_batch_size: 32
          train_micro_batch_size: 1
          max_total_sequence_length: 1024
          precision: bfloat16
          sequence_packing: {enabled: false}
          dtensor_cfg: {enabled: true, tensor_parallel_size: 1, cpu_offload: false}
          megatron_cfg: {enabled: false, optimizer: {lr: 1.0}}
          optimizer: {name: torch.optim.AdamW, kwargs: {lr: 5.0e-6, weight_decay: 0.1,
            betas: [0.9, 0.98], eps: 1e-5, foreach: false, fused: false}}
        data:
          train: {data_path: train.jsonl, input_key: input, output_key: output}
        logger: {wandb_enabled: false, tensorboard_enabled: false, mlflow_enabled: true}
        cluster: {gpus_per_node: 4, num_nodes: 2}
    """,
    "llama_factory.yaml": """
        model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
        stage: sft
        do_train: true
        finetuning_type: lora
        lora_rank: 8
        lora_target: all
        dataset: identity,alpaca_en_demo
        dataset_dir: data
        template: llama3
        cutoff_len: 2048
        max_samples: 1000
        overwrite_cache: true
        output_dir: saves/llama3-8b/lora/sft
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 8
        learning_rate: 1.0e-4
        num_train_epochs: 3.0
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        bf16: true
        ddp_timeout: 180000000
    """,
    "axolotl.yml": """
        base_model: NousResearch/Llama-3.2-1B
        datasets:
          - {path: teknium/GPT4-LLM-Cleaned, type: alpaca}
        val_set_size: 0.1
        output_dir: ./outputs/lora-out
        adapter: lora
        sequence_len: 2048
        sample_packing: true
        lora_r: 16
        lora_alpha: 32
        lora_dropout: 0.05
        lora_target_modules: [gate_proj, down_proj]
        wandb_project: x
        gradient_accumulation_steps: 2
        micro_batch_size: 2
        num_epochs: 1
        optimizer: adamw_8bit
        lr_scheduler: cosine
        learning_rate: 0.0002
        bf16: auto
        gradient_checkpointing: true
        flash_attention: true
        warmup_ratio: 0.1
        special_tokens: {pad_token: "<|end_of_text|>"}
    """,
    "swift.sh": r"""
        NPROC_PER_NODE=2 CUDA_VISIBLE_DEVICES=0,1 megatron sft --model Qwen/Qwen2.5-7B-Instruct \
            --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' 'swift/self-cognition#500' \
            --tensor_model_parallel_size 2 --sequence_parallel true --micro_batch_size 16 \
            --global_batch_size 16 --recompute_granularity full --lr 1e-5 --min_lr 1e-6 \
            --lr_warmup_fraction 0.05 --max_length 2048 --save megatron_output --max_epochs 1
    """,
    "skyrl.yaml": """
        strategy: megatron
        model: {path: Qwen/Qwen2.5-0.5B-Instruct}
        train_datasets: [yahma/alpaca-cleaned]
        train_dataset_splits: ["train[:1000]"]
        max_length: 512
        num_steps: 50
        batch_size: 4
        train_on_what: all_assistant_messages
        placement: {num_nodes: 1, num_gpus_per_node: 4}
        megatron_config: {tensor_model_parallel_size: 2}
    """,
    "trlx.yaml": """
        train: {seq_length: 1024, epochs: 100, total_steps: 1000, batch_size: 8, seed: 1000,
          checkpoint_interval: 1000, eval_interval: 100, pipeline: PromptPipeline,
          trainer: AccelerateSFTTrainer, tracker: tensorboard}
        model: {model_path: gpt2, num_layers_unfrozen: 2}
        tokenizer: {tokenizer_path: gpt2, truncation_side: right}
        optimizer: {name: adamw, kwargs: {lr: 1.0e-4, betas: [0.9, 0.95], eps: 1.0e-8,
          weight_decay: 1.0e-6}}
        scheduler: {name: cosine_annealing, kwargs: {T_max: 1.0e+12, eta_min: 1.0e-4}}
        method: {name: sftconfig, gen_kwargs: {max_new_tokens: 40, top_k: 20}}
    """,
}
# What must stand in our file: key -> value.
EXPECTED: dict[str, dict[str, Any]] = {
    "trl.yaml": {
        "train.global_batch_tokens": 2 * 8 * 8 * 2048,
        "train.learning_rate": 2e-4,
        "data.train_on": "all",
        "data.overlong": "truncate",
        "checkpoint.hf_export": "every_save",
        "export.push_to_hub.repo_id": "me/model",
        "export.push_to_hub.private": False,
    },
    "openrlhf.sh": {
        "model.path": "meta-llama/Meta-Llama-3-8B",
        "train.global_batch_size": 256,
        "train.min_learning_rate": 5e-7,
        "train.adam_beta2": 0.95,
        "train.recompute": "full",
        "data.prompt_key": "question",
        "data.response_key": "response",
        "data.train_on": "last_assistant",
        "data.train": [{"path": "Open-Orca/OpenOrca", "split": "train", "samples": 500000}],
        "parallel.num_workers": 8,
    },
    "open_instruct.sh": {
        "train.global_batch_size": 32,
        "train.loss_reduction": "sum",
        "train.max_grad_norm": 0.0,
        "data.train": [
            {"path": "allenai/tulu-3-sft-mixture", "split": "train"},
            {"path": "other/set", "samples": 5000, "split": "train"},
        ],
        "parallel.num_workers": 16,
    },
    "olmo_core.sh": {
        "train.global_batch_tokens": 2 * 2 * 4096,
        "train.learning_rate": 8e-5,
        "parallel.context_parallel_size": 2,
        "train.max_steps": 100,
    },
    "roll.yaml": {
        "train.global_batch_size": 32,
        "parallel.num_workers": 8,
        "parallel.context_parallel_size": 2,
        "data.overlong": "error",
        "data.chat_template": "qwen",
        "data.packing": True,
        "train.lr_scheduler_type": "linear",
        "train.warmup_ratio": 0.0,
        "train.recompute": "full",
        "tracking.backends": ["jsonl", "tensorboard"],
    },
    "verl.sh": {
        "train.global_batch_size": 96,
        "train.micro_batch_tokens": 8192,
        "data.overlong": "truncate",
        "train.weight_decay": 0.01,
        "train.lr_scheduler_type": "constant",
        "parallel.tensor_model_parallel_size": 2,
        "seed": 1,
    },
    "nemo.yaml": {
        "train.max_steps": 60,
        "train.learning_rate": 5e-6,
        "train.adam_beta2": 0.98,
        "train.adam_eps": 1e-5,
        "parallel.num_workers": 8,
        "data.prompt_key": "input",
        "tracking.backends": ["jsonl", "mlflow"],
    },
    "llama_factory.yaml": {
        "lora.rank": 8,
        "lora.alpha": 16,
        "lora.target_modules": ["all-linear"],
        "data.chat_template": "llama3",
        "data.prompt_key": "instruction",
        "train.num_train_epochs": 3,
        "train.recompute": "full",
    },
    "axolotl.yml": {
        "train.global_batch_tokens": 2 * 2 * 8 * 2048,
        "lora.target_modules": ["gate_proj", "down_proj"],
        "model.attention_backend": "flash",
    },
    "swift.sh": {
        "parallel.num_workers": 2,
        "train.weight_decay": 0.1,
        "train.min_learning_rate": 1e-6,
        "data.overlong": "drop",
        "data.train": [
            {"path": "AI-ModelScope/alpaca-gpt4-data-zh", "samples": 500},
            {"path": "swift/self-cognition", "samples": 500},
        ],
    },
    "skyrl.yaml": {"data.train_on": "assistant", "parallel.num_workers": 4, "train.max_steps": 50},
    "trlx.yaml": {
        "train.num_layers_unfrozen": 2,
        "train.lr_scheduler_type": "constant",
        "train.max_grad_norm": 0.0,
    },
}
GPUS = {"trl.yaml": 8, "openrlhf.sh": 8, "llama_factory.yaml": 4, "axolotl.yml": 8, "trlx.yaml": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all files, and the data set information of LLaMA-Factory."""
    for name, text in FILES.items():
        lines = text.strip("\n").splitlines()
        margin = len(lines[0]) - len(lines[0].lstrip())
        (tmp_path / name).write_text("\n".join(line[margin:] for line in lines) + "\n")
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    information = {
        "identity": {"file_name": "identity.json", "columns": columns},
        "alpaca_en_demo": {"hf_hub_url": "llamafactory/alpaca_en_demo"},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(information))
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_trainer_becomes_a_configuration_that_composes(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "ours" / "imported.yaml"
    words = [str(folder / name), "--output", str(output)]
    words += ["--gpus", str(GPUS[name])] if name in GPUS else []
    assert command.main(words) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    more = []
    if name == "trlx.yaml":  # whose data is given in Python
        assert "TO SET, before it runs:\n  data.train: empty" in told
        more = ["data.train=[{path: x.jsonl}]"]
    composed = run.compose(["--config-dir", str(output.parent), "--config-name", "imported", *more])
    assert composed is not None
    for key, value in EXPECTED[name].items():
        assert _at(composed[0], key) == value, key
    text = output.read_text()
    written = [line for line in text.splitlines() if line.startswith("  ") and "  #" not in line]
    sections = re.compile(r" +- \{.*| +\w+:")
    assert all(sections.fullmatch(line) or line.startswith("    - {") for line in written)
    assert "hf_secret" not in text + told


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_accounted_for(name: str, folder: Path) -> None:
    draft = command.imported(folder / name, gpus=GPUS.get(name))
    told = [origin for _, origin in draft.lines.values()]
    told += [*draft.unsupported, *draft.not_needed, *draft.notes, *draft.secrets, *draft.unknown]
    told += draft.used
    given = read_given(folder / name)
    sections = [each.removesuffix("*") for each in draft.not_needed if each.endswith(".*")]
    for key in given.values:
        is_told = any(key.rpartition(".")[2] in line for line in told)
        assert is_told or key.startswith(tuple(sections)), key
    if name != "trl.yaml":
        assert not draft.unknown


@pytest.mark.parametrize("name", FILES)
def test_the_gpus_of_the_command_line_win_over_those_of_the_file(name: str, folder: Path) -> None:
    draft = command.imported(folder / name, gpus=16)
    assert draft.lines["parallel.num_workers"] == (16, "--gpus")


def test_what_cannot_be_mapped_says_what_to_do(folder: Path) -> None:
    draft = command.imported(folder / "trl.yaml", gpus=8)
    assert draft.unknown == ["foo_bar: 3"]
    assert draft.secrets == ["hub_token"]
    assert "eos_token: <|im_end|>" in draft.unsupported
    draft = command.imported(folder / "axolotl.yml", gpus=8)
    assert {"val_set_size: 0.1", "optimizer: adamw_8bit"} <= set(draft.unsupported)


@pytest.mark.parametrize("name", FILES)
def test_both_plans_have_equal_steps(name: str, folder: Path) -> None:
    draft = command.imported(folder / name, gpus=GPUS.get(name))
    lines = list(comparison(draft, command.built(draft), 9600 * 2048, 512.0))
    cells = [line.split() for line in lines]
    (steps,) = ([each[-2], each[-1]] for each in cells if each[:4] == ["steps", "of", "the", "run"])
    assert steps[0] == steps[1]
    (tokens,) = ([each[-2], each[-1]] for each in cells if each[0] == "tokens")
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_the_rates_of_theirs_are_those_of_transformers(kind: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=10, num_training_steps=100)
    ours: Any = kind.removesuffix("_with_warmup")
    schedule = Schedule(ours, 1e-3, 0.0, warmup_steps=10, total_steps=100)
    for step in range(1, 101):
        assert _their_rate(schedule, step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"no valid YAML or JSON"),
        ("[1, 2]", r"holds no keys"),
        ("unheard: of", r"--from"),
        (
            "model_name_or_path: m\nlearning_rate: x\nper_device_train_batch_size: 1",
            "learning_rate: 'x'",
        ),
        ("model_name_or_path: m\ndataset_name: d\nper_device_train_batch_size: 1", r"--gpus"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        command.imported(tmp_path / "x.yaml")


def test_a_split_is_one_that_the_source_has(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "plain/rows.jsonl", "split/train.jsonl", "split/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    known = {
        "rows.jsonl": [{}],
        "plain": [{}],
        "split": [{"split": "train"}],
        "trl-lib/Capybara": [{"split": "train"}],
    }
    for path, wanted in known.items():
        place = path if "/" in path else tmp_path / path
        text = f"model_name_or_path: m\ndataset_name: {place}\neval_strategy: steps\n"
        (tmp_path / "x.yaml").write_text(f"{text}per_device_train_batch_size: 1")
        draft = command.imported(tmp_path / "x.yaml", gpus=1)
        assert draft.lines["data.train"][0] == [{"path": str(place)} | each for each in wanted]
        is_told = f"split of {place}: test" in draft.unsupported
        assert is_told == (draft.lines["data.validation"][0] == []) == (wanted == [{}])
        if place != path:  # of no hub
            assert find_files(str(place), **wanted[0])


def test_the_first_rows_of_a_split_become_a_number_of_samples(tmp_path: Path) -> None:
    text = "base_model: m\nlearning_rate: 1e-5\ndatasets:\n"
    text += "- {path: a/b, split: 'train[:20%]'}\n- {path: a/c, split: 'test[:500]'}\n"
    (tmp_path / "x.yaml").write_text(text)
    draft = command.imported(tmp_path / "x.yaml", gpus=1)
    share, count = draft.lines["data.train"][0]
    assert share == {"path": "a/b", "split": "train", "weight": 0.2}
    assert count == {"path": "a/c", "split": "test", "samples": 500}


def test_variables_of_a_script_may_hold_others(tmp_path: Path) -> None:
    lines = ["NAME=${NAME:-a/b}", "MODEL=${MODEL:-${HOME}/models/${NAME}}", "ROWS=~/rows.parquet"]
    lines += ["torchrun -m verl.trainer.sft_trainer model.path=$MODEL data.train_files=$ROWS \\"]
    lines += ["trainer.default_local_dir=$OUTSIDE/${ELSE}"]
    (tmp_path / "x.sh").write_text("\n".join(lines))
    values = read_given(tmp_path / "x.sh").values
    assert values["model.path"] == f"{Path.home()}/models/a/b"
    assert values["data.train_files"] == f"{Path.home()}/rows.parquet"
    assert values["trainer.default_local_dir"] == "$OUTSIDE/$ELSE"


def test_an_output_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "there.yaml").write_text("mine")
    words = [str(folder / "roll.yaml"), "--output", str(folder / "there.yaml")]
    assert command.main(words) == ConfigError.exit_code
    assert "there.yaml" in capsys.readouterr().err.splitlines()[-1]
    assert (folder / "there.yaml").read_text() == "mine"


def test_values_come_back_from_yaml_as_they_were(folder: Path) -> None:
    draft = Draft("TRL")
    draft.set("train.learning_rate", 1e-5, "x")
    draft.set("train.adam_eps", 1e-08, "x")
    draft.set("model.path", "1e5", "x")
    from roll_sft.migrate.pages import as_yaml

    values = yaml.safe_load(as_yaml(draft, Path("f")))
    assert values["train"] == {"learning_rate": 1e-5, "adam_eps": 1e-8}
    assert values["model"] == {"path": "1e5"}


def _at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    if key == "data.train":
        default = {"name": None, "split": None, "weight": 1.0, "samples": None}
        return [
            {k: v for k, v in _fields(each).items() if k == "path" or v != default.get(k)}
            for each in value
        ]
    return value


def _fields(source: Any) -> dict[str, Any]:
    return {name: getattr(source, name) for name in ("path", "name", "split", "weight", "samples")}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("$PATH:/c", "/b:$PATH:/c"),
        ("${PATH}:/c", "/b:$PATH:/c"),
        ("${NONE:-$PATH}", "/b:$PATH"),
        ("${NONE:-${MORE:-${PATH}}}", "/b:$PATH"),
        ("${NONE:-x${MORE:-y}}$MORE", "xy$MORE"),
    ],
)
def test_what_a_variable_of_a_script_holds_is_not_expanded_again(text: str, wanted: str) -> None:
    assert _expanded(text, {"PATH": "/b:$PATH"}) == wanted
