"""Every Python example about the kernels runs, and the guide explains every public name of the package."""

import re
from pathlib import Path

import pytest
import torch

import smooseg_kernels as sk

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "kernels.md"


def examples():
    blocks = []
    for path in (GUIDE, ROOT / "README.md", ROOT / "kernels" / "README.md", ROOT / "docs" / "adopt.md"):
        text = path.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: block.start(1)].count("\n")
            if "import smooseg_kernels" in block[1]:
                blocks.append(pytest.param(block[1], path, line, id=f"{path.relative_to(ROOT)}:{line}"))
    return blocks


@pytest.mark.parametrize(("code", "path", "line"), examples())
def test_example(code, path, line):
    torch.manual_seed(0)
    exec(compile("\n" * line + code, str(path), "exec"), {})  # with the line numbers of the document


@pytest.mark.parametrize("name", sorted({*sk.__all__, *(f"layers.{name}" for name in sk.layers.__all__)}))
def test_public_names_are_explained(name):
    assert re.search(rf"[`.]{re.escape(name)}\b", GUIDE.read_text(encoding="utf-8"))


def test_links_within_the_document_lead_somewhere():
    text = GUIDE.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= headings
    assert all((GUIDE.parent / target).is_file() for target in re.findall(r"\]\((?!#|https?:)([^)#]+)", text))
