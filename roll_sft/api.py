"""The Python API: `roll_sft.train(samples=..., config=...)` and `roll_sft.load_config(...)`.

Does what `roll-sft train` does, in a program of the user's: a script, a notebook, a thread, a
program of asyncio or of Ray. Promises: an error is raised with the sentence that the command would
end with, and never as SystemExit; Ray that is running is used and left running, Ray that was
started is ended; what a run changes in the process is put back (see `python_api/guest.py`).
"""

import hashlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

from roll_sft import run
from roll_sft.base.errors import ConfigError, RollSftError
from roll_sft.base.text import redacted_tree, shown
from roll_sft.config.composed import override_as_typed, resolved, schema, text_of, yaml_as_typed
from roll_sft.config.evaluation import PromptSource
from roll_sft.config.evolve import checked
from roll_sft.config.schema import RunConfig, SourceConfig, token_cache_folder
from roll_sft.config.validate import check_config
from roll_sft.demo import demo
from roll_sft.python_api import samples as given_samples
from roll_sft.python_api.guest import as_guest, log_shown
from roll_sft.python_api.result import Result
from roll_sft.training.run_folder import output_folder

__all__ = ["Result", "RunConfig", "load_config", "train"]

# A path, or an iterable of texts, (prompt, completion) pairs, lists of messages, rows.
Samples: TypeAlias = Any
_RUNNING, _COMPOSING = threading.Lock(), threading.Lock()


def train(
    samples: Samples = None,
    *,
    eval_samples: Samples = None,
    eval_prompts: Samples = None,
    metric_fn: Callable[..., Any] | None = None,
    config: RunConfig | Mapping[str, Any] | str | None = None,
) -> Result:
    """Fine-tune `config.model.path` on `samples`, and return the run that ended.

    `samples` and `eval_samples` take the place of `data.train` and `data.validation`: a path, a
    `datasets.Dataset`, or an iterable of texts (trained on as a whole), (prompt, completion) pairs,
    lists of messages, or rows as files have them. `eval_prompts`, of the same kinds, are answered
    every `train.eval_steps` and at the end: a text is what a user says, and an answer that a row
    has is its reference. `metric_fn(samples, prompts, outputs, references)` returns a mapping of
    names to a number, or to one for each prompt. `config` is a configuration, the name of one, or a
    mapping of changes to the defaults.

    Without `output_dir` and `run_name` the folder is named by what is trained: the same call goes
    on from its own checkpoint, or returns the finished run, and another call has another folder.
    Raises the errors of `roll_sft.base.errors`.
    """
    if not _RUNNING.acquire(blocking=False):
        raise ConfigError(
            "train: another roll_sft.train of this process is running; wait for its end, or start"
            " one of them in a process of its own"
        )
    try:
        with as_guest(), _without_exit():
            chosen = _with_samples(_configuration(config), samples, eval_samples)
            chosen = _named(_with_prompts(chosen, eval_prompts))
            check_config(chosen)
            with log_shown():
                return _train(chosen, metric_fn)
    finally:
        _RUNNING.release()


def load_config(
    name: str = "base",
    overrides: Iterable[str] = (),
    *,
    config_dir: str | Path | None = None,
) -> RunConfig:
    """The configuration that `--config-name NAME KEY=VALUE ... --config-dir FOLDER` would compose.

    Raises `ConfigError`, with all unknown keys, wrong types and broken bounds. What is missing, and
    how keys go together, is checked when a run starts.
    """
    given = list(overrides)
    flags = [each for each in given if not isinstance(each, str) or each.startswith("-")]
    if isinstance(overrides, str) or flags:
        wrong = overrides if isinstance(overrides, str) else flags[0]
        raise ConfigError(f"overrides: {shown(wrong)} is not in a list of texts such as ['seed=1']")
    typed = [override_as_typed(each) if "=" in each else each for each in given]
    folders, own = [str(run.shipped_configurations())], None
    if config_dir is not None:
        own = str(Path(config_dir).absolute())
        if not Path(own).is_dir():
            raise ConfigError(f"config_dir: there is no folder {shown(own)}; make or correct it")
        folders.append(own)
        folders.sort(key=lambda each: not (Path(each) / f"{name}.yaml").is_file())
        typed.append(f"hydra.searchpath=['file://{folders[1]}']")
    with _COMPOSING, _own_hydra(folders[0]), yaml_as_typed():
        try:
            composed = hydra.compose(name, overrides=typed)
        except Exception as error:
            raise ConfigError(run.hydra_message(error, given, own)) from error
    return checked(resolved(run.complete(composed)))


