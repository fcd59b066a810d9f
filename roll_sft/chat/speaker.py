"""A model that answers, loaded with transformers.

Assumes an export: `generation_config.json` has the tokens that end a turn. Promises: greedy answers
equal those of `transformers.generate` on the same weights; sampled ones are the same for the same
seed and batch size; the caller's random state is left as it was; only safetensors are read.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jinja2
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer
from transformers.utils import logging as library_logging

from roll_sft.base.errors import ConfigError, DataError, first_line
from roll_sft.chat.places import Place
from roll_sft.data.chat.tokenizer import load_tokenizer
from roll_sft.models.adapters.peft_folder import BASE
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.files.json_files import read_json

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Messages  # a text that is continued, or messages that are answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; `temperature` 0 takes the most likely one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 42


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, and whether it came to its end or to the limit of tokens."""

    text: str
    num_tokens: int
    finish: Literal["stop", "length"]


class Speaker:
    """A loaded model with its tokenizer; `device` is `cuda` where there is a GPU."""

    def __init__(self, place: Place) -> None:
        """Load what `find_model` found. Raises `ConfigError` or `CheckpointError` in one line."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._template_kwargs = place.template_kwargs
        with _merged(place) as folder, _without_progress_bars():
            config: Any = load_hf_config(str(folder), trust_remote_code=False)
            # An adapter's folder has the tokenizer and the template that it was trained with.
            self.tokenizer: Any = load_tokenizer(
                str(folder), trust_remote_code=False, embedding_size=config.vocab_size
            )
            self._model: Any = _load_weights(folder, config).to(self.device).eval()
        stops = self._model.generation_config.eos_token_id
        given = [*(stops if isinstance(stops, list) else [stops]), self.tokenizer.eos_token_id]
        self._stops = [*dict.fromkeys(stop for stop in given if stop is not None)]
        self._pad = self.tokenizer.pad_token_id
        if self._pad is None:
            self._pad = self._stops[0] if self._stops else 0
        self._room = int(config.max_position_embeddings)
        # Without the model's own settings, such as a penalty for repetitions.
        plain: Any = GenerationConfig  # Any: transformers leaves it without types
        self._model.generation_config = plain(
            eos_token_id=self._stops or None, pad_token_id=self._pad
        )

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered."""
        return self.tokenizer.chat_template is not None

    def prompt_ids(self, prompt: Prompt, *, where: str) -> list[int]:
        """The token ids of `prompt`; raises `DataError` that names `where` if there are none."""
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
        else:
            ids = self._rendered(prompt, where=where)
        if not ids:
            raise DataError(f"{where}: has no tokens; give it a text")
        if len(ids) >= self._room:
            raise DataError(
                f"{where}: {len(ids)} tokens leave no room for an answer in the model's"
                f" max_position_embeddings {self._room}; shorten it"
            )
        return ids

    def answers(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, batch_size: int = 16
    ) -> Iterator[tuple[int, Answer]]:
        """(index, answer) of each prompt's ids: longest first, `batch_size` at a time."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            found = self._generate([prompts[index] for index in indices], sampling, salt=start)
            yield from zip(indices, found, strict=True)

    def stream(
        self, prompt: Sequence[int], sampling: Sampling, show: Callable[[str], None]
    ) -> Answer:
        """The answer to one prompt; its text goes to `show` while it comes, word by word."""
        streamer = _Streamer(self.tokenizer, show, stops=self._stops)
        (answer,) = self._generate([prompt], sampling, salt=0, streamer=streamer)
        return answer

    def _rendered(self, messages: Messages, *, where: str) -> list[int]:
        if not self.has_template:
            raise ConfigError(
                f"{where}: the tokenizer has no chat template to render messages with; continue"
                " plain text (--plain), or train with data.chat_template"
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                return_dict=True,
                **self._template_kwargs,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(
                f"{where}: the chat template cannot render it: {first_line(error)}; change the"
                " messages"
            ) from error
        return list(rendered["input_ids"])

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        salt: int,
        streamer: "_Streamer | None" = None,
    ) -> list[Answer]:
        """Answers to `prompts`, as one batch; `salt` differs between the batches of a seed."""
        width = max(map(len, prompts))
        limits = [min(sampling.max_new_tokens, self._room - len(ids)) for ids in prompts]
        padded = [[self._pad] * (width - len(ids)) + list(ids) for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        devices = [torch.cuda.current_device()] if self.device == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(sampling.seed + salt)
            output = self._model.generate(
                torch.tensor(padded, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                max_new_tokens=max(limits),
                streamer=streamer,
                **chosen,
            )
        rows = output[:, width:].tolist()
        return [self._answer(ids, limit) for ids, limit in zip(rows, limits, strict=True)]

    def _answer(self, ids: list[int], limit: int) -> Answer:
        length = next((at for at, each in enumerate(ids) if each in self._stops), None)
        ends = length is not None and length < limit
        kept = ids[: length if ends else limit]
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        return Answer(text, len(kept) + ends, "stop" if ends else "length")


class _Streamer(TextStreamer):
    """Gives text to `show` as soon as its words are whole."""

    def __init__(
        self, tokenizer: Any, show: Callable[[str], None], *, stops: Sequence[int]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show, self._stops = show, stops

    def put(self, value: torch.Tensor) -> None:
        """Take the ids of the prompt, int64 [1, T], or of the next token, int64 [1]."""
        if value.numel() > 1 or int(value) not in self._stops:  # which may be no special token
            inherited: Any = super()  # Any: transformers leaves it without types
            inherited.put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


def _load_weights(folder: Path, config: Any) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), config=config, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{folder}: transformers cannot load the model: {first_line(error)}; give the folder of"
            " a whole model with safetensors"
        ) from error


@contextlib.contextmanager
def _merged(place: Place) -> Iterator[Path]:
    """The folder of a whole model; an adapter is merged into its base in a temporary one."""
    if place.adapter is None:
        yield place.folder
        return
    from roll_sft.convert.merge_lora import merge

    base = place.adapter / BASE
    was_quantized = base.is_file() and read_json(base).get("quantized_from") is not None
    with tempfile.TemporaryDirectory(prefix="roll_sft_chat_") as scratch:
        merged = Path(scratch) / "model"
        merge(place.adapter, place.folder, merged, dequantize=was_quantized)
        yield merged


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    bars: Any = library_logging  # Any: transformers leaves these without types
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
