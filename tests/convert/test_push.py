"""Models that are pushed to a stand-in of the hub, by huggingface_hub's own client."""

import hashlib
import os
import subprocess
import sys

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.config.build import build_config
from roll_sft.config.validate import check_config
from tests.stand_in_hub import READER, WRITER, stand_in_hub

WEIGHTS = bytes(range(256)) * 300


@pytest.fixture
def hub():
    with stand_in_hub() as found:
        yield found


@pytest.fixture
def run(tmp_path):
    """The folder of a run with a model."""
    folder = tmp_path / "run"
    write_model(folder / "hf")
    return folder


def write_model(folder, weights=WEIGHTS):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "model.safetensors").write_bytes(weights)


def write_adapter(folder):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS[::-1])


def push(hub, *arguments, token=WRITER, xet=False, **environment):
    """`roll-sft push`, in a process: the client reads its settings once."""
    known = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "" if xet else "1", **environment}
    known |= {"HF_TOKEN": token} if token else {}
    program = "from roll_sft import cli; from roll_sft.convert import push; import sys;"
    program += "push.RETRY_PAUSES_S = (0.01, 0.01); sys.exit(cli.main(['push', *sys.argv[1:]]))"
    clean = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**clean, "HF_HOME": os.environ["HF_HOME_OF_TEST"], **known},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME_OF_TEST", str(tmp_path / "hf_home"))


def test_a_model_is_pushed_whole_into_a_private_repository_and_only_once(run, hub):
    hub.failures, hub.expired_urls = 2, 1
    done = push(hub, run, "--repo-id", "me/model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{run / 'hf'} is at {hub.url}/me/model/commit/")
    repository = hub.repositories["me/model"]
    assert repository.private
    assert repository.branches["main"] == {
        path.name: path.read_bytes() for path in (run / "hf").iterdir()
    }
    sent = sum(request.startswith("PUT /objects/") for request in hub.requests)
    assert sent == 2  # the second to an address that was signed anew
    (run / "hf" / "model.safetensors").rename(run / "hf" / "model-00001-of-00001.safetensors")
    assert push(hub, run, "--repo-id", "me/model").returncode == 0
    assert "model.safetensors" not in repository.branches["main"], "weights of an earlier model"
    assert sum(request.startswith("PUT /objects/") for request in hub.requests) == sent
    assert WRITER not in done.stdout + done.stderr
    assert not any(
        WRITER.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file()
    )


def test_an_upload_that_broke_goes_on_where_it_was(run, hub):
    hub.fail_after_uploads = True
    done = push(hub, run, "--repo-id", "me/model")
    assert done.returncode == 4
    (*_, last) = done.stderr.splitlines()
    assert "`roll-sft push RUN --repo-id me/model` goes on" in last
    sent = sum(request.startswith("PUT /objects/") for request in hub.requests)
    hub.fail_after_uploads = False
    assert push(hub, run, "--repo-id", "me/model").returncode == 0
    assert sum(request.startswith("PUT /objects/") for request in hub.requests) == sent == 1
    assert hub.repositories["me/model"].branches["main"]["model.safetensors"] == WEIGHTS


def test_both_of_lora_go_to_a_branch_by_xet(run, hub, tmp_path):
    """As the client does by default. Xet's storage is its library's own, in a local folder."""
    write_adapter(run / "adapter")
    hub.xet = tmp_path / "xet"
    hub.xet.mkdir()
    arguments = [run, "--repo-id", "me/lora", "--revision", "v1", "--public"]
    done = push(hub, *arguments, xet=True)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/lora"]
    assert not repository.private
    assert repository.branches["main"] == {}
    files = repository.branches["v1"]
    assert {*files} == {
        "README.md", "config.json", "model.safetensors",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    assert files["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest().encode()
    assert not any(request.startswith("PUT /objects/") for request in hub.requests)
    assert any(path.is_file() for path in hub.xet.rglob("*"))


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "me/x", "no token of the hub for 'me/x'; run `hf auth login`, or set HF_TOKEN"),
        ("hf_" + "n" * 20, "me/x", "the hub does not know the token for 'me/x'"),
        (READER, "me/x", "export.push_to_hub.repo_id: the token may not write to 'me/x'"),
        (WRITER, "you/x", "export.push_to_hub.repo_id: the token may not write to 'you/x'"),
        (WRITER, "x y", "'x y' is no repository of the hub; write owner/name"),
    ],
)
def test_a_repository_without_token_or_rights_is_one_line(run, hub, token, repo_id, message):
    done = push(hub, run, "--repo-id", repo_id, token=token)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert "hf_nnnn" not in done.stderr


def test_what_is_not_exported_is_not_pushed(tmp_path, hub):
    (tmp_path / "run").mkdir()
    done = push(hub, tmp_path / "run", "--repo-id", "me/x", "--what", "adapter")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "nothing to push" in line
    assert hub.requests == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"export": {"push_to_hub": {"repo_id": "a b"}}}, r"repo_id: 'a b' is no repository"),
        ({"export": {"push_to_hub": {"repo_id": "a/b--c"}}}, r"repo_id: 'a/b--c' is no repository"),
        ({"export": {"push_to_hub": {"private": False}}}, r"private: false has no effect; set"),
        (
            {"export": {"push_to_hub": {"repo_id": "a/b", "revision": "a..b"}}},
            r"revision: 'a\.\.b' is no branch",
        ),
        (
            {"export": {"push_to_hub": {"repo_id": "a/b", "what": "adapter"}}},
            r"what: adapter is of LoRA, and lora.rank is 0",
        ),
        (
            {
                "export": {"push_to_hub": {"repo_id": "a/b"}},
                "checkpoint": {"hf_export": "none"},
            },
            r"checkpoint.hf_export: none leaves nothing to push to 'a/b'",
        ),
    ],
)
def test_keys_that_cannot_push_are_refused(values, message):
    config = build_config({"model": {"path": "m"}, "data": {"train": [{"path": "a"}]}, **values})
    with pytest.raises(ConfigError, match=message):
        check_config(config)
