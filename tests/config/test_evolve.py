"""Changed copies of a configuration, from Python."""

from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import RunConfig, SourceConfig
from roll_sft.python_api.samples import source_path

CONFIG = RunConfig().evolve(model={"path": "m"}, data={"template_kwargs": {"thinking": True}})


def test_a_copy_has_the_changes_and_everything_else() -> None:
    changed = CONFIG.evolve(
        seed=7, train=dict(learning_rate=1e-5, adam_eps="1e-9"), model={"path": Path("other")}
    )
    assert (changed.seed, changed.model.path) == (7, "other")
    assert (changed.train.learning_rate, changed.train.adam_eps) == (1e-5, 1e-9)
    assert changed.data == CONFIG.data
    assert CONFIG.seed == RunConfig().seed
    assert changed.evolve(seed=CONFIG.seed, train=CONFIG.train, model=CONFIG.model) == CONFIG


def test_a_path_may_begin_at_the_user_s_home() -> None:
    changed = CONFIG.evolve(model={"path": Path("~/m")}, data={"train": [{"path": "~/rows.jsonl"}]})
    home = Path.home()
    assert (changed.model.path, changed.data.train[0].path) == (f"{home}/m", f"{home}/rows.jsonl")
    assert source_path(Path("~/rows.jsonl"), home, name="samples") == f"{home}/rows.jsonl"


def test_a_list_replaces_and_a_mapping_adds() -> None:
    one = CONFIG.evolve(data={"train": [SourceConfig(path="a.jsonl"), {"path": "b.jsonl"}]})
    assert [source.path for source in one.data.train] == ["a.jsonl", "b.jsonl"]
    two = one.evolve(data={"train": ({"path": "c.jsonl"},), "template_kwargs": {"tools": 1}})
    assert [source.path for source in two.data.train] == ["c.jsonl"]
    assert two.data.template_kwargs == {"thinking": True, "tools": 1}


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"train": {"learning_rat": 1e-5}},
            [r"train\.learning_rat: .* did you mean `train\.learning_rate`"],
        ),
        ({"trian": {"seed": 1}}, [r"trian: no such key; did you mean `train"]),
        ({"train": {"learning_rate": -1.0}}, [r"train\.learning_rate: -1\.0 must be above 0"]),
        (
            {"seed": "many", "lora": {"rank": -1}},
            [r"seed: 'many' is not an integer", r"lora\.rank"],
        ),
        ({"train": 3}, [r"train: 3 is not a mapping"]),
        ({"model": {"dtype": "bf15"}}, [r"model\.dtype: 'bf15' .* did you mean bf16"]),
    ],
)
def test_what_yaml_would_refuse_is_refused(changes: dict[str, Any], lines: list[str]) -> None:
    for line in lines:
        with pytest.raises(ConfigError, match=line):
            CONFIG.evolve(**changes)
