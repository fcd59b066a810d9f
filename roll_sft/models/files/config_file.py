"""A model's config.json: its values checked, then read by transformers.

transformers takes most values as they are, and computes with them: heads of 0 divide by zero, a
hidden size of 2**40 allocates memory, a dtype is looked up as an attribute of torch. Every value
that a family reads has its type and its range here; an absent key is left to transformers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from roll_sft.base.errors import ConfigError
from roll_sft.base.text import shown
from roll_sft.models.files.json_files import not_finite, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
DTYPES_IN_WORDS = "float32, bfloat16 or float16"
_Rule: TypeAlias = Callable[[object], str | None]  # value -> the rule that it breaks


@dataclass(frozen=True, slots=True)
class _Number:
    """From `least` (exclusive if `is_above`) to `most`."""

    least: float
    most: float
    is_whole: bool = False
    is_above: bool = False
    is_optional: bool = False

    def __call__(self, value: object) -> str | None:
        """The rule that `value` breaks, if it does."""
        if value is None and self.is_optional:
            return None
        kinds: tuple[type, ...] = (int,) if self.is_whole else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if is_number and isinstance(value, int | float) and self._holds(value):
            return None
        low = f"above {self.least:g}" if self.is_above else f"from {self.least:g}"
        null = ", or null" if self.is_optional else ""
        kind = "an integer" if self.is_whole else "a number"
        return f"must be {kind} {low} to {self.most:.10g}{null}"

    def _holds(self, value: float) -> bool:
        if not -math.inf < value < math.inf:  # math.isfinite fails on an integer of 400 digits
            return False
        return (value > self.least if self.is_above else value >= self.least) and (
            value <= self.most
        )


def _count(most: int, *, is_optional: bool = False) -> _Number:
    return _Number(1, most, is_whole=True, is_optional=is_optional)


def _positive(most: float, *, is_optional: bool = False) -> _Number:
    return _Number(0, most, is_above=True, is_optional=is_optional)


def load_hf_config(path: str, *, trust_remote_code: bool) -> "PreTrainedConfig":
    """Configuration of the model in the local folder `path`; never touches the network.

    Raises `ConfigError` if the folder or its config.json is missing, or if transformers refuses it.
    """
    if not Path(path).is_dir():
        raise ConfigError(
            f"model.path: '{path}' is neither a folder nor a hub id such as Qwen/Qwen2.5-7B; "
            "give the local folder of a model, or its name on the hub"
        )
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"model.path: '{path}' has no config.json; give the folder of a Hugging Face model"
        )
    if problems := value_problems(read_object(Path(path) / "config.json")):
        raise ConfigError(
            f"model.path: '{path}/config.json': {'; '.join(problems)}; correct the file, or"
            " download it again"
        )
    from transformers import AutoConfig  # slow to import

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    # transformers raises errors of many kinds for a malformed file.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"model.path: transformers cannot read '{path}/config.json': {reason}; correct the file"
        ) from error
    return config


def value_problems(content: Mapping[str, Any]) -> list[str]:
    """Key, value and rule of each bad value in `content`, the object of a config.json."""
    if content.get("use_sliding_window") is False and content.get("sliding_window") == 0:
        content = {**content, "sliding_window": None}  # transformers writes 0 for Qwen2-MoE
    found = [*_broken(content, _RULES)]
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(content.get(key), Mapping):
            found += _broken(content[key], _ROPE_RULES, prefix=f"{key}.")
            for kind, rope in content[key].items():  # one for each kind of layer
                if isinstance(rope, Mapping):
                    found += _broken(rope, _ROPE_RULES, prefix=f"{key}.{kind}.")
    if not found and (problem := not_finite(content)):  # transformers reads it, JSON has none
        found.append(problem)
    return found


def _broken(
    content: Mapping[str, Any], rules: Mapping[str, _Rule], prefix: str = ""
) -> Iterator[str]:
    for key, rule in rules.items():
        if key in content and (problem := rule(content[key])) is not None:
            yield f"{prefix}{key} {shown(content[key])} {problem}"


def _switch(value: object) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _text(value: object) -> str | None:
    return None if isinstance(value, str) else "must be text"


def _texts(value: object) -> str | None:
    is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return None if is_list or value is None else "must be a list of texts"


def _switches(value: object) -> str | None:
    is_list = isinstance(value, list) and all(each in (0, 1) for each in value)
    return None if is_list or value is None else "must be a list of 0 and 1"


def _dtype(value: object) -> str | None:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return None if name is None or name in DTYPES else f"must be {DTYPES_IN_WORDS}"


def _object(value: object) -> str | None:
    return None if value is None or isinstance(value, Mapping) else "must be an object or null"


def token_problem(value: object) -> str | None:
    """What is wrong with `value` as the id of a token: the rule, or None."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    is_id = all(isinstance(each, int) and not isinstance(each, bool) for each in ids)
    return None if is_id else "must be the id of a token, a list of such, or null"


# Far above the values of every published model, and far below what exhausts a machine.
_RULES: dict[str, _Rule] = {
    "hidden_size": _count(2**17),
    "intermediate_size": _count(2**20),
    "num_hidden_layers": _count(2**12),
    "num_attention_heads": _count(2**12),
    "num_key_value_heads": _count(2**12, is_optional=True),
    "head_dim": _count(2**13, is_optional=True),
    "vocab_size": _count(2**24),
    "max_position_embeddings": _count(2**30),
    "sliding_window": _count(2**30, is_optional=True),
    "pretraining_tp": _count(2**10, is_optional=True),
    "rms_norm_eps": _positive(1.0),
    "initializer_range": _positive(10.0),
    "original_max_position_embeddings": _count(2**30),
    "no_rope_layers": _switches,
    "no_rope_layer_interval": _count(2**12),
    **dict.fromkeys(
        ("attention_dropout", "resid_pdrop", "embd_pdrop"), _Number(0, 1, is_optional=True)
    ),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
        _positive(1e6),
    ),
    **dict.fromkeys(
        ("final_logit_softcapping", "attn_logit_softcapping"), _positive(1e6, is_optional=True)
    ),
    **dict.fromkeys(("swiglu_limit", "swiglu_alpha"), _positive(1e6)),
    "query_pre_attn_scalar": _positive(1e6),
    "sliding_window_pattern": _count(2**12),
    "partial_rotary_factor": _positive(1.0),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), _positive(1e15, is_optional=True)),
    "rope_parameters": _object,
    "rope_scaling": _object,
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _switch),
    "use_sliding_window": _switch,
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation"), _text),
    **dict.fromkeys(("architectures", "layer_types"), _texts),
    **dict.fromkeys(("dtype", "torch_dtype"), _dtype),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), token_problem),
}
_ROPE_RULES: dict[str, _Rule] = {
    "rope_theta": _positive(1e15),
    "factor": _positive(1e6),
    "low_freq_factor": _positive(1e6),
    "high_freq_factor": _positive(1e6),
    "original_max_position_embeddings": _count(2**30),
    "partial_rotary_factor": _positive(1.0),
    "attention_factor": _positive(1e6, is_optional=True),
    "truncate": _switch,
    "rope_type": _text,
    "type": _text,
}
