"""The lattice in C++: built once by the compiler of this machine, kept in the user's cache, called through ctypes.

The library has a C interface and knows nothing of PyTorch or Python, so that it compiles in seconds. Its form is
optional: whatever keeps it from being built or loaded is one line on stderr, and the PyTorch form runs instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.library import custom_op

from ..operators import add_op_namespace_prefix
from .filters import SMALLEST_PROBABILITY

SOURCES = [Path(__file__).with_name(name) for name in ("lattice.cpp", "lattice.hpp", "plane.hpp")]
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
FLAGS += ["-pthread"]
# by the name that PyTorch gives to what this processor can do
CPU_FLAGS = {
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    "AVX2": ["-mavx2", "-mfma"],
}
NINJA_FILE = """rule build
  command = {compiler} {flags} -o $out $in
build lattice.so: build lattice.cpp
"""
COMPILER_S, BUILD_S, LOCK_S, POLL_S = 20.0, 120.0, 150.0, 0.05


class NotNative(Exception):
    """Says in one line why the C++ form cannot run."""


@functools.cache
def state() -> tuple[ctypes.CDLL | None, str]:
    """Loads the library, building it where that is needed. Returns it, or None and the reason."""
    if os.environ.get("SMOOSEG_NATIVE", "1") == "0":
        return None, "SMOOSEG_NATIVE=0 switches it off"
    try:
        return load(), ""
    except NotNative as error:
        reason = str(error)
    except (OSError, subprocess.SubprocessError, UnicodeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    say(f"the dense CRF runs in PyTorch, not in C++: {reason}")
    return None, reason


def lattice_form() -> str:
    """Tells which form of the lattice `dense_crf` takes on a CPU, "cpp" or "torch". Builds it where that is needed."""
    return "torch" if state()[0] is None else "cpp"


def serves(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Tells whether the C++ form computes in a dtype on a device with this impl. impl="cpp" raises where it cannot."""
    if impl == "torch" or (impl == "auto" and (device.type != "cpu" or dtype != torch.float32)):
        return False
    if device.type != "cpu" or dtype != torch.float32:
        raise RuntimeError(
            f'impl="cpp" computes in fp32 on a CPU, but these probabilities need {dtype} on '
            f'{device.type}: use impl="torch"'
        )
    library, reason = state()
    if impl == "cpp" and library is None:
        raise RuntimeError(f'impl="cpp" cannot run here: {reason}')
    return library is not None


@custom_op(add_op_namespace_prefix("crf_mean_field"), mutates_args=(), device_types="cpu")
def mean_field(
    probabilities: Tensor,
    image: Tensor,
    gaussian: list[float],
    bilateral: list[float],
    iterations: int,
) -> Tensor:
    """Takes probabilities fp32 [K,H,W] and a picture uint8 [H,W,3] to Q [K,H,W]; the rest is as in `dense_crf`.

    Runs on torch.get_num_threads() threads, without the interpreter's lock; their number does not change the result.
    """
    image = image.contiguous()
    result = probabilities.clamp(min=SMALLEST_PROBABILITY).log_().contiguous()  # the scores, until Q replaces them
    if not result.numel():
        return result
    K, H, W = result.shape
    library, reason = state()
    if library is None:
        raise RuntimeError(f"the C++ form of the lattice cannot run here: {reason}")
    weights = (gaussian[0], gaussian[1] if iterations else 0.0, *bilateral[:2], bilateral[2] if iterations else 0.0)
    limits = (iterations, torch.get_num_threads())
    inputs = (result.data_ptr(), image.data_ptr(), H, W, K)
    code = library.smooseg_mean_field(*inputs, *weights, *limits, result.data_ptr())
    if code == 2:
        raise ValueError("points reach too far, or are too many, for the keys of a lattice: refine smaller tiles")
    if code:
        raise MemoryError(f"the lattice of {H} x {W} pixels and {K} classes needs more memory")
    return result


@mean_field.register_fake
def _(probabilities, image, gaussian, bilateral, iterations):
    return torch.empty_like(probabilities, memory_format=torch.contiguous_format)


