"""`ModelShape`: all the numbers of a dense decoder. Imports no torch, so a driver can hold one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from roll_sft.base.layout import round_up

if TYPE_CHECKING:
    from roll_sft.models.moe.experts import ExpertShape
    from roll_sft.models.variation import Variation

QKNorm: TypeAlias = Literal["none", "head", "projection"]
NormPlacement: TypeAlias = Literal["pre", "post", "both"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All the numbers of a dense decoder that the engine, the planner and the weight table need.

    `rotary_inv_freq` holds K/2 frequencies, exact float32 values of transformers' own function, for
    K = `head_dim`. `qk_norm` is an RMSNorm on queries and keys: over each head alone, or over all
    heads of the projection at once. `norm_placement` says whether a layer's norms come before
    attention and MLP, or after them and before the residual addition, or both. `variation` is what
    else a family has that is not of a plain decoder. `experts` stand in place of the MLP.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    rotary_inv_freq: tuple[float, ...]
    initializer_range: float
    qk_norm: QKNorm = "none"
    norm_placement: NormPlacement = "pre"
    variation: "Variation | None" = None
    experts: "ExpertShape | None" = None

    @property
    def attention_width(self) -> int:
        """Columns of all query heads together, which need not be the hidden size."""
        return self.num_attention_heads * self.head_dim

    @property
    def windows(self) -> dict[int, int]:
        """Window -> the number of layers whose attention has it."""
        return {} if self.variation is None else self.variation.windows

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that multiply a token: matrices and the LM head, not the embedding."""
        return self._num_layer_matrices(is_active=True) + self._num_embedding_parameters

    @property
    def num_expert_layers(self) -> int:
        """Layers whose MLP is one of experts."""
        return 0 if self.experts is None else self.num_layers - self.experts.num_dense_layers

    @property
    def num_parameters(self) -> int:
        """Every trained number once: embedding, head (unless tied), matrices, biases and norms."""
        num_biases = self._qkv_width if self.qkv_bias else 0
        if self.variation is not None:
            num_biases += self.variation.num_biases(self.hidden_size, self.num_attention_heads)
        num_norms = (4 if self.norm_placement == "both" else 2) * self.hidden_size
        num_norms += self._num_qk_norm_parameters
        num_vocab_matrices = 1 if self.tie_word_embeddings else 2
        of_experts = 0 if self.experts is None else self.experts.num_biases(self.hidden_size)
        return (
            self.num_layers * (num_biases + num_norms)
            + self._num_layer_matrices(is_active=False)
            + self.num_expert_layers * of_experts
            + self.hidden_size
            + num_vocab_matrices * self._num_embedding_parameters
        )

    def padded_vocab_size(self, tensor_size: int) -> int:
        """Rows of the embedding on Megatron's side: it needs a multiple of `tensor_size` only."""
        return round_up(self.vocab_size, tensor_size)

    @property
    def _qkv_width(self) -> int:
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def _num_qk_norm_parameters(self) -> int:
        num_heads = {
            "none": 0,
            "head": 2,  # all query heads share one, all key heads another
            "projection": self.num_attention_heads + self.num_key_value_heads,
        }
        return num_heads[self.qk_norm] * self.head_dim

    def _num_layer_matrices(self, *, is_active: bool) -> int:
        """Weights of the matrices of all layers."""
        attention = self.hidden_size * (self._qkv_width + self.attention_width)
        if latent := self.variation and self.variation.latent:
            attention = latent.num_weights(self.hidden_size, self.num_attention_heads)
        width = (self.num_layers - self.num_expert_layers) * 3 * self.ffn_hidden_size
        if self.experts is not None:
            width += self.num_expert_layers * self.experts.width(is_active=is_active)
        return self.num_layers * attention + self.hidden_size * width

    @property
    def _num_embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size
