"""Adapters on our engine against peft on transformers, step by step, at every layout."""

import importlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from roll_sft.checkpoint.manifest import read_manifest
from roll_sft.checkpoint.reader import Reader
from roll_sft.config.schema import layout_of
from roll_sft.convert.merge_lora import merge
from roll_sft.convert.to_hf import export
from roll_sft.engine.adapters.lora_dropout import TokenDropout, token_keys
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.engine.test_parity import LAYOUTS
from tests.pool import RankPool

peft = pytest.importorskip("peft")
lora = importlib.import_module("tests.lora")  # which imports peft

pytestmark = pytest.mark.slow

LOSS_TOLERANCE, NORM_TOLERANCE, LOGIT_TOLERANCE = 1e-6, 5e-5, 2e-5
ADAPTER_TOLERANCE, MERGED_TOLERANCE = 1e-5, 1e-5
TP2XPP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "num_workers": 4}
TP2XCP2 = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "num_workers": 4}
ALL_LAYOUTS = {**LAYOUTS, "TP2xPP2": TP2XPP2, "TP2xCP2": TP2XCP2}
EP2 = {"num_workers": 2, "expert_model_parallel_size": 2}
OF_EXPERTS = {
    "EP2": EP2,
    "TP2xEP2+SP": {**LAYOUTS["TP2+SP"], **EP2},
    "EP2xPP2": {**EP2, "num_workers": 4, "pipeline_model_parallel_size": 2},
}
KINDS = ("qwen2-tied", "qwen3", "llama", "qwen2-one_kv_head")
# What the adapters are; of peft's names alpha and targets differ from ours.
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4, "alpha": 8},
    "all-16": {"rank": 16, "alpha": 16, "use_rslora": True},
    "attention": {"rank": 16, "alpha": 32, "target_modules": lora.ATTENTION},
    "dense": {
        "rank": 4,
        "alpha": 8,
        "target_modules": [*lora.ATTENTION, "gate_proj", "up_proj", "down_proj"],
    },
    "some": {"rank": 4, "alpha": 2, "target_modules": ["v_proj", "q_proj", "up_proj"]},
}
FOR_ALL = tuple(name for name in ADAPTERS if name != "dense")


@dataclass(frozen=True)
class Case:
    kind: str
    adapter: str
    layout: str
    packing: bool
    recompute: str = field(default="none", kw_only=True)  # or modules, joined by "+"
    dropout: float = field(default=0.0, kw_only=True)
    overlaps: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        packing = "packed" if self.packing else "single"
        more = "-dropout" * bool(self.dropout) + "-overlap" * self.overlaps
        return f"{self.kind}-{self.adapter}-{self.layout}-{packing}-{self.recompute}{more}"

    @property
    def lora(self) -> dict[str, Any]:
        """The section of the adapters."""
        return {**ADAPTERS[self.adapter], "dropout": self.dropout}

    def sections(self) -> dict[str, dict[str, Any]]:
        """What the case sets of a run, beside its adapters."""
        modules = self.recompute.split("+")
        overlap = {"overlap_param_gather": True} if self.overlaps else {}
        return {
            "parallel": {**(ALL_LAYOUTS | OF_EXPERTS)[self.layout], **overlap},
            "data": {"packing": self.packing},
            "train": {"recompute": modules if len(modules) > 1 else self.recompute},
        }


