"""Red or green: what is allowed, what is named first."""

import math
from dataclasses import replace
from typing import Any

import pytest

from roll_sft.models.families.qwen import QWEN2
from roll_sft.models.source import ModelSource
from roll_sft.models.weight_map import TiedHead, hf_names
from roll_sft.parity.measurement import RankParity, TensorError, TokenError
from roll_sft.parity.oracle import Facts
from roll_sft.parity.verdict import Verdict, judge, tolerances
from tests.parity import model_config

SHAPE = QWEN2.shape(model_config("qwen2", num_layers=2))
SOURCE = ModelSource(SHAPE, seed=0)
IN_LAYER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
MODULES = [
    "model.embed_tokens",
    *(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in IN_LAYER),
    "model.norm",
]
FACTS = Facts(
    supervised_tokens=10,
    loss=2.0,
    grad_norm=3.0,
    largest={},
    largest_output={f"{name}.weight": 1.0 for name in MODULES},
)


def verdict(*, source: ModelSource = SOURCE, **wrong: Any) -> Verdict:
    """Of two ranks that agree but for `wrong`: fields, or errors by (kind, Megatron's name)."""
    tensors = []
    for name, mapping in source.family.weights(source.shape).items():
        for kind in ("output", "gradient"):
            error = wrong.pop(f"{kind} {name}", 0.0)
            if error is not None and (kind == "gradient" or not name.startswith("output")):
                tensors.append(TensorError(kind, name, hf_names(mapping)[0], error))
    rank = RankParity(
        loss=None, grad_norm=3.0, num_tokens=0, worst_token=None, tensors=tuple(tensors)
    )
    token = TokenError("rows:4", 17, wrong.pop("token", 0.0))
    last = replace(rank, **{"loss": 2.0, "num_tokens": 10, "worst_token": token, **wrong})
    return judge([rank, last], FACTS, source=source, dtype="fp32")


def test_equal_numbers_are_green() -> None:
    found = verdict()
    assert found.first_difference is None
    assert all(check.holds and check.measured == 0 for check in found.checks)
    assert [check.what for check in found.checks] == [
        "outputs of 16 modules",
        "tokens lost",
        "loss",
        "losses of 10 tokens",
        "gradients of 17 parameters",
        "gradient norm",
    ]


FC2 = "decoder.layers.0.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"loss": 2.00001}, ["the loss differs by 5.0e-06 though that of every token agrees"]),
        ({"loss": math.nan}, ["the loss differs by nan"]),
        ({"token": 1.0}, ["the loss of rows:4 at token 17", "labels, loss mask and head"]),
        ({"token": math.nan}, ["rows:4 at token 17 differs by nan"]),
        ({"num_tokens": 9}, ["1 supervised tokens are lost or too many"]),
        ({"grad_norm": 3.001}, ["every tensor agrees, but the gradient norm differs by 3.3e-04"]),
        (
            {f"output {FC2}": math.nan},
            [f"the output of model.layers.0.mlp.down_proj.weight ({FC2}"],
        ),
        ({f"gradient {FC2}": 1.0}, ["look at the backward pass", "0.mlp.down_proj.weight", FC2]),
    ],
)
def test_each_measure_alone_is_red_and_explained(wrong: dict[str, Any], parts: list[str]) -> None:
    found = verdict(**wrong).first_difference
    assert found is not None
    for part in parts:
        assert part in found


def test_of_several_differences_the_first_to_be_computed_is_named() -> None:
    later = "decoder.layers.1.input_layernorm.weight"
    wrong: dict[str, Any] = {f"gradient {FC2}": 1.0, f"gradient {later}": 1.0}
    found = verdict(**wrong).first_difference or ""
    assert f"({later})" in found, "the backward pass comes to layer 1 first"
    wrong["token"] = 1.0
    assert "the loss of rows:4" in (verdict(**wrong).first_difference or "")
    wrong |= {f"output {later}": 1.0, f"output {FC2}": 0.5}
    found = verdict(**wrong).first_difference or ""
    assert found.startswith(f"the output of model.layers.0.mlp.down_proj.weight ({FC2}) differs by")


def test_a_parameter_that_no_rank_has_is_red() -> None:
    name = "decoder.layers.1.self_attention.linear_qkv.bias"
    found = verdict(**{f"output {name}": None, f"gradient {name}": None}).first_difference or ""
    assert found.startswith(f"model.layers.1.self_attn.q_proj.bias ({name}) is on no rank")


def test_a_tied_head_may_be_on_no_rank_and_its_gradient_is_the_first_of_all() -> None:
    shape = QWEN2.shape(model_config("qwen2-tied", num_layers=2))
    source = replace(SOURCE, shape=shape)
    mappings = QWEN2.weights(shape)
    (head,) = [name for name, mapping in mappings.items() if isinstance(mapping, TiedHead)]
    absent = {f"output {head}": None, f"gradient {head}": None}
    assert verdict(source=source, **absent).first_difference is None
    wrong = {"gradient embedding.word_embeddings.weight": 1.0, f"gradient {FC2}": 1.0}
    found = verdict(source=source, **absent, **wrong).first_difference or ""
    assert "model.embed_tokens.weight (embedding.word_embeddings.weight)" in found


def test_what_is_allowed_grows_with_depth_but_the_promise_of_the_loss_does_not() -> None:
    shallow, deep = (tolerances("fp32", num_layers=layers) for layers in (2, 64))
    assert shallow == tolerances("fp32", num_layers=4)
    assert deep.loss == shallow.loss == 1e-6
    assert deep.gradient == pytest.approx(4 * shallow.gradient)