@contextmanager
def _own_hydra(folder: str) -> Iterator[None]:
    """Hydra on the configurations in `folder`, beside the Hydra that the program may use."""
    instances = (GlobalHydra.instance(), VersionBase.instance(), ConfigStore.instance())
    found, version, store = instances[0].hydra, instances[1].version_base, dict(instances[2].repo)
    instances[0].clear()
    try:
        ConfigStore.instance().store(name="schema", node=schema())
        hydra.initialize_config_dir(folder, job_name="roll_sft", version_base="1.3")
        yield
    finally:
        GlobalHydra.instance().hydra = found
        VersionBase.instance().version_base = version
        ConfigStore.instance().repo = store


def _configuration(given: RunConfig | Mapping[str, Any] | str | None) -> RunConfig:
    if isinstance(given, RunConfig):
        return given
    if isinstance(given, str):
        return load_config(given)
    if given is None or isinstance(given, Mapping):
        return RunConfig().evolve(**{str(key): each for key, each in (given or {}).items()})
    raise ConfigError(
        f"config: {shown(given)} is neither a configuration, nor the name of one, nor a mapping;"
        " roll_sft.load_config makes one"
    )


def _with_samples(config: RunConfig, samples: Samples, eval_samples: Samples) -> RunConfig:
    """`config` with the samples as its sources, in files where every node finds them."""
    folder = token_cache_folder(config) / given_samples.FOLDER
    data = config.data
    if samples is not None:
        path = given_samples.source_path(samples, folder, name="samples")
        data = replace(data, train=[_source(samples, path, name="train")])
    if eval_samples is not None:
        path = given_samples.source_path(eval_samples, folder, name="eval_samples")
        data = replace(data, validation=[_source(eval_samples, path, name="validation")])
    return replace(config, data=data)


def _with_prompts(config: RunConfig, prompts: Samples) -> RunConfig:
    """`config` with the prompts: as they are if all are texts, or as a source of rows."""
    if prompts is None:
        return config
    given = prompts if isinstance(prompts, str | Path) else list(prompts)
    entries: list[PromptSource | str]
    if isinstance(given, list) and given and all(isinstance(each, str) for each in given):
        entries = given
    else:
        folder = token_cache_folder(config) / given_samples.FOLDER
        path = given_samples.source_path(given, folder, name="eval_prompts")
        entries = [PromptSource(path=path)]
    return replace(config, evaluation=replace(config.evaluation, prompts=entries))


def _source(samples: Samples, path: str, *, name: str) -> SourceConfig:
    """A source at `path`; a file that was written for it has a name that says nothing."""
    return SourceConfig(path=path, name=None if isinstance(samples, str | Path) else name)


def _named(config: RunConfig) -> RunConfig:
    """`config` with a name of its own where the user gave neither a name nor a folder."""
    if config.output_dir is not None or config.run_name != RunConfig().run_name:
        return config
    digest = hashlib.sha256(text_of(asdict(config)).encode()).hexdigest()
    return replace(config, run_name=f"{config.run_name}_{digest[:8]}")


def _train(config: RunConfig, metric_fn: Callable[..., Any] | None) -> Result:
    run.be_quiet()
    config = _in_found_cluster(config)
    if demo.is_asked(config):
        demo.make_assets(demo.ASSETS)
    # Heavy imports once the configuration is known to be right.
    from roll_sft import stages

    composed_yaml = text_of(redacted_tree(asdict(config)))
    stages.run(config, composed_yaml=composed_yaml, as_guest=True, metric_fn=metric_fn)
    return Result(output_folder(config).resolve(), config)


def _in_found_cluster(config: RunConfig) -> RunConfig:
    """`config` with the address of the Ray cluster that this process is in, if it has more nodes.

    A run on one node shares this machine's folders, one on several needs folders that all see.
    """
    ray: Any = sys.modules.get("ray")  # a program that is in a cluster has imported it
    if ray is None or not ray.is_initialized():
        return config
    here = ray.get_runtime_context()
    if all(each["NodeID"] == here.get_node_id() for each in ray.nodes() if each["Alive"]):
        return config
    return replace(config, cluster=replace(config.cluster, address=here.gcs_address))


@contextmanager
def _without_exit() -> Iterator[None]:
    """Raise an exit within the block as an error: a library must not end a program."""
    try:
        yield
    except SystemExit as leaving:
        raise RollSftError(
            f"the run ended with exit code {leaving.code}; what it wrote to stderr says why"
        ) from leaving
