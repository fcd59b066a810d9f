"""What is asked of the workers where a run evaluates by generation, and what they answer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Prompts to answer. Equal on all ranks, which divide the prompts among themselves.

    `temperature` 0 takes the likeliest token. Above 0 a token is drawn of the `top_k` likeliest (0:
    of all), and of these of the likeliest that together have a probability of `top_p`.
    """

    prompts: tuple[tuple[int, ...], ...]  # token ids
    stop_ids: tuple[int, ...]  # each ends an answer
    max_new_tokens: int  # of an answer, with the token that ends it
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0  # with the index of a prompt and the place in its answer it decides a draw
    deadline_s: float = 1e7  # for all prompts; what is not finished by then is cut


@dataclass(frozen=True, slots=True)
class Generated:
    """The answer to one prompt. `is_stopped`: it ends with a stop token, which `ids` has."""

    index: int  # of the prompt in the request
    ids: tuple[int, ...]
    is_stopped: bool
    is_late: bool = False  # cut by the deadline
