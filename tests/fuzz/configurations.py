"""Configurations through `dry_run`: overrides, YAML files and flags that are not what they should.

What is accepted must be what was asked for: a number is that number, a text that text.
"""

import dataclasses
import math
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from roll_sft.config.fields import all_names
from roll_sft.config.schema import RunConfig
from tests.doors import alpaca
from tests.doors import write_rows as write_lines
from tests.fuzz.case import Case, run_config
from tests.fuzz.mutate import ODD_TEXTS, changed, damaged, odd_value
from tests.outcome import Outcome
from tests.parity import write_model

CODES = frozenset({0, 2, 3, 4})  # data that is not there is 3; a hub that is not, 4

# As typed after `key=`.
TYPED = (
    "", "0", "-1", "1", "2", "3", "nan", "inf", "-inf", "1e38", "1e308", "1e309", "1e-320", "0.1",
    "9223372036854775808", "1000000000000000000000", "99999999999999", "100000", "1_000",
    "2024_11_25", "1e3", "1.0", "0x10", "010", "+5", "1:30", "2024-01-01", "true", "false", "yes",
    "off", "null", "None", "~", "???", "''", '""', "'a b'", '"x"', "[]", "{}", "[1,2]", "[[]]",
    "{a:1}", "[{}]", "[{path:x}]", "[null]", "[{path:x,weight:1e30}]", "{", "[", "'", "a,b", "a=b",
    "a:b", "a b", "auto", "cpu", "fp32", "bfloat16", "fp16", "none", "cosine", "__class__", "..",
    ".", "/", "~/x", "/dev/null", "/dev/zero", "/proc/self/mem", "a/b", "no/such/folder",
    "file:///x",
    "memory://x", "ftp://x", "x.jsonl", "*.jsonl", "**", "[a-", "%00", "$HOME", "$(id)", "{{x}}",
    "${run_name}", "${train.learning_rate}", "${nope}", "${", "${${run_name}}", "${oc.env:HOME}",
    "${oc.env:NO_SUCH}", "${now:%Y}", "${oc.decode:'[1'}", "${train}", "${data.train}",
    "${hydra:job.name}", "${.x}", "${..}", "é", "名前", "\x1b[31mred", "\x9b0m", "\x07", "\u202ex",
    "\u2028", "\ufeff", "\ud800", "\udcff", "a\nb", "a\tb", "\\n", "\\", "a" * 300, "a" * 100_000,
    "/" + "a" * 300, "1" * 5000, "range(3)", "choice(1,2)", "interval(0,1)", "glob(*)",
    "shuffle(1)",
    "float(1)", "int(3.7)", "bool(x)", "str(1)", "json_str({})", "tag(a)", "extend_list(1)", "-",
)  # fmt: skip
FLAGS = (
    "--cfg", "--cfg=job", "--cfg=all", "--cfg=hydra", "--info", "--info=all", "--info=defaults",
    "--resolve", "--package=train", "--config-name=", "--config-name=nope", "--config-name=../demo",
    "--config-name=base.yaml", "--config-name=data", "--config-dir=/no/such", "--config-dir=",
    "--config-path=/etc", "--config-name", "-m", "--multirun", "--run", "-r", "--hydra-help",
    "--help",
    "-h", "--version", "--shell-completion", "-sc=install=bash", "--experimental-rerun=x", "--nope",
    "-", "--", "=", "=a", "a=", "a", "+a=b", "++a=b", "~a", "~train", "~train.seed", "~data.train",
    "~model.path", "+model.path=x", "++model.path=", "train", "train=", "train=5",
    "train=full_finetune",
    "train=nope", "data=null", "data=[]", "model=qwen2_5_7b", "+model=qwen2_5_7b", "a@b=c", "@=",
    "a/b=c",
    "a.b.c=1", ".=1", "..=1", "a..b=1", "data.train.0.path=x", "data.train[0].path=x", "seed.x=1",
    "train.learning_rate.x=1", "+train.x=1", "+train.learning_rat=1", "hydra.verbose=true",
    "hydra.run.dir=x", "hydra.job.chdir=true", "hydra.mode=MULTIRUN", "hydra.sweep.dir=x",
    "hydra.searchpath=[x]", "hydra/launcher=nope", "hydra/job_logging=disabled", "hydra=null",
    "hydra.output_subdir=x", "hydra.nope=1", "+hydra.nope=1", "seed=1,2", "seed=1 seed=2",
)  # fmt: skip
# YAML that parsers are known to stumble over.
NASTY = (
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntrain: *c\n",
    "train: &t\n  self: *t\n",
    "run_name: !!python/object/apply:os.system ['id > canary']\n",
    "run_name: !!binary aGk=\n",
    "run_name: !!set {a, b}\n",
    "run_name: !nope x\n",
    "seed: 1\nseed: 2\n",
    "train:\n\tlearning_rate: 1\n",
    "run_name: 2024-01-01\n",
    "run_name: 2024_01_01\n",
    "run_name: 010\n",
    "run_name: 1:30\n",
    "run_name: yes\n",
    "seed: 010\n",
    "seed: 0o17\n",
    "seed: 1:30\n",
    "train: {learning_rate: 1e-5}\n",
    "1: 2\n",
    "null: 2\n",
    "true: 2\n",
    "[a, b]: 2\n",
    "? {a: b}\n: 2\n",
    "'': 2\n",
    "---\nseed: 1\n---\nseed: 2\n",
    "- a\n- b\n",
    "just text\n",
    "42\n",
    "null\n",
    "",
    "\x00",
    "defaults: [my]\n",
    "defaults: [base, nope]\n",
    "defaults: {base: x}\n",
    "defaults: base\n",
    "defaults: [base, {train: nope}]\n",
    "defaults: [base, {override /train: full_finetune}, _self_]\n",
    "defaults: [base, _self_, _self_]\n",
    "defaults: [_self_]\n",
    "defaults: []\n",
    "defaults: [null]\n",
    "defaults: [5]\n",
    "hydra: {run: {dir: x}}\n",
    "hydra: 5\n",
    "# @package train\nseed: 1\n",
    "# @package _global_\nseed: 1\n",
    "# @package\nseed: 1\n",
    "run_name: " + "[" * 1000 + "\n",
    "run_name: " + "{a: " * 1000 + "\n",
    "run_name: '" + "a" * 100_000 + "'\n",
    "run_name: \"\\x1b[31m\"\n",
    "run_name: \"\\ud800\"\n",
    "run_name: ${run_name}\n",
    "run_name: ${seed}\nseed: ${run_name}\n",
    "run_name: ${oc.create:x}\n",
    "data: {train: [{path: x, path: y}]}\n",
    "data: {train: {0: {path: x}}}\n",
    "data: {train: [[x]]}\n",
    "data: {train: x.jsonl}\n",
    "data: {train: [x.jsonl]}\n",
    "model: x\n",
    "train: 1\n",
    "train: [1]\n",
    "seed: .inf\n",
    "seed: .nan\n",
    "train: {learning_rate: .nan}\n",
    "train: {learning_rate: '1e-5'}\n",
    "train: {learning_rate: 1e5000}\n",
    "checkpoint: {allow_changes: seed}\n",
    "tracking: {backends: {a: 1}}\n",
    "cluster: {max_restarts: 1e400}\n",
)  # fmt: skip


