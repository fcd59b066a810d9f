"""`roll-sft chat` and `roll-sft generate`, beside transformers on the same folder."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from roll_sft import cli
from roll_sft.chat.places import find_model
from roll_sft.chat.speaker import Sampling, Speaker
from tests import parity
from tests.doors import Door, write_rows
from tests.outcome import Outcome

QUESTIONS = ["the sum", "What is the largest value in the given list of values?", "numbers 1, 2"]
LENGTH = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own settings ask for sampling and penalties, which greedy answers ignore."""
    folder = parity.write_model(tmp_path_factory.mktemp("chat") / "model", num_layers=2)
    first = reference(folder, [{"role": "user", "content": QUESTIONS[0]}])
    settings = {"eos_token_id": [first[6], 2], "repetition_penalty": 1.5, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def reference(folder: Path, messages: list[dict[str, str]]) -> list[int]:
    """The first tokens of the greedy answer, by transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    network: Any = AutoModelForCausalLM.from_pretrained(str(folder))
    network.generation_config = type(network.generation_config)()
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = network.generate(
        **prompt, do_sample=False, min_new_tokens=LENGTH, max_new_tokens=LENGTH, pad_token_id=0
    )
    return [int(each) for each in output[0, prompt["input_ids"].shape[1] :]]


def expected(folder: Path, messages: list[dict[str, str]]) -> str:
    """The text of `reference` up to the first token that ends a turn."""
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    ids = reference(folder, messages)
    end = next((at for at, each in enumerate(ids) if each in stops), len(ids))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True))


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> Iterator[Door]:
    """`roll-sft` in this process."""

    def call(*given: str) -> Outcome:
        capsys.readouterr()
        code = cli.main([*given])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def speaker(model: Path) -> Speaker:
    return Speaker(find_model(str(model)))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_batch_of_unequal_prompts_is_answered_as_transformers_answers_each(
    script: Door, model: Path, tmp_path: Path
) -> None:
    rows = [
        QUESTIONS[0],
        {"instruction": QUESTIONS[1], "input": "", "output": "the largest"},
        {"messages": [{"role": "user", "content": QUESTIONS[2]}]},
    ]
    prompts, output = write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"
    given = ["--prompts", str(prompts), "--output", str(output), "--max-new-tokens", str(LENGTH)]
    outcome = script("generate", str(model), *given)
    assert (outcome.code, outcome.stdout) == (0, f"{output}\n"), outcome.stderr
    found = lines_of(output)
    assert [line["index"] for line in found] == [0, 1, 2]
    wanted = [expected(model, [{"role": "user", "content": each}]) for each in QUESTIONS]
    assert [line["output"] for line in found] == wanted
    assert (found[0]["finish"], found[0]["num_tokens"]) == ("stop", 7)
    assert found[1]["reference"] == "the largest"
    refusal = script("generate", str(model), *given)
    assert refusal.code == 2
    assert (
        refusal.last_line == f"--output: {output} is there already; add --replace, or name another"
    )


def test_drawn_answers_are_those_of_their_seed(speaker: Speaker) -> None:
    ids = [speaker.prompt_ids(text, where="it") for text in QUESTIONS]

    def drawn(seed: int) -> list[str]:
        sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, top_k=50, seed=seed)
        answers = dict(speaker.answers(ids, sampling, batch_size=2))
        return [answers[index].text for index in range(len(ids))]

    state = torch.random.get_rng_state()
    assert drawn(3) == drawn(3) != drawn(4)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_conversation_that_is_piped_in(
    script: Door, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["the sum", "and the list", "/reset", "the sum", "/system is a number", "the sum"]
    typed += ["/what", "/exit", "never answered"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    outcome = script("chat", str(model), "--max-new-tokens", str(LENGTH))
    assert outcome.code == 0, outcome.stderr
    user = {"role": "user", "content": "the sum"}
    first = expected(model, [user])
    turns = [user, {"role": "assistant", "content": first}]
    second = expected(model, [*turns, {"role": "user", "content": "and the list"}])
    fourth = expected(model, [{"role": "system", "content": "is a number"}, user])
    assert outcome.stdout == "".join(f"{text}\n" for text in (first, second, first, fourth))
    assert "there is no command '/what'" in outcome.stderr


def test_plain_texts_are_continued_without_a_template(speaker: Speaker) -> None:
    assert speaker.prompt_ids("the sum", where="it") == speaker.tokenizer("the sum")["input_ids"]


def test_an_adapter_answers_as_its_merged_model(model: Path, tmp_path: Path) -> None:
    from roll_sft.convert.merge_lora import merge
    from tests import lora

    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}
    run = tmp_path / "run"
    adapter = lora.write_adapter(model, run / "adapter", **options)
    (run / "steps.jsonl").write_text("")
    (run / "config.yaml").write_text("data: {template_kwargs: {enable_thinking: false}}\n")
    merge(adapter, model, tmp_path / "merged")
    place = find_model(str(run), base=str(model))
    assert place.template_kwargs == {"enable_thinking": False}
    answers = []
    for each in (place, find_model(str(tmp_path / "merged"))):
        speaker = Speaker(each)
        ids = speaker.prompt_ids([{"role": "user", "content": QUESTIONS[1]}], where="it")
        answers.append(next(speaker.answers([ids], Sampling(max_new_tokens=LENGTH)))[1])
    assert answers[0] == answers[1]


def test_the_folder_of_a_run_means_its_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    shutil.copytree(model, tmp_path / "run" / "hf")
    assert find_model(str(tmp_path / "run")).folder == tmp_path / "run" / "hf"


@pytest.mark.parametrize(
    ("content", "name", "part"),
    [
        ("", "p.txt", "p.txt has no prompt; write one a line"),
        ("{", "p.jsonl", "p.jsonl:1: is no JSON"),
        ('{"a": 1}', "p.jsonl", "p.jsonl:1: has the columns ['a']; a prompt needs instruction or"),
        ('[{"role": "me"}]', "p.jsonl", "p.jsonl:1: {'role': 'me'} is no message"),
        ('"' + "the " * 600 + '"', "p.jsonl", "leave no room for an answer in the model's"),
    ],
)
def test_bad_prompts_are_refused_in_one_line(
    script: Door, model: Path, tmp_path: Path, content: str, name: str, part: str
) -> None:
    (tmp_path / name).write_text(content)
    paths = ["--prompts", str(tmp_path / name), "--output", str(tmp_path / "out.jsonl")]
    outcome = script("generate", str(model), *paths)
    assert (outcome.code, len(outcome.stderr.splitlines())) == (3, 1), outcome.stderr
    assert part in outcome.last_line
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_no_model_is_refused_in_one_line(script: Door, model: Path, tmp_path: Path) -> None:
    checkpoint, unfinished = tmp_path / "step_00000001", tmp_path / "run"
    for folder, name in ((checkpoint, "manifest.json"), (unfinished, "steps.jsonl")):
        folder.mkdir()
        (folder / name).write_text("{}")
    (unfinished / "checkpoints" / "step_00000003").mkdir(parents=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    without_template = tmp_path / "plain"
    shutil.copytree(model, without_template)
    (without_template / "chat_template.jinja").unlink()
    for given, part in (
        (tmp_path / "nothing", "there is no such folder, and it is no hub id"),
        (tmp_path, "has neither config.json, as a model"),
        (checkpoint, f"roll-sft convert {checkpoint} --output my_model"),
        (unfinished, f"first roll-sft convert {unfinished}/checkpoints/step_00000003"),
        (adapter, "its base model '/gone' is not there"),
        (without_template, "has no chat template"),
    ):
        outcome = script("chat", str(given))
        assert (outcome.code, len(outcome.stderr.splitlines())) == (2, 1), outcome.stderr
        assert part in outcome.last_line


@pytest.mark.parametrize(
    "flags", [["--top-p", "0"], ["--temperature", "-1"], ["--max-new-tokens", "0"]]
)
def test_a_bad_number_is_refused(script: Door, model: Path, flags: list[str]) -> None:
    outcome = script("chat", str(model), *flags)
    assert outcome.code == 2
    assert f"argument {flags[0]}: " in outcome.last_line
