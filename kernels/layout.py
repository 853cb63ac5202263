"""Lays this project out for the `kernels` library of Hugging Face: build/torch-<backend>/, each with a metadata.json.

    python kernels/layout.py                into kernels/build
    python kernels/layout.py --out FOLDER   into FOLDER/build

    kernels.get_local_kernel(Path("kernels"))    then imports it, offline, from any folder

The sources are those that pip installs; nothing is compiled. Every variant gets two more files: `_ops.py` gives this
copy's operators their own namespace, so that one process can also load the pip package and other versions, and
`smooseg_kernels/__init__.py` is where older loaders look. Needs Python 3.11 or newer (tomllib) and nothing else.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

try:
    import tomllib
except ImportError:
    sys.exit("layout.py reads build.toml with tomllib: run it with Python 3.11 or newer")

PROJECT = Path(__file__).resolve().parent

OPS = '''"""The namespace of the operators of this copy: no two builds share one."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''

FOR_OLDER_LOADERS = '''"""Older loaders look for the package here, one folder deeper than it is."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parent.parent / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["{id}"])
globals().update({{name: value for name, value in vars(sys.modules["{id}"]).items() if not name.startswith("__")}})
'''


def sources(module: str, extensions: list[str]) -> dict[str, bytes]:
    """Returns {path in the package: content}, sorted, so that the same sources give the same identifier everywhere."""
    package = PROJECT / "torch-ext" / module
    paths = sorted(path for path in package.rglob("*") if path.suffix[1:] in extensions and path.is_file())
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in paths}


def variant(backend: str, general: dict, module: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """Returns all files of build/torch-<backend>/."""
    contents = hashlib.sha256()
    for name, content in files.items():
        contents.update(f"{name} {len(content)}\n".encode() + content)
    unique = f"_{module}_{backend}_{contents.hexdigest()[:7]}"
    files = {
        **files,
        "_ops.py": OPS.format(id=unique).encode(),
        f"{module}/__init__.py": FOR_OLDER_LOADERS.format(id=unique).encode(),
    }
    digests = {name: base64.b64encode(hashlib.sha256(files[name]).digest()).decode() for name in sorted(files)}
    metadata = {
        "id": unique,
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return {**files, "metadata.json": (json.dumps(metadata, indent=2) + "\n").encode()}


def lay_out(folder: Path) -> list[Path]:
    """Writes folder/build and returns its variants.

    A new build replaces an old one once it is complete; any other folder called build is an error.
    """
    config = tomllib.loads((PROJECT / "build.toml").read_text(encoding="utf-8"))
    general, module = config["general"], config["general"]["name"].replace("-", "_")
    files = sources(module, config["torch-noarch"]["pyext"])
    build = folder / "build"
    if build.exists() and not (
        build.is_dir() and all((entry / "metadata.json").is_file() for entry in build.iterdir())
    ):
        raise FileExistsError(f"{build} is not a build of kernels: move it away, or choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        for backend in general["backends"]:
            for name, content in variant(backend, general, module, files).items():
                path = Path(scratch) / "new" / f"torch-{backend}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        if build.exists():
            shutil.move(build, Path(scratch) / "old")
        shutil.move(Path(scratch) / "new", build)
    return sorted(build.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description="Lay the kernel project out as kernels.get_local_kernel loads it.")
    parser.add_argument("--out", type=Path, default=PROJECT, help="folder to get build/ (default: %(default)s)")
    folder = parser.parse_args().out
    try:
        variants = lay_out(folder)
    except OSError as error:
        parser.exit(2, f"{error}\n")
    print(*(f"{path}  {json.loads((path / 'metadata.json').read_text())['id']}" for path in variants), sep="\n")
    print(f"load it: kernels.get_local_kernel(pathlib.Path({str(folder.resolve())!r}))")


if __name__ == "__main__":
    main()
