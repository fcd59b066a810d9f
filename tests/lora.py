"""The same run with peft on transformers, beside our engine with adapters."""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from roll_sft.config.schema import RunConfig
from roll_sft.engine.adapters.lora_dropout import TokenDropout, token_keys
from roll_sft.job.job import Job
from tests import parity

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Of vLLM: the linear layers of a dense decoder, by the names before it fuses them, those that the
# model itself fuses (its Phi-3 and GLM-4), and the ranks that `--max-lora-rank` may be.
VLLM_MODULES = {*ATTENTION, "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_adapter(model: Path, folder: Path, *, zero: bool = False, **options: Any) -> Path:
    """An adapter of the model folder as peft makes it, with B away from zero unless `zero`."""
    torch.manual_seed(11)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name and not zero:
                parameter.normal_(0, 0.05)
    adapted.save_pretrained(folder)
    return folder


def check_vllm_loads(folder: Path) -> None:
    """What vLLM asks of an adapter's folder before it loads it.

    https://github.com/vllm-project/vllm/tree/main/vllm/lora: fields in `peft_helper.py`, names of
    tensors in `utils.py` and `lora_model.py`.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["modules_to_save"], "vLLM has no modules_to_save"
    assert config["r"] <= VLLM_RANKS[-1]
    halves: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name)
        assert parts is not None, name
        module, half = parts.groups()
        assert module.rpartition(".")[2] in VLLM_MODULES, name
        halves.setdefault(module, {})[half] = tensor.shape
    for module, shapes in halves.items():
        assert shapes["lora_A"][0] == shapes["lora_B"][1] == config["r"], module


def lora_config(home: Path, adapter: Path | None, **sections: dict[str, Any]) -> RunConfig:
    """`parity_config` of 10 steps with the adapter in `adapter`.

    Adam divides by the root of a gradient's square and `adam_eps`. The rounding of a gradient is
    about 5e-9 here, and some true gradients are 5e-10: with an `adam_eps` of 1e-8 rounding alone
    would decide half of such a number's first update, in peft as in the engine.
    """
    lora = {"rank": 4, "alpha": 8, **sections.pop("lora", {})}
    if adapter is not None:
        lora["adapter_path"] = str(adapter)
    train = {"max_steps": 10, "adam_eps": 1e-6, **sections.pop("train", {})}
    return parity.parity_config(home, lora=lora, train=train, **sections)


def reference_run(
    job: Job, adapter: Path, **options: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], torch.Tensor]:
    """(loss and gradient norm of each step, adapter tensors by PEFT's names, logits) of peft.

    Where `job` drops inputs, peft drops those that the engine does.
    `options` are of the base's `from_pretrained`.
    """
    path, train = job.config.model.path, job.config.train
    base = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        weight_decay=train.weight_decay,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
    )
    with sample_dropout(model, job.config) as begin:
        steps = parity.reference_steps(job, model, optimizer, before=begin)
    return steps, peft_tensors(model), parity.model_logits(model)


def reference_beside_nf4(
    job: Job, adapter: Path, *, device: str
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], torch.Tensor]:
    """`reference_run` on a base that bitsandbytes quantises on `device`."""
    # On a CPU with AVX512_BF16 its layers would compute in bf16 once they evaluate.
    with patch("bitsandbytes.nn.modules.has_avx512bf16", return_value=False):
        return reference_run(
            job, adapter, quantization_config=NF4, device_map=device, dtype=torch.float32
        )


@contextlib.contextmanager
def sample_dropout(model: PeftModel, config: RunConfig) -> Iterator[Callable[[int, int], None]]:
    """In the block, peft drops what the engine does; yields what to call with step and sample."""
    dropout = TokenDropout(config.lora.dropout, seed=config.seed, is_compiled=False)
    samples = []

    def begin(step: int, sample: int) -> None:
        dropout.begin_step(step)
        samples.append(sample)

    def dropped(name: str, _module: Any, _inputs: Any, states: torch.Tensor) -> torch.Tensor:
        # One sample, whose first token is at position 0.
        positions = torch.arange(states.shape[1], dtype=torch.int32)
        dropout.keys = token_keys(torch.tensor(samples[-1], dtype=torch.int32), positions)
        return dropout(states[0], module=name, first_column=0)[None]

    hooks = [
        layer.lora_dropout["default"].register_forward_hook(
            functools.partial(dropped, name.removeprefix("base_model.model."))
        )
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and config.lora.dropout
    ]
    yield begin
    for hook in hooks:
        hook.remove()


def peft_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """What peft would save, by its names."""
    from peft import get_peft_model_state_dict

    return {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