def build(home: Path) -> None:
    """The model and the rows that every configuration names."""
    write_model(home / "model", kind="qwen2-tied", num_layers=2)
    write_lines(home / "rows.jsonl", [alpaca(number) for number in range(12)])


def case(rng: random.Random, home: Path) -> Case:
    """One configuration; the current folder is the case's own."""
    makers = (_overridden, _overridden, _overridden, _overridden, _from_yaml, _nasty, _flagged)
    return rng.choice(makers)(rng, home)


def _values(home: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(home / "model")},
        "data": {
            "train": [{"path": str(home / "rows.jsonl")}],
            "cache_dir": str(home / "cache"),
            "sequence_length": 100,
        },
        "tracking": {"backends": ["jsonl"]},
        "parallel": {"device": "cpu"},
        "dry_run": True,
    }


def _base(home: Path) -> list[str]:
    return [
        f"model.path={home / 'model'}",
        f"data.train=[{{path: {home / 'rows.jsonl'}}}]",
        f"data.cache_dir={home / 'cache'}",
        "data.sequence_length=100",
        "tracking.backends=[jsonl]",
        "parallel.device=cpu",
        "dry_run=true",
    ]


def _overridden(rng: random.Random, home: Path) -> Case:
    number = rng.choice((1, 1, 1, 2))
    keys = [_key(rng) for _ in range(number)]
    given = [(key, rng.choice(TYPED)) for key in keys]
    overrides = [f"{key}={text}" for key, text in given]
    names = {name for key, text in given for name in (_leaf(key), text[:12].strip("'\"") or "=")}
    seen = _Seen()
    return Case(
        what=" ".join(f"{each!r:.120}" for each in overrides),
        arguments=[*_base(home), *overrides],
        action=seen,
        codes=CODES,
        names=tuple(names),
        check=lambda outcome: _kept(outcome, seen.config, given if number == 1 else []),
    )


