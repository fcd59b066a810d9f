"""The report of a run: what is on the page, of whole, failed, old and hostile folders."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from roll_sft import cli
from roll_sft.base.errors import ConfigError, DivergedError
from roll_sft.report import starts
from roll_sft.report.loss_curve import draw_losses
from roll_sft.report.page import page_of
from roll_sft.report.run_files import read_run, restarts
from tests.report.made_run import HOSTILE, make_failed_run, make_run, write_lines

CHARTS = [
    "Loss",
    "held_out, by part",
    "tools, by part",
    "token_f1",
    "Learning rate",
    "Gradient norm",
    "Speed",
    "Model FLOPs utilisation",
    "Packs",
    "Waiting for data",
    "Imbalance of data ranks",
    "Peak memory",
    "Imbalance of experts",
    "Lengths of samples",
    "Packs of step 1",
    "Load of experts at step 300",
]


class Page(html.parser.HTMLParser):
    """The tags, attributes, references, images and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.images: list[tuple[str, str]] = []  # title and description of each
        self.paths: list[int] = []  # of each image
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.attributes.update(given)
        if (name := given.get("id")) is not None:
            self.ids.append(name)
        for value in filter(None, given.values()):
            self.references.update(re.findall(r"url\(#(\w+)\)|^#(\w+)$", value) and [value])
        if tag == "svg":
            assert given["role"] == "img"
            self.paths.append(0)
        elif tag == "path" and self.paths:
            self.paths[-1] += 1

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("title", "desc") and self.paths:
            if self.tags[-1] == "title":
                self.images.append((data, ""))
            elif self.images and not self.images[-1][1]:
                self.images[-1] = (self.images[-1][0], data)
        self.texts.append(data)


def told(page: Page) -> str:
    return " ".join(" ".join(page.texts).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "whole", experts=8)


def test_a_whole_run_has_every_chart_with_words_and_numbers(whole: Path) -> None:
    text = page_of([read_run(whole)])
    page = Page(text)
    assert [title for title, _ in page.images] == CHARTS
    assert all(description for _, description in page.images)
    assert min(page.paths) > 8  # axes, grid and curves
    assert page.tags.count("details") == len(CHARTS)
    assert len(page.ids) == len(set(page.ids))
    shown = told(page)
    for part in (
        "finished (exit code 0)",
        "held_out",
        "starts with step 101 on node-1",
        "Qwen/Qwen2.5-7B",
        "12 overlong, 1 malformed",
        "torch 2.8.0",
        "At step 300 the model says",
        "A function that takes a function and returns a function.",
        "restart",
        "tool calls",
    ):
        assert part in shown
    for outside in ("http:", "https:", "@import", "<script", "<link", "src="):
        assert outside not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"#0[123]0[12]\w\w", text), "a stand-in of a colour is left"


def test_several_runs_are_compared_and_their_differences_listed(
    whole: Path, tmp_path: Path
) -> None:
    other = make_run(tmp_path / "other", num_steps=200, seed=2, learning_rate=3e-5)
    page = Page(page_of([read_run(whole), read_run(other)]))
    shown = told(page)
    assert "Configuration, where the runs differ" in shown
    assert "train.learning_rate 1e-05 3e-05" in shown
    assert "train.global_batch_size" not in shown
    for label in ("whole: train", "other: train", "other: held_out", "whole, step 300"):
        assert label in shown


def test_a_failed_run_shows_its_cause_and_its_bad_batch(tmp_path: Path) -> None:
    shown = told(Page(page_of([read_run(make_failed_run(tmp_path / "diverged"))])))
    for part in ("failed (5)", "train_loss nan and grad_norm nan must be finite", "chats:4021"):
        assert part in shown


LEFT = ["steps.jsonl", "eval.jsonl", "job/packs.json", "starts.jsonl", "config.yaml"]


@pytest.mark.parametrize("kept", [(), *((name,) for name in LEFT)], ids=str)
def test_a_folder_with_little_in_it_has_a_page_of_that(
    kept: tuple[str, ...], tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "old", num_steps=3, end=None)
    for path in [*folder.rglob("*.*")]:
        if str(path.relative_to(folder)) not in kept and path.is_file():
            path.unlink()
    if not {"steps.jsonl", "config.yaml", "starts.jsonl"} & set(kept):
        with pytest.raises(ConfigError, match=r"^RUN: .*old.*output_dir"):
            read_run(folder)
        return
    assert Page(page_of([read_run(folder)])).tags.count("h1") == 1