# Full recomputation, and more tensor ranks than key heads, which share a group's rows.
MORE = [
    Case("llama", "attention", "TP2xPP2x2+SP", packing=True, recompute="full"),
    Case("qwen2-one_kv_head", "some", "TP2xPP2+SP", packing=True),
]
PARTS = "core_attn+mlp+layernorm"
# Of families that are no plain decoders; a projection that the source fuses has one adapter.
MORE += [
    Case("phi3_partial", "all-16", "TP2xPP2+SP", packing=False, dropout=0.2),
    Case("gemma3", "all", "TP2xCP2+SP", packing=True, recompute=PARTS),
    Case("glm4", "all", "PP2x2", packing=True, recompute="full"),
    Case("granite", "attention", "TP2+SP", packing=True),
]
# Beside experts: adapters of attention and of shared experts. PEFT's own `all-linear` would adapt
# routed experts too.
MORE += [
    *(Case("qwen2moe", "dense", layout, packing=True) for layout in ("1", "EP2", "PP2")),
    *(
        Case("qwen3moe", "attention", layout, packing=True)
        for layout in ("1", "EP2", "TP2+SP", "PP2")
    ),
    Case("glm4moe", "attention", "EP2xPP2", packing=False),
    Case("glm4moe", "attention", "TP2xEP2+SP", packing=True, recompute=PARTS, dropout=0.2),
    Case("qwen2moe", "dense", "TP2xEP2+SP", packing=True, recompute="full"),
]
# Every kind at every layout, with two of the adapters; packing takes turns. In the second turn of
# each kind something else is on, too; with dropout a pipeline recomputes no MLP alone.
TURNS: tuple[dict[str, Any], ...] = (
    {"overlaps": True},
    {"recompute": PARTS, "overlaps": True},
    {"dropout": 0.2, "recompute": "full"},
    {"dropout": 0.2, "overlaps": True},
)
ALL = [
    Case(
        kind,
        [*FOR_ALL][(row + column + turn) % 4],
        layout,
        packing=(row // 2 + turn) % 2 == 0,
        **(TURNS[(row + column) % 4] if turn else {}),
    )
    for row, layout in enumerate(ALL_LAYOUTS)
    for column, kind in enumerate(KINDS)
    for turn in (0, 2 if row % 2 else 1)
]
SUBSET = [
    Case("qwen2-tied", "all", "PP2x2", packing=True),
    Case("qwen3", "all-16", "TP2xCP2+SP", packing=True),
    Case("llama", "some", "TP2+SP", packing=False, recompute=PARTS),
    Case("qwen3", "all", "TP2xCP2+SP", packing=True, recompute="full", dropout=0.2, overlaps=True),
    Case("phi3_partial", "all", "TP2+SP", packing=True),
    Case("qwen2moe", "dense", "TP2+SP", packing=True),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_full = metafunc.config.getoption("--all-layouts")
    if "case" in metafunc.fixturenames:
        cases = [*SUBSET, *MORE, *ALL] if is_full else SUBSET
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    parity.write_rows(root / "rows.jsonl")
    return root


@cache
def adapter_of(home: Path, name: str) -> Path:
    options = dict(ADAPTERS[name])
    targets = options.pop("target_modules", "all-linear")
    rank, alpha = options.pop("rank"), options.pop("alpha")
    return lora.write_adapter(
        home / "model", home / name, r=rank, lora_alpha=alpha, target_modules=targets, **options
    )


@cache
def reference(
    home: Path, name: str, dropout: float
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], torch.Tensor]:
    adapter = adapter_of(home, name)
    options = {**ADAPTERS[name], "dropout": dropout}
    job = prepare_job(lora.lora_config(home, adapter, lora=options))
    return lora.reference_run(job, adapter)


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference between tensors of the same names."""
    return max(float((found[name] - value).abs().max()) for name, value in wanted.items())


def test_every_step_and_the_exported_adapter_equal_peft(
    case: Case, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    home = parity.home_of(folder, case.kind)
    adapter = adapter_of(home, case.adapter)
    config = lora.lora_config(home, adapter, lora=case.lora, **case.sections())
    wanted, tensors, logits = reference(home, case.adapter, case.dropout)
    staging = tmp_path / "checkpoints" / ".staging_00000010"
    staging.mkdir(parents=True)
    ranks = pool.run(parity.engine_run, layout_of(config.parallel), config, staging)
    (steps,) = [rank for rank in ranks if rank is not None]
    step = parity.published(prepare_job(config), staging, 10)
    export(step, tmp_path / "adapter", dtype=None, replace=False)
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert exported.keys() == tensors.keys()
    lora.check_vllm_loads(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(home / "model", attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    found = parity.model_logits(loaded)
    errors = {
        "loss": parity.worst(steps, wanted, "loss"),
        "grad_norm": parity.worst(steps, wanted, "grad_norm"),
        "adapter": apart(exported, tensors),
        "logits": float((found - logits).abs().max() / logits.abs().max()),
    }
    print(f"lora {case.name}", {name: f"{value:.1e}" for name, value in errors.items()})
    has_experts = case.kind in parity.EXPERTS
    assert errors["loss"] < LOSS_TOLERANCE * (1 + has_experts)  # with the auxiliary loss
    assert errors["grad_norm"] < NORM_TOLERANCE
    assert errors["adapter"] < ADAPTER_TOLERANCE
    assert errors["logits"] < LOGIT_TOLERANCE
    merge(step, home / "model", tmp_path / "merged")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    unmerged = (parity.model_logits(ours) - found).abs().max() / found.abs().max()
    assert unmerged < MERGED_TOLERANCE
    theirs = loaded.merge_and_unload().state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


def test_dropout_sets_its_share_of_inputs_to_zero_and_changes_by_all_that_it_depends_on() -> None:
    keys = token_keys(torch.tensor(3, dtype=torch.int32), torch.arange(500, dtype=torch.int32))

    def kept(seed: int, step: int, module: str, keys: torch.Tensor) -> torch.Tensor:
        dropout = TokenDropout(0.2, seed=seed, is_compiled=False)
        dropout.begin_step(step)
        dropout.keys = keys
        found = dropout(torch.ones(500, 200), module=module, first_column=0)
        assert set(found.unique().tolist()) == {0.0, 1.25}
        return found > 0

    first = kept(0, 1, "q_proj", keys)
    assert float(first.float().mean()) == pytest.approx(0.8, abs=0.005)
    for axis in (0, 1):  # of a column, and of a token
        assert float(first.float().mean(axis).std()) < 0.04
    other_sample = token_keys(torch.tensor(4, dtype=torch.int32), torch.arange(500).int())
    for changed in (
        kept(1, 1, "q_proj", keys),
        kept(0, 2, "q_proj", keys),
        kept(0, 1, "k_proj", keys),
        kept(0, 1, "q_proj", other_sample),
    ):  # independent: 0.8 * 0.8 + 0.2 * 0.2
        assert float((first == changed).float().mean()) == pytest.approx(0.68, abs=0.01)


def test_a_run_goes_on_on_other_layouts_from_megabytes(
    folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    """Both ends of modules_to_save are trained too, on padded vocabularies."""
    home = parity.home_of(folder, "qwen3")
    options = {"dropout": 0.1, "modules_to_save": ["embed_tokens", "lm_head"]}
    wanted, checkpoint = None, None
    steps: list[dict[str, float]] = []
    for last, layout in ((10, "1"), (3, "TP2+SP"), (6, "PP2"), (8, "CP2"), (10, "DP2")):
        config = lora.lora_config(home, None, lora=options, parallel=LAYOUTS[layout])
        staging = tmp_path / layout / f".staging_{last:08d}"
        staging.mkdir(parents=True)
        loads = None if wanted is None else checkpoint
        ranks = pool.run(
            parity.engine_run, layout_of(config.parallel), config, staging, loads, last
        )
        (found,) = filter(None, ranks)
        if wanted is None:
            wanted = found
            continue
        steps += found
        checkpoint = parity.published(prepare_job(config), staging, last)
    assert wanted is not None
    assert parity.worst(steps, wanted, "loss") < LOSS_TOLERANCE
    assert parity.worst(steps, wanted, "grad_norm") < NORM_TOLERANCE
    assert checkpoint is not None
    check_content(checkpoint, wanted=prepare_job(config).state.facts)


def check_content(checkpoint: Path, *, wanted: dict[str, Any]) -> None:
    """Adapters, what is saved beside them and their moments, and nothing of the base."""
    manifest = read_manifest(checkpoint)
    assert manifest.state.facts["lora"] == wanted["lora"]
    reader = Reader(checkpoint)
    embedding = reader.read("base_model.model.model.embed_tokens.weight")
    assert embedding.shape == (403, 64)
    shards = sum(file.size for name, file in manifest.files.items() if name.endswith(".distcp"))
    num_trained = 2 * 403 * 64 + 4 * 4 * ((64 + 96) + 2 * (64 + 48) + (96 + 64) + 3 * 224)
    assert shards < 1.6 * 12 * num_trained  # weights and moments, and torch.save's records