def _key(rng: random.Random) -> str:
    key = rng.choice([name for name in all_names(RunConfig) if not name.startswith("data.train.")])
    if rng.random() < 0.85:
        return key
    spoiled = rng.choice(
        (f"{key}x", f"+{key}.x", key.upper(), key[1:], f"{key}.0", f"++{key}", key[:-1])
    )
    return str(spoiled)


def _leaf(key: str) -> str:
    return key.strip("+~").rpartition(".")[2]


class _Seen:
    """Runs a configuration and remembers it."""

    config: RunConfig | None = None

    def __call__(self, config: RunConfig, composed_yaml: str) -> None:
        self.config = config
        run_config(config, composed_yaml)


def _kept(outcome: Outcome, config: RunConfig | None, given: list[tuple[str, str]]) -> list[str]:
    """What of `config`, which ran, is not what was asked for."""
    if outcome.code != 0 or config is None:
        return []
    found = [
        f"accepted {name} = {value}, which is not finite"
        for name, value in _leaves(config)
        if isinstance(value, float) and not math.isfinite(value)
    ]
    values = dict(_leaves(config))
    for key, typed in given:
        name, value = key.lstrip("+"), values.get(key.lstrip("+"), ...)
        if value is not ... and not _is_what_was_typed(value, typed):
            found.append(f"{name}={typed!r:.80} became {value!r:.80}, and nothing is said")
    return found


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def _is_what_was_typed(value: object, typed: str) -> bool:
    """Whether `value` is what a user who types `typed` means; no lists, no references."""
    if re.search(r"[\[\]{}()$]", typed):
        return True
    bare = typed[1:-1] if len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\"" else typed
    if isinstance(value, bool):
        words = {True: ("true", "yes", "on", "1", "y"), False: ("false", "no", "off", "0", "n")}
        return bare.lower() in words[value]
    if isinstance(value, int | float):
        try:
            return float(bare) == value
        except ValueError:
            return False
    if value is None:
        return bare.lower() in ("null", "none", "~", "")
    return not isinstance(value, str) or value == bare.strip()


def _from_yaml(rng: random.Random, home: Path) -> Case:
    values = _values(home)
    for _ in range(rng.randrange(3)):
        section, _, leaf = rng.choice(list(all_names(RunConfig))).partition(".")
        if leaf and "." not in leaf:
            values.setdefault(section, {})[leaf] = odd_value(rng)
    values, what = changed(rng, values)
    full = {"defaults": ["base", "_self_"], **values} if isinstance(values, dict) else values
    try:
        text = yaml.safe_dump(full, allow_unicode=rng.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
    except RecursionError:
        text = b"train: " + b"[" * 1000
    if rng.random() < 0.3:
        text, how = damaged(rng, text)
        what = f"{what}; {how}"
    return _of_file(text, f"my.yaml: {what}")


def _nasty(rng: random.Random, home: Path) -> Case:
    text = rng.choice(NASTY)
    if not text.startswith("defaults") and rng.random() < 0.8:
        text = f"defaults: [base, _self_]\n{text}"
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig", "latin-1"))
    what = f"my.yaml ({encoding}): {text!r:.100}"
    return _of_file(
        text.encode(encoding, "replace"), what, _base(home) if rng.random() < 0.5 else []
    )


def _of_file(text: bytes, what: str, more: list[str] | None = None) -> Case:
    Path("conf").mkdir()
    Path("conf/my.yaml").write_bytes(text)
    seen = _Seen()
    return Case(
        what=what,
        arguments=["--config-dir", "conf", "--config-name", "my", *(more or [])],
        action=seen,
        codes=CODES,
        check=lambda outcome: [
            *_kept(outcome, seen.config, []),
            *(["the file ran a command"] if Path("canary").exists() else []),
        ],
    )


def _flagged(rng: random.Random, home: Path) -> Case:
    flags = [part for flag in rng.sample(FLAGS, rng.choice((1, 1, 2))) for part in flag.split(" ")]
    if rng.random() < 0.1:
        flags.append(rng.choice(ODD_TEXTS).replace("\x00", ""))
    arguments = [*_base(home), *flags] if rng.random() < 0.8 else [*flags, *_base(home)]
    if rng.random() < 0.1:
        shutil.copytree(home / "model", "train.yaml")
    return Case(what=" ".join(map(repr, flags)), arguments=arguments, codes=CODES)
