"""Keys, types and values of a configuration: what is refused, in which words, all at once."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import roll_sft.run
from roll_sft.base.errors import ConfigError
from roll_sft.config.build import RESERVED, build_config
from roll_sft.config.composed import resolved, schema
from roll_sft.config.fields import all_keys, all_names
from roll_sft.config.layout_checks import layout_problems
from roll_sft.config.reference import page
from roll_sft.config.schema import (
    ParallelConfig,
    RunConfig,
    SourceConfig,
    layout_of,
    on_device,
    source_name,
)
from roll_sft.config.validate import check_config
from tests import doors
from tests.doors import Door

door = doors.door
CONF = Path(__file__).parents[2] / "conf"

# The public keys, as documented: "" is the top.
KEYS = {
    "": "output_dir run_name seed dry_run prepare_only deterministic resume",
    "model.": "path tokenizer_path dtype random_init trust_remote_code attention_backend compile",
    "data.": "train validation prompt_key query_key response_key system_key messages_key text_key"
    " tools_key chat_template template_kwargs sequence_length overlong train_on packing num_proc"
    " cache_dir on_bad_row max_bad_fraction shuffle",
    "data.train.": "path name split weight samples",
    "data.validation.": "path name split weight samples",
    "parallel.": "num_workers tensor_model_parallel_size pipeline_model_parallel_size"
    " virtual_pipeline_model_parallel_size context_parallel_size"
    " expert_model_parallel_size sequence_parallel use_distributed_optimizer"
    " overlap_grad_reduce overlap_param_gather device"
    " cpus_per_worker placement_timeout_s",
    "train.": "num_train_epochs max_steps global_batch_size global_batch_tokens micro_batch_tokens"
    " learning_rate min_learning_rate lr_scheduler_type warmup_ratio warmup_steps wsd_decay_ratio"
    " weight_decay adam_beta1 adam_beta2 adam_eps max_grad_norm recompute eval_steps save_steps"
    " max_duration on_nan spike_sigma on_spike max_skipped_steps"
    " save_minutes logging_steps log_samples polynomial_power cosine_cycles inverse_sqrt_timescale"
    " freeze num_layers_unfrozen learning_rate_factors weight_decay_exclude loss loss_reduction"
    " label_smoothing z_loss_coef neftune_noise_alpha early_stopping early_stopping_patience"
    " early_stopping_min_delta",
    "lora.": "rank alpha dropout target_modules use_rslora modules_to_save init adapter_path"
    " quantize_base",
    "moe.": "aux_loss_coef z_loss_coef router_bias_update_rate",
    "evaluation.": "prompts metric_fn metric_modules max_new_tokens temperature top_p top_k"
    " deadline_s",
    "evaluation.prompts.": "path name split samples",
    "checkpoint.": "save async_save keep_last keep_best verify allow_changes save_optimizer"
    " hf_export",
    "export.": "push_to_hub",
    "export.push_to_hub.": "repo_id private revision what",
    "tracking.": "backends mlflow_uri experiment",
    "cluster.": "address prepare_timeout_s setup_timeout_s step_timeout_s checkpoint_timeout_s"
    " max_restarts elastic grace_s straggler_factor",
    "debug.": "faults",
    "debug.faults.": "kind where step rank",
}
ENTRIES = ("data.train", "data.validation", "evaluation.prompts", "debug.faults")  # of lists
SECTIONS = [section.removesuffix(".") for section in KEYS if section.count(".") == 1]


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composing sets a variable of Hydra's."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", ""))


def given(overrides: dict[str, Any]) -> dict[str, Any]:
    """A minimal configuration with values at dotted keys over it."""
    minimal = {"model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}
    node = OmegaConf.create(minimal)
    for key, value in overrides.items():
        OmegaConf.update(node, key, value, merge=False, force_add=True)
    plain: Any = OmegaConf.to_container(node)
    return plain


def built(composed: Any) -> RunConfig:
    """The configuration of what Hydra composes, or of plain values like it."""
    return build_config(resolved(OmegaConf.create(composed)))


def problems(overrides: dict[str, Any]) -> list[str]:
    """The lines of what is refused."""
    with pytest.raises(ConfigError) as refused:
        check_config(built(given(overrides)))
    return str(refused.value).splitlines()


def leaves(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(item.type):
            yield from leaves(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{item.name}", item


# Keys


def test_the_documented_keys_are_the_keys() -> None:
    documented = {f"{section}{name}" for section, names in KEYS.items() for name in names.split()}
    assert set(all_names(RunConfig)) == documented | set(SECTIONS)


def test_every_key_has_one_default_and_base_adds_none() -> None:
    for key, item in leaves():
        assert {item.default, item.default_factory} != {dataclasses.MISSING}, key
    text = OmegaConf.load(CONF / "base.yaml")
    assert set(text) == {"defaults", "hydra"}
    composed = composition("base", [])
    assert OmegaConf.to_container(composed) == dataclasses.asdict(RunConfig())


def test_the_defaults_build_and_cannot_be_changed() -> None:
    config = build_config({})
    assert config == RunConfig() == built(schema())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.max_steps = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("typo", "real"),
    [
        ("typo", "model.dtype"),
        ("outputdir", "output_dir"),
        ("run_nam", "run_name"),
        ("prepare", "prepare_only"),
        ("learning_rate", "train.learning_rate"),
        ("modle", "model"),
        ("trainn", "train"),
        ("train.epochs", "train.num_train_epochs"),
        ("model.pth", "model.path"),
        ("model.tokeniser_path", "model.tokenizer_path"),
        ("data.trian", "data.train"),
        ("data.seq_len", "data.sequence_length"),
        ("data.max_bad_fractoin", "data.max_bad_fraction"),
        ("data.train[0].pth", "data.train[0].path"),
        ("data.train[0].wieght", "data.train[0].weight"),
        ("data.validation[1].nme", "data.validation[1].name"),
        ("parallel.tp", "parallel.tensor_model_parallel_size"),
        ("parallel.tensor_parallel_size", "parallel.tensor_model_parallel_size"),
        ("parallel.world_size", "parallel.num_workers"),
        ("train.lr", "train.learning_rate"),
        ("train.max_step", "train.max_steps"),
        ("train.batch_size", "train.global_batch_size"),
        ("checkpoint.save_optimiser", "checkpoint.save_optimizer"),
        ("checkpoint.save_steps", "train.save_steps"),
        ("model.sequence_length", "data.sequence_length"),
        ("tracking.backend", "tracking.backends"),
        ("cluster.adress", "cluster.address"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_real_one(typo: str, real: str) -> None:
    values = {"data.validation": [{"path": "b"}, {"path": "c"}], typo: 1}
    assert problems(values) == [f"{typo}: no such key; did you mean `{real}`?"]


@pytest.mark.parametrize("key", ["zzz", "checkpoint.zzz", "data.train[0].zzz"])
def test_an_unknown_key_like_no_other_is_refused_with_where_to_look(key: str) -> None:
    assert problems({key: 1}) == [f"{key}: no such key; `--help` explains every key"]


# What is said of them


def test_the_page_of_all_keys_is_up_to_date() -> None:
    text = (CONF.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == page(), "stale: run `make docs-reference`"


@pytest.mark.parametrize("width", [80, 120])
def test_help_explains_every_key_within_the_width(
    door: Door, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    outcome = door("--help")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert max(map(len, outcome.stdout.splitlines())) <= width
    text = " ".join(outcome.stdout.split())
    for each in all_keys(RunConfig):
        if each.name.rpartition(".")[0] not in ENTRIES:
            assert f" {each.name}=" in text
        assert each.sentence in text
        assert ", ".join(each.choices) in text


# Types


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("seed", None, "null is not an integer"),
        ("train.max_steps", "abc", "'abc' is not an integer or null"),
        ("train.max_steps", 1.5, "1.5 is not an integer or null"),
        ("train.max_steps", True, "true is not an integer or null"),
        ("train.learning_rate", "1e-5x", "'1e-5x' is not a number"),
        ("train.learning_rate", [1e-5], "[1e-05] is not a number"),
        ("data.packing", "sometimes", "'sometimes' is not true or false"),
        ("data.packing", 4096, "4096 is not true or false"),
        ("model.path", ["m"], "['m'] is not text or null"),
        ("model.path", "???", "'???' is not text or null"),
        ("model", "m", "'m' is not a mapping; its keys are path, tokenizer_path, dtype,"),
        ("tracking", None, "null is not a mapping; its keys are backends, mlflow_uri,"),
        ("data.train", "a.jsonl", "'a.jsonl' is not a list such as [{path: my.jsonl}]"),
        ("data.train", {"path": "a"}, "{'path': 'a'} is not a list such as [{path: my.jsonl}]"),
        ("data.train", None, "null is not a list such as [{path: my.jsonl}]"),
        ("data.train[0]", "a.jsonl", "'a.jsonl' is not a mapping; its keys are path, name,"),
        ("data.train[0].weight", "much", "'much' is not a number"),
        ("checkpoint.allow_changes", "data", "'data' is not a list of one of data, tokenizer,"),
        ("tracking.backends", "jsonl", "'jsonl' is not a list of one of jsonl, mlflow"),
        ("tracking.backends", [["jsonl"]], "[['jsonl']] is not a list of one of jsonl, mlflow"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_right_one(
    key: str, value: object, wanted: str
) -> None:
    (problem,) = problems({key: value})
    assert problem.startswith(f"{key}: {wanted}")


def test_what_a_command_line_writes_as_text_is_read_as_its_type() -> None:
    config = built(
        given({"train.max_steps": "7", "train.learning_rate": "1e-3", "data.packing": "no"})
    )
    assert (config.train.max_steps, config.train.learning_rate) == (7, 1e-3)
    assert config.data.packing is False
    assert built(given({"run_name": 7})).run_name == "7"


def test_unknown_keys_and_wrong_types_are_listed_at_once() -> None:
    wrong = {"data.train[0].pth": "x", "data.train[0].weight": "x", "seed": "x", "trian": {"a": 1}}
    found = problems(wrong)
    assert {problem.partition(":")[0] for problem in found} == set(wrong)


# Interpolation


def test_a_value_may_refer_to_another() -> None:
    values = {"output_dir": "/runs/${run_name}", "run_name": "first"}
    assert built(given(values)).output_dir == "/runs/first"
    assert built(given({"output_dir": "/runs/${run_name}"})).output_dir == "/runs/sft"
    assert built(given({"train.warmup_steps": "${seed}"})).train.warmup_steps == 42


@pytest.mark.parametrize(
    "reference", ["${nope}", "${run_name}", "${oc.env:NO_SUCH_VARIABLE}", "${now}", "${no:1}"]
)
def test_a_reference_that_leads_nowhere_is_refused(reference: str) -> None:
    (problem,) = problems({"run_name": reference})
    assert problem.startswith("run_name: ")
    assert problem.endswith("; mend the reference or write the value")


def test_the_text_that_is_kept_has_references_and_no_values_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKER", "sqlite:///secret")
    arguments = ["model.path=m", "data.train=[{path: a}]", "output_dir=/runs/${run_name}"]
    result = roll_sft.run.compose([*arguments, "tracking.mlflow_uri=${oc.env:TRACKER}"])
    assert result is not None
    config, text = result
    assert (config.output_dir, config.tracking.mlflow_uri) == ("/runs/sft", "sqlite:///secret")
    assert "output_dir: /runs/${run_name}" in text
    assert "secret" not in text
    assert built(OmegaConf.create(text)) == config


# Values


def test_every_value_that_cannot_run_is_listed_at_once() -> None:
    wrong = {
        "seed": -1,
        "run_name": "a/b",
        "data.max_bad_fraction": 1.5,
        "data.sequence_length": 1,
        "parallel.num_workers": 0,
        "train.max_steps": 0,
        "train.learning_rate": 0.0,
        "train.adam_beta2": 1.0,
        "train.warmup_ratio": 2,
        "train.weight_decay": float("nan"),
        "train.adam_eps": float("inf"),
        "cluster.step_timeout_s": 0,
    }
    found = problems({**wrong, "train.min_learning_rate": 1e-9})
    assert {problem.partition(":")[0] for problem in found} == {*wrong, "train.min_learning_rate"}


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"seed": 2**32}, "seed: 4294967296 must be at most 4294967295"),
        (
            {"train.recompute": ["mpl"]},
            "train.recompute: 'mpl' is not one of core_attn, mlp, layer",
        ),
        ({"train.recompute": "mlp"}, "train.recompute: 'mlp' is one of a list; write [mlp]"),
        (
            {"train.recompute": 3},
            "train.recompute: 3 is not one of none, selective, full or a list",
        ),
        ({"model.dtype": "fp8"}, "model.dtype: 'fp8' is not one of auto, fp32, bf16"),
        ({"train.max_steps": 0}, "train.max_steps: 0 must be at least 1"),
        ({"train.learning_rate": 0}, "train.learning_rate: 0.0 must be above 0"),
        ({"train.learning_rate": float("inf")}, "train.learning_rate: inf must be finite"),
        (
            {"train.micro_batch_tokens": 9},
            "train.micro_batch_tokens: 9 is below data.sequence_length",
        ),
        ({"train.learning_rate": 1e38}, "train.learning_rate: 1e+38 must be at most 1e+30"),
        ({"cluster.step_timeout_s": 1e300}, "cluster.step_timeout_s: 1e+300 must be at most"),
        ({"train.max_steps": 2**31}, "train.max_steps: 2147483648 must be at most 2147483647"),
        ({"model.path": "x" * 300}, "model.path: 'xxx"),
        ({"data.train[0].name": "\u4f60" * 100}, "data.train[0].name: '\u4f60"),
        ({"data.cache_dir": "a\0b"}, "data.cache_dir: 'a\\x00b' has control characters"),
        ({"output_dir": "a\u202eb"}, "output_dir: 'a\\u202eb' has control characters or bytes"),
        ({"output_dir": "a\udcff"}, "output_dir: 'a\\udcff' has control characters or bytes"),
        ({"model.path": None}, "model.path: missing; give a local folder"),
        (
            {"data.train": []},
            "data.train: empty; give a list such as data.train=[{path: my.jsonl}]",
        ),
        ({"data.train": [{"path": "a"}, {"path": "b/a"}]}, "data.train[1].name: 'a' is used twice"),
        (
            {"data.validation": [{"name": "x"}]},
            "data.validation[0].path: missing; give a file, a folder",
        ),
        ({"data.train[0].weight": 0}, "data.train[0].weight: 0.0 must be above 0"),
        ({"data.train[0].samples": 0}, "data.train[0].samples: 0 must be at least 1"),
        (
            {"data.train[0].weight": 2, "data.train[0].samples": 9},
            "data.train[0]: weight=2.0 and samples=9 both say how much an epoch draws of it",
        ),
        (
            {"data.validation": [{"path": "v.jsonl", "weight": 0.5}]},
            "data.validation[0].weight: 0.5 is for data.train; a validation set is always used",
        ),
        ({"checkpoint.keep_last": 1}, "checkpoint.keep_last: 1 must be at least 2"),
        (
            {"checkpoint.keep_last": 2, "checkpoint.keep_best": "x"},
            "checkpoint.keep_best: 'x' is no validation set",
        ),
        (
            {"checkpoint.allow_changes": ["seeds"]},
            "checkpoint.allow_changes: 'seeds' is not one of data,",
        ),
        ({"tracking.backends": ["mlfow"]}, "tracking.backends: 'mlfow' is not one of jsonl, mlf"),
    ],
)
def test_a_value_is_refused_with_the_rule(overrides: dict[str, Any], problem: str) -> None:
    (found,) = problems(overrides)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.dtype", "fp16"),
        ("lora.init", "pissa"),
    ],
)
def test_a_reserved_choice_is_refused_as_not_available(key: str, value: object) -> None:
    (problem,) = problems({key: value})
    shown = value[0] if isinstance(value, list) else value
    assert problem.startswith(f"{key}: {shown!r} is not available in this version; use ")


@pytest.mark.parametrize(
    "key",
    [
        "moe.mtp_loss_coef",
        "moe.dispatcher",
        "parallel.expert_tensor_parallel_size",
    ],
)
def test_a_reserved_key_is_refused_as_one_of_a_later_version(key: str) -> None:
    (problem,) = problems({key: 1})
    assert problem == f"{key}: not in this version; leave it out"


def test_a_negative_coefficient_of_the_routers_is_refused() -> None:
    (problem,) = problems({"moe.z_loss_coef": -1})
    assert problem.startswith("moe.z_loss_coef: -1.0")
    assert "at least 0" in problem


def test_a_reserved_key_in_the_wrong_section_is_named() -> None:
    (problem,) = problems({"dispatcher": "flex"})
    assert (
        problem == "dispatcher: no such key; `moe.dispatcher` is not in this version; leave it out"
    )


def test_no_key_that_works_is_reserved() -> None:
    assert not RESERVED & set(all_names(RunConfig))


def test_every_key_has_a_sentence_and_every_bounded_number_a_default_within() -> None:
    for each in all_keys(RunConfig):
        assert each.sentence[0].isalnum(), each.name
        assert each.sentence.endswith("."), each.name
        assert len(each.sentence) < 130, each.name
    check_config(built(given({})))


@pytest.mark.parametrize(
    ("dtype", "device", "machine", "decided"),
    [
        ("auto", "auto", "cuda", ("bf16", "cuda")),
        ("auto", "auto", "cpu", ("fp32", "cpu")),
        ("auto", "cpu", "cuda", ("fp32", "cpu")),
        ("auto", "cuda", "cpu", ("bf16", "cuda")),
        ("fp32", "auto", "cuda", ("fp32", "cuda")),
        ("bf16", "cpu", "cuda", ("bf16", "cpu")),
    ],
)
def test_auto_is_bf16_on_a_gpu_and_fp32_on_a_cpu(
    dtype: str, device: str, machine: Literal["cpu", "cuda"], decided: tuple[str, str]
) -> None:
    config = built(given({"model.dtype": dtype, "parallel.device": device}))
    config = on_device(config, machine)
    assert (config.model.dtype, config.parallel.device) == decided
    assert on_device(config, "cpu") == on_device(config, "cuda") == config


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("model.dtype", "bfloat16", "did you mean bf16?"),
        ("model.dtype", "float32", "did you mean fp32?"),
        ("model.dtype", "fp16", "use bf16"),
        ("data.overlong", "dropped", "did you mean drop?"),
        ("data.system_key", "None", "write null"),
        ("train.max_steps", "None", "write null"),
        ("model.compile", "None", "write null"),
        ("parallel.device", "gpu", "is not one of auto, cpu, cuda; did you mean cuda?"),
    ],
)
def test_the_remedy_is_one_that_works(key: str, value: str, advice: str) -> None:
    (problem,) = problems({key: value})
    assert advice in problem


# Layout


@pytest.mark.parametrize(
    ("num_workers", "degrees", "wrong"),
    [
        (8, (2, 2, 2), ""),
        (8, (2, 2, 1), ""),
        (12, (3, 1, 2), ""),
        (8, (3, 1, 1), "= 3 does not divide num_workers 8"),
        (2, (2, 2, 1), "= 4 does not divide num_workers 2"),
        (0, (1, 1, 1), ""),  # below its bound, which says so
    ],
)
def test_degrees_must_divide_the_world(
    num_workers: int, degrees: tuple[int, int, int], wrong: str
) -> None:
    tensor_size, pipeline_size, context_size = degrees
    parallel = ParallelConfig(
        num_workers=num_workers,
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=pipeline_size,
        context_parallel_size=context_size,
    )
    found = list(layout_problems(parallel))
    assert len(found) == bool(wrong)
    assert all(wrong in problem and "choose degrees" in problem for problem in found)
    for key in ("tensor_model", "pipeline_model", "context"):  # each degree, with its key
        value = getattr(parallel, f"{key}_parallel_size")
        assert all(f"{key}_parallel_size {value}" in problem for problem in found)
    if not wrong and num_workers:
        layout = layout_of(parallel)
        sizes = (layout.tensor_size, layout.pipeline_size, layout.context_size)
        assert sizes == degrees
        assert layout.data_size * tensor_size * pipeline_size * context_size == num_workers


def test_a_gather_in_the_forward_pass_names_what_it_needs() -> None:
    for key in ("use_distributed_optimizer", "overlap_grad_reduce"):
        (problem,) = layout_problems(ParallelConfig(overlap_param_gather=True, **{key: False}))
        assert problem.startswith(f"parallel.overlap_param_gather: true needs {key}=true")
    assert not [*layout_problems(ParallelConfig(overlap_param_gather=True))]


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    (problem,) = layout_problems(ParallelConfig(sequence_parallel=True))
    assert problem.startswith("parallel.sequence_parallel: true needs tensor_model_parallel_size")


@pytest.mark.parametrize(("pipeline_size", "is_wrong"), [(1, True), (2, False)])
def test_virtual_stages_need_a_pipeline(pipeline_size: int, is_wrong: bool) -> None:
    parallel = ParallelConfig(
        num_workers=2,
        pipeline_model_parallel_size=pipeline_size,
        virtual_pipeline_model_parallel_size=2,
    )
    found = list(layout_problems(parallel))
    assert len(found) == is_wrong
    assert all("virtual_pipeline_model_parallel_size: 2 interleaves" in each for each in found)


# The shipped configurations


def composition(name: str, overrides: list[str]) -> Any:
    ConfigStore.instance().store(name="schema", node=schema())
    with initialize_config_module("roll_sft.conf", version_base="1.3"):
        return compose(name, overrides=overrides)


@pytest.mark.parametrize(
    "name", [key.name for key in all_keys(RunConfig) if isinstance(key.default, dict)]
)
def test_a_mapping_takes_keys_of_the_user_s(name: str) -> None:
    values: Any = composition("base", [f"{name}={{embeddings: 0.5}}"])
    for part in name.split("."):
        values = values[part]
    assert values == {"embeddings": 0.5}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_a_shipped_configuration_runs_once_model_and_data_are_given(name: str) -> None:
    overrides = ["model.path=m", "data.train=[{path: a.jsonl}]"]
    config = built(composition(name, overrides))
    check_config(config)
    assert list(layout_problems(config.parallel)) == []
    assert (config.model.path, config.data.train[0].path) == ("m", "a.jsonl")


@pytest.mark.parametrize(
    "path",
    sorted(set(CONF.glob("*/*.yaml")) - set(CONF.glob("recipes/*"))),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_a_shipped_part_changes_its_section_alone(path: Path) -> None:
    section = path.parent.name
    config = built(composition("base", [f"+{section}={path.stem}"]))
    changed = {name for name in SECTIONS if getattr(config, name) != getattr(RunConfig(), name)}
    assert changed <= {section}
    assert changed or path.stem == "full"


def test_no_shipped_configuration_names_columns_but_of_a_data_set_that_it_names() -> None:
    for path in CONF.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "_key:" not in text or "  train:\n    - {path: " in text, path


@pytest.mark.parametrize("backend", ["te", "fa3", "flash", "varlen"])
def test_a_cuda_attention_backend_names_what_stands_in_its_way(backend: str) -> None:
    model = {"path": "m", "attention_backend": backend, "dtype": "fp32"}
    config = build_config(
        {"model": model, "data": {"train": [{"path": "a"}]}, "parallel": {"device": "cpu"}}
    )
    with pytest.raises(ConfigError) as raised:
        check_config(config)
    assert "model.dtype=fp32" in str(raised.value)
    assert "parallel.device=cpu" in str(raised.value)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/rows.jsonl", "rows"),
        ("a/rows.jsonl.gz", "rows"),
        ("a/rows.v2.json.zst", "rows.v2"),
        ("a/rows.v2.parquet", "rows.v2"),
        ("data/", "data"),
        ("data/*.jsonl", "data"),
        ("data/**/part-*.json", "data"),
        ("*.jsonl", "data"),
        ("s3://bucket/folder", "folder"),
        ("org/name", "name"),
    ],
)
def test_a_source_is_named_by_the_end_of_its_path(path: str, name: str) -> None:
    assert source_name(SourceConfig(path=path)) == name
    assert source_name(SourceConfig(path=path, name="own")) == "own"