def load() -> ctypes.CDLL:
    compiler, version = find_compiler()
    flags = FLAGS + CPU_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    facts = (compiler, version, *flags, torch.__version__, platform.machine(), sys.platform)
    key = hashlib.sha256(b"".join(map(Path.read_bytes, SOURCES)) + "\0".join(facts).encode()).hexdigest()[:20]
    folder = cache_folder()
    path = folder / key / "lattice.so"
    if not is_intact(path):
        with lock(folder / "lock", path):
            if not is_intact(path):  # another process may have built it meanwhile
                build(path, compiler, flags)
    library = ctypes.CDLL(str(path))
    signature = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_double] * 5 + [ctypes.c_int64] * 2
    library.smooseg_mean_field.argtypes = [*signature, ctypes.c_void_p]
    return library


def find_compiler() -> tuple[str, str]:
    """Finds the compiler, of the variable CXX or c++ as PyTorch does, and its version."""
    name = os.environ.get("CXX") or "c++"
    compiler = shutil.which(name)
    if compiler is None:
        raise NotNative(f"there is no C++ compiler {name}")
    done = run([compiler, "--version"], COMPILER_S)
    if done.returncode:
        raise NotNative(f"{compiler} --version fails")
    return compiler, done.stdout


def cache_folder() -> Path:
    """Makes the folder of the cache. What it holds is executed, so it must be the user's alone to write."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "smooseg_kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_private(folder)
    return folder


def require_private(path: Path) -> None:
    facts = path.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotNative(f"{path} belongs to someone else, or others may write to it: chmod go-w it, or remove it")


def is_intact(path: Path) -> bool:
    """Tells whether a library is there as it was written."""
    try:
        require_private(path.parent)
        require_private(path)
        return path.with_suffix(".sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return False


@contextmanager
def lock(path: Path, library: Path):
    """Holds the builders' lock; the system takes it back from a process that ends. Waits LOCK_S at most."""
    try:
        import fcntl
    except ImportError:
        raise NotNative("this system has no file locks") from None
    end = time.monotonic() + LOCK_S
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if is_intact(library):  # what we wait for is there
                    break
                if time.monotonic() > end:
                    raise NotNative(f"another process has held {path} for {LOCK_S:.0f} s") from None
                time.sleep(POLL_S)
        yield


def build(path: Path, compiler: str, flags: list[str]) -> None:
    """Compiles next to `path`, and moves the finished folder to its place."""
    search = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    ninja = shutil.which("ninja", path=search)
    if ninja is None:
        raise NotNative("there is no ninja: pip install ninja")
    for killed in path.parent.parent.glob(".build-*"):  # no other process builds now
        shutil.rmtree(killed, ignore_errors=True)
    say(f"building the dense CRF with {compiler}, once for this machine")
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent.parent) as scratch:
        work, finished = Path(scratch), Path(scratch) / "finished"
        finished.mkdir(mode=0o700)
        for source in SOURCES:
            (work / source.name).write_bytes(source.read_bytes())
        command = NINJA_FILE.format(compiler=compiler.replace("$", "$$").replace(" ", "\\ "), flags=" ".join(flags))
        (work / "build.ninja").write_text(command)
        done = run([ninja, "-C", str(work)], BUILD_S, TMPDIR=str(work))
        if done.returncode:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            errors = [line for line in lines if "rror" in line or "No space" in line]
            others = [line for line in lines if not line.startswith(("ninja: ", "[", "FAILED", compiler))]
            raise NotNative(f"{compiler} cannot build it: {[*errors, *others, 'it crashes'][0][:200]}")
        library = finished / path.name
        shutil.move(work / "lattice.so", library)
        library.chmod(0o700)
        library.with_suffix(".sha256").write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        if path.parent.exists():  # a damaged one
            path.parent.rename(work / "damaged")
        finished.rename(path.parent)


def run(command: list[str], limit_s: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command and ends it, with all that it started, after limit_s seconds. stdout has its stderr too."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C", **environment},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise NotNative(f"{command[0]} has not finished in {limit_s:.0f} s") from None
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def say(line: str) -> None:
    print(f"smooseg_kernels: {line}", file=sys.stderr, flush=True)
