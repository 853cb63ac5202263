"""kernels/ as a Hugging Face kernel project: layout.py's build loads offline, together with the pip package."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tomllib", reason="layout.py needs Python 3.11")
PROJECT = Path(__file__).parent.parent / "kernels"
SOURCES = PROJECT / "torch-ext" / "smooseg_kernels"
# the folder kernels/ is a namespace package where the repository's root is on the path, and no loader
spec = importlib.util.find_spec("kernels")
LOADER = spec is not None and spec.origin is not None


def lay_out(folder):
    return subprocess.run(
        [sys.executable, PROJECT / "layout.py", "--out", folder], capture_output=True, text=True, cwd=folder.parent
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project") / "hub"
    done = lay_out(folder)
    assert done.returncode == 0, done.stderr
    return folder


def metadata(variant):
    return json.loads((variant / "metadata.json").read_text())


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_variants_hold_the_sources_that_pip_installs(folder):
    variants = sorted((folder / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    own = {name: content for name, content in files_of(SOURCES).items() if "__pycache__" not in name}
    for variant in variants:
        files, facts = files_of(variant), metadata(variant)
        assert own.items() <= files.items()
        assert files.keys() - own.keys() == {"_ops.py", "smooseg_kernels/__init__.py", "metadata.json"}
        assert (facts["name"], facts["version"], facts["license"]) == ("smooseg-kernels", 1, "Apache-2.0")
        assert facts["backend"] == {"type": variant.name.removeprefix("torch-")}
        assert facts["id"].isidentifier()
        digests = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in files.items()}
        del digests["metadata.json"]
        assert facts["digest"] == {"algorithm": "sha256", "files": digests}
    assert len({metadata(variant)["id"] for variant in variants}) == 3


def test_the_same_sources_give_the_same_build_and_replace_an_old_one(folder, tmp_path):
    assert lay_out(tmp_path).returncode == 0
    (tmp_path / "build" / "torch-cpu" / "stale.py").touch()
    assert lay_out(tmp_path).returncode == 0
    assert files_of(tmp_path / "build") == files_of(folder / "build")
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "build" / "lib").mkdir(parents=True)
    (tmp_path / "build" / "lib" / "mine.py").write_text("mine")
    done = lay_out(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not a build of kernels" in done.stderr
    assert files_of(tmp_path) == {"build/lib/mine.py": b"mine"}


def test_imports_are_relative_or_of_torch_and_triton():
    """A hub copy is not called smooseg_kernels, and may import nothing else."""
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            absolute = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            absolute += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in absolute:
                root = name.split(".")[0]
                assert root in ("torch", "triton") or root in sys.stdlib_module_names, f"{path.name} imports {name}"


LOAD = """
import json, sys, importlib.util
from pathlib import Path
import torch
import smooseg_kernels as sk
folder = Path(sys.argv[1])
if sys.argv[2] == "kernels":
    from kernels import get_local_kernel
    hub = get_local_kernel(folder)
else:
    variant = folder / "build" / "torch-cpu"
    spec = importlib.util.spec_from_file_location("older", variant / "smooseg_kernels" / "__init__.py")
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    hub = sys.modules[json.loads((variant / "metadata.json").read_text())["id"]]
    assert all(getattr(older, name) is getattr(hub, name) for name in hub.__all__)
assert folder in Path(sys.modules[hub.smooseg_loss.__module__].__file__).parents
assert hub.smooseg_loss is not sk.smooseg_loss
assert set(sk.__all__) <= set(dir(hub))


def run(package, impl):
    torch.manual_seed(0)
    features, prototypes = torch.randn(3, 20, 12), torch.randn(5, 6)
    codes, student = torch.randn(3, 20, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    loss = package.smooseg_loss(features, codes, student, prototypes, ["self", "all"], [0.0, 0.5], impl=impl)
    return (*(value.detach() for value in loss), *torch.autograd.grad(loss.total, [codes, student]))


for impl in ("dense", "torch", *(["triton"] if sys.argv[3] == "triton" else [])):
    first = run(sk, impl)
    for package in (hub, sk):  # and the one that was there first still works
        assert all(torch.equal(a, b) for a, b in zip(run(package, impl), first)), impl
if sys.argv[3] == "triton":
    name = hub.smooseg_loss.__module__.split(".")[0]
    assert hasattr(getattr(torch.ops, name), "objective") and hasattr(torch.ops.smooseg, "objective")
print("loaded", hub.smooseg_loss.__module__)
"""


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("kernels", marks=pytest.mark.skipif(not LOADER, reason="needs pip install kernels")),
        "as older loaders do",
    ],
)
def test_loads_next_to_the_pip_package(way, folder, tmp_path):
    """Both copies give the same losses and gradients, bit for bit, and keep their operators apart."""
    fused = "triton" if importlib.util.find_spec("triton") else "plain"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, folder, way, fused],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loaded _smooseg_kernels_")


@pytest.mark.skipif(not LOADER, reason="needs pip install kernels")
def test_the_loader_takes_the_project_file_and_the_digests(folder):
    rust = pytest.importorskip("kernels._rust")
    variants = sorted((folder / "build").iterdir())
    assert [variant.name for variant in variants] == sorted(
        f"torch-{backend}" for backend in rust.Build.open(PROJECT).general.backends
    )
    for variant in variants:
        facts = rust.Metadata.read_from_file(variant / "metadata.json")
        facts.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))