def test_torn_odd_and_hostile_files_neither_raise_nor_reach_the_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", num_steps=5, end=(1, HOSTILE))
    odd = [
        {"step": HOSTILE},
        {"step": 6, "train_loss": None, "grad_norm": HOSTILE, "per_device_tps": 10**400},
        {"step": 7, "tokens_per_expert": [None, HOSTILE]},
        [1],
        None,
    ]
    with (folder / "steps.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(each)}\n" for each in odd)
        file.write('{"step": 8, "train_l')
    odd_eval = {"step": 5, "name": HOSTILE, "loss": 1.0, "parts": {HOSTILE: {"loss": 1}, "x": 3}}
    write_lines(folder / "eval.jsonl", [odd_eval, {"step": 5}, {"step": 6, "parts": 3}])
    messages = [{"role": "user", "content": HOSTILE}, HOSTILE]
    sample = {"step": 5, "prompt": messages, "output": HOSTILE, "reference": HOSTILE}
    write_lines(folder / "generations.jsonl", [sample, {"step": 5, "metrics": 7}])
    write_lines(folder / "bad_batches.jsonl", [{"step": 5, "samples": HOSTILE}])
    write_lines(folder / "stragglers.jsonl", [{"step": HOSTILE, "host": HOSTILE, "device": [1]}])
    (folder / "config.yaml").write_text(f"run_name: {json.dumps(HOSTILE)}\nx: [*none\n")
    (folder / "data_report.json").write_text(json.dumps({"sources": [{"name": HOSTILE}, 1]}))
    (folder / "job" / "packs.json").write_text(
        json.dumps({"capacity": 10, "ranks": [[[HOSTILE, 3]], 4], "edges": "x", "step": None})
    )
    draw_losses(read_run(folder))
    text = page_of([read_run(folder)])
    page = Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "alert('x')" in told(page)
    assert "{{ 7*7 }}" in told(page)
    assert "\x1b" not in text


def test_the_command_writes_beside_the_run_or_where_it_is_told(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(whole)]) == 0
    assert (whole / "report.html").exists()
    assert (whole / "loss.png").exists()
    assert cli.main(["report", str(whole), str(whole), "--output", "both.html"]) == 0
    assert (tmp_path / "both.html").exists()
    assert capsys.readouterr().out == f"{whole}/report.html\nboth.html\n"
    for arguments, part in (
        (["none"], "RUN: 'none' does not exist; give the output_dir of a run"),
        ([str(tmp_path)], "has neither steps.jsonl nor config.yaml"),
        ([str(whole), "--output", "no/a.html"], "--output: 'no/a.html' cannot be written"),
    ):
        assert cli.main(["report", *arguments]) == 2
        assert part in capsys.readouterr().err


def test_slow_ranks_are_in_a_table(whole: Path) -> None:
    page = told(Page(page_of([read_run(whole)])))
    assert "Slow ranks" in page
    assert "NVIDIA H100" in page


def test_restarts_of_commands_and_of_workers_are_marked(whole: Path) -> None:
    assert restarts(read_run(whole)) == [101, 150]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (DivergedError("step 3: nan"), (5, "step 3: nan")),
        (KeyboardInterrupt(), (130, "interrupted")),
        (SystemExit(143), (143, "ended by signal 15")),
        (ValueError("https://u:p@h/x"), (1, "ValueError: https://***@h/x")),
    ],
)
def test_the_end_of_a_run_is_told_by_its_exit_code(
    error: BaseException, outcome: tuple[int, str]
) -> None:
    assert starts.outcome_of(error) == outcome


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_draws_the_curves_in_the_colours_of_a_dark_page(
    whole: Path, tmp_path: Path
) -> None:
    from PIL import Image

    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    page.write_text(page_of([read_run(whole)]))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu"]
    command += ["--blink-settings=preferredColorScheme=0", "--window-size=1200,1700"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]
    subprocess.run([*command, f"file://{page}"], check=True, capture_output=True, timeout=60)
    with Image.open(shot) as image:
        found = {color: count for count, color in image.convert("RGB").getcolors(1 << 24) or ()}
    # Curves of the run, of a validation set and of its tool calls; their legends have 100 pixels.
    for color in ((0x79, 0xA8, 0xFF), (0xFF, 0x9D, 0x5C), (0xC3, 0x9B, 0xF5)):
        assert found.get(color, 0) > 400
    assert found[(0x1C, 0x1F, 0x24)] > 500_000, "the ground of the charts"


def test_a_failed_report_is_one_line_and_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    starts.make_report(tmp_path / "none")
    (record,) = caplog.records
    assert "does not exist" in record.getMessage()
