"""Builds and loads what stands for the CUDA driver; call `load` before the first import of torch.

Needs a C and a C++ compiler and the CUDA build of torch. What is built lies in build/fake_gpu,
under the hash of its source and of torch's version, and is built once.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "fake_gpu"


def why_not() -> str | None:
    """One line on what this interpreter lacks, or None."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "torch is not installed"
    if not any((Path(found.origin).parent / "lib").glob("libtorch_cuda.so")):
        return f"torch {importlib.metadata.version('torch')} is no CUDA build"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def load() -> None:
    """Load the driver, then torch with a device guard for CUDA. Raises `SystemExit` in one line."""
    if reason := why_not():
        raise SystemExit(
            f"fake-gpu: {reason}; install torch's CUDA build, pip's default on Linux, and name its"
            " interpreter: make fake-gpu FAKE_GPU_PYTHON=..."
        )
    if "torch" in sys.modules:
        raise SystemExit("fake-gpu: torch is imported already; load the driver before it")
    # Global, and before torch: its libraries then find these functions before the real ones.
    triton = importlib.util.find_spec("triton")
    assert triton is not None, "why_not looks for it"
    headers = Path(str(triton.origin)).parent / "backends" / "nvidia" / "include"
    driver = _built("driver.c", ["cc", "-Wl,-soname,libcuda.so.1", f"-I{headers}"])
    ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL)
    import torch

    folder = Path(torch.__file__).parent
    where = [f"-I{folder / 'include'}", f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}"]
    ctypes.CDLL(str(_built("guard.cpp", ["c++", "-std=c++20", *where], ["-lc10"]))).register_guard()


def _built(source: str, compiler: list[str], libraries: list[str] | None = None) -> Path:
    """The shared library of `source`. Raises `SystemExit` if it does not compile."""
    path = HERE / source
    version = importlib.metadata.version("torch")
    name = hashlib.sha256(path.read_bytes() + version.encode()).hexdigest()[:16]
    library = BUILT / f"{path.stem}-{name}.so"
    if library.is_file():
        return library
    BUILT.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    command = [*compiler, "-O1", "-shared", "-fPIC", str(path), "-o", str(partial)]
    try:
        subprocess.run([*command, *(libraries or [])], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise SystemExit(
            f"fake-gpu: {compiler[0]} does not build {source} ({detail.splitlines()[0]}); install"
            " a C and a C++ compiler"
        ) from error
    partial.replace(library)
    return library
