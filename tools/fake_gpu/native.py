"""Builds and loads what stands for the CUDA driver; call `load` before the first import of torch.

Needs a C and a C++ compiler and the CUDA build of torch. What is built lies in build/fake_gpu,
under the hash of its source and of torch's version, and is built once.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
DRIVER = "libcuda.so.1"
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
    for compiler in ("cc", "c++"):
        if shutil.which(compiler) is None:
            return f"there is no compiler {compiler}"
    return None


def load() -> None:
    """Load the driver, then torch with a device guard for CUDA. Raises `SystemExit` in one line."""
    if reason := why_not():
        raise SystemExit(
            f"fake-gpu: {reason}; it needs a C and a C++ compiler and torch's CUDA build, pip's"
            " default on Linux: make fake-gpu PYTHON=python3.12, or FAKE_GPU_PYTHON=<interpreter>"
        )
    if "torch" in sys.modules:
        raise SystemExit("fake-gpu: torch is imported already; load the driver before it")
    # Global, and before torch: its libraries then find these functions before the real ones.
    triton = importlib.util.find_spec("triton")
    assert triton is not None, "why_not looks for it"
    headers = Path(str(triton.origin)).parent / "backends" / "nvidia" / "include"
    options = ["cc", f"-Wl,-soname,{DRIVER}", f"-I{headers}"]
    driver = _built("driver.c", options, name=DRIVER)
    os.environ["TRITON_LIBCUDA_PATH"] = str(driver.parent)
    ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL)
    import torch

    folder = Path(torch.__file__).parent
    where = [f"-I{folder / 'include'}", f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}"]
    guard = _built("guard.cpp", ["c++", "-std=c++20", *where, "-Wl,--no-as-needed", "-lc10"])
    ctypes.CDLL(str(guard)).register_guard()


def _built(source: str, compiler: list[str], *, name: str = "library.so") -> Path:
    """The shared library `name` of `source`. Raises `SystemExit` if it does not compile."""
    path = HERE / source
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(path.read_bytes() + version.encode()).hexdigest()[:16]
    library = BUILT / f"{path.stem}-{key}" / name
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    command = [*compiler, "-O1", "-shared", "-fPIC", str(path), "-o", str(partial)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise SystemExit(
            f"fake-gpu: {compiler[0]} does not build {source} ({detail.strip().splitlines()[-1]});"
            " it needs a C and a C++ compiler"
        ) from error
    partial.replace(library)
    return library
