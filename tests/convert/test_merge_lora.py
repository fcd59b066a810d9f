"""Adapter folders of PEFT's: merged into their base, refused beside another, started from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from roll_sft.base.errors import ConfigError
from roll_sft.checkpoint.fingerprint import changes
from roll_sft.config.lora import LoraConfig
from roll_sft.convert.merge_lora import main, merge
from roll_sft.job.lora import base_shape, check_lora, fingerprint, lora_facts
from roll_sft.models.adapters import nf4
from roll_sft.models.adapters.peft_folder import BASE, config_of
from roll_sft.models.source import ModelSource
from tests import parity
from tests.convert.test_export import STATE

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.write_model(tmp_path_factory.mktemp("base") / "model", num_layers=2)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """Of all projections, with a head that is trained too."""
    from tests import lora

    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    return lora.write_adapter(
        base, base.parent / "adapter", use_rslora=True, modules_to_save=["lm_head"], **options
    )


def of_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT merges."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def test_a_merged_model_is_pefts_byte_for_byte(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert merge(adapter, base, tmp_path / "merged") == "dtype fp32, the base's"
    ours, theirs = load_file(tmp_path / "merged" / "model.safetensors"), of_peft(base, adapter)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names


def test_a_bf16_base_is_rounded_once_and_what_is_lost_is_said(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    half = tmp_path / "base"
    shutil.copytree(base, half)
    tensors = load_file(base / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, half / "model.safetensors")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    told = merge(adapter, half, tmp_path / "merged")
    assert told.startswith("dtype bf16, the base's; rounding changes what the adapter adds by ")
    ours, theirs = load_file(tmp_path / "merged" / "model.safetensors"), of_peft(half, adapter)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name].bfloat16()), name


def test_the_command_says_where_the_model_is(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    arguments = ["--adapter", str(adapter), "--base", str(base), "--output", str(output)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == ["dtype fp32, the base's", str(output)]
    assert main(arguments) == 6
    assert "not empty" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused_by_its_tensors(
    adapter: Path, tmp_path: Path
) -> None:
    deeper = parity.write_model(tmp_path / "model", num_layers=3)
    with pytest.raises(ConfigError, match=r"--adapter: .* lacks 14 tensors .*layers\.2\."):
        merge(adapter, deeper, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_of_other_weights_is_refused_by_its_fingerprint(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    ours = tmp_path / "adapter"
    shutil.copytree(adapter, ours)
    (ours / BASE).write_text(json.dumps({"fingerprint": fingerprint(base)}))
    merge(ours, base, tmp_path / "merged")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(base / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in tensors.items()}, other / "model.safetensors")
    with pytest.raises(ConfigError, match=fingerprint(base)):
        merge(ours, other, tmp_path / "again")


def test_a_folder_that_is_no_model_or_no_adapter_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--base: .*config\.json"):
        merge(adapter, adapter, tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"--adapter: .*adapter_config\.json"):
        merge(base, base, tmp_path / "merged")


def test_merging_into_a_base_in_nf4_is_asked_for(base: Path, adapter: Path, tmp_path: Path) -> None:
    ours, output = tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(adapter, ours)
    known = {"fingerprint": fingerprint(base)}
    for content, dequantize, named in (
        ({**known, "quantized_from": "fp32"}, False, r"--adapter: .* NF4.* --dequantize merges"),
        ({**known, "quantized_from": "int3"}, True, r"quantized_from 'int3' is not one of"),
        (known, True, r"--dequantize: .* not quantised; leave it out"),
    ):
        (ours / BASE).write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=named):
            merge(ours, base, output, dequantize=dequantize)
    with pytest.raises(ConfigError, match=r"lora\.quantize_base: nf4 .* down_proj has 160 inputs"):
        merge(adapter, base, output, dequantize=True)
    assert not output.exists()


def test_a_base_in_nf4_needs_its_library(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    config = lora_config(base, rank=4, quantize_base="nf4")
    with pytest.raises(ConfigError, match=r"lora\.quantize_base: nf4 .* pip install 'bitsandbytes"):
        check_lora(config, *base_shape(base))


def lora_config(base: Path, **lora: Any) -> Any:
    return parity.parity_config(base.parent, lora=lora, model={"path": str(base)})


def test_an_adapter_to_start_from_must_be_what_the_configuration_says(
    base: Path, adapter: Path
) -> None:
    model = base_shape(base)
    given = {"adapter_path": str(adapter), "rank": 4, "alpha": 6, "use_rslora": True}
    saved = {"modules_to_save": ["lm_head"]}
    check_lora(lora_config(base, **given, **saved), *model)
    with pytest.raises(ConfigError, match=r"lora\.rank: 8, .* has 4; set lora\.rank=4"):
        check_lora(lora_config(base, **{**given, **saved, "rank": 8}), *model)
    with pytest.raises(ConfigError, match=r"lora\.modules_to_save: \[\], .* has \['lm_head'\]"):
        check_lora(lora_config(base, **given), *model)
    fewer = {**given, **saved, "target_modules": ["q_proj"]}
    with pytest.raises(ConfigError, match=r"lora\.adapter_path: .* has besides 24 tensors"):
        check_lora(lora_config(base, **fewer), *model)


def test_a_run_resumes_with_the_same_adapters_of_the_same_base_alone(base: Path) -> None:
    source = ModelSource(base_shape(base)[1], folder=str(base))
    facts = lora_facts(lora_config(base, rank=4), source)
    current, plain = replace(STATE, facts={"lora": facts}), replace(STATE, facts={})
    elsewhere = {**facts, "base_path": "elsewhere"}
    del elsewhere["quantize_base"]  # as checkpoints of before that key
    assert changes(current, replace(STATE, facts={"lora": elsewhere})) == {}
    for stored, named in (
        ({**facts, "base_model": "0123456789abcdef"}, r"model\.path: .*0123456789abcdef"),
        ({**facts, "rank": 8}, r"lora\.rank: 4, .* has 8"),
        ({**facts, "target_modules": ["q_proj"]}, r"lora\.target_modules: .* has \['q_proj'\]"),
        ({**facts, "quantize_base": "nf4"}, r"lora\.quantize_base: none, .* has nf4"),
    ):
        with pytest.raises(ConfigError, match=named):
            changes(current, replace(STATE, facts={"lora": stored}))
    with pytest.raises(ConfigError, match=r"lora\.rank: 4, .* a whole model"):
        changes(current, plain)
    with pytest.raises(ConfigError, match=r"lora\.rank: 0, .* of rank 4; set lora\.rank=4"):
        changes(plain, current)


def test_the_configuration_has_every_field_of_peft(tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, init="gaussian", modules_to_save=["lm_head"])
    ours = config_of(lora, targets=["q_proj"], base="org/model")
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        init_lora_weights="gaussian",
        modules_to_save=["lm_head"],
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        base_model_name_or_path="org/model",
        inference_mode=True,
    )
    theirs.save_pretrained(tmp_path)
    assert ours == json.loads((tmp_path / "adapter_config.json").read_text())
