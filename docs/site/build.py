"""Lay the documents and the API's pages out, and let mkdocs build them: ``make docs``.

    python docs/site/build.py

Pages: README.md, CONTRIBUTING.md, docs/*.md, and one a folder of pyparallel from its docstrings. Links
to what is no page, such as code, are left as text. A link, an anchor or a docstring's name that leads
nowhere ends the build.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyparallel

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "build/docs/pages"
CONFIG = Path(__file__).with_name("mkdocs.yml")
# Where each document's page lies.
DOCUMENTS = {
    ROOT / "README.md": "index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    **{path: path.name for path in sorted((ROOT / "docs").glob("*.md"))},
}
ASSETS = (".svg", ".png")


def page_of(document: Path) -> str:
    """A document's text, its links those of the pages."""

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found.group(1), found.group(2), found.group(3) or ""
        if "://" in target or not target:
            return found.group(0)
        path = (document.parent / target).resolve()
        if path in DOCUMENTS:
            return f"[{text}]({DOCUMENTS[path]}{anchor})"
        if path.suffix in ASSETS:
            return f"[{text}]({path.relative_to(ROOT / 'docs')})"
        if not path.exists():
            raise SystemExit(f"{document.relative_to(ROOT)}: {target}: no such file")
        return text if text.startswith("`") else f"`{text}`"

    return re.sub(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", link, document.read_text())


def modules_of(folder: Path) -> list[str]:
    """Its modules with something public in them, by name."""
    found = []
    for path in sorted(folder.glob("*.py")):
        public = re.search(r"^(class|def) [a-zA-Z]|^[A-Z_]+ =", path.read_text(), re.MULTILINE)
        if public and not path.name.startswith("_"):
            found.append(path.stem)
    return found


def api_pages() -> dict[str, str]:
    """Of every folder that has modules, and of the public names."""
    pages = {}
    package = ROOT / "pyparallel"
    for folder in sorted({path.parent for path in package.rglob("*.py")}):
        name = ".".join(folder.relative_to(ROOT).parts)
        if modules := modules_of(folder):
            entries = "\n\n".join(f"::: {name}.{module}" for module in modules)
            pages[f"api/{name}.md"] = f"# {name}\n\n{entries}\n"
    rows = [f"| [`pyparallel.{name}`][{_home(name)}] | {_first_line(name)} |" for name in _public()]
    listed = "\n".join(f"- [{Path(page).stem}]({Path(page).name})" for page in pages)
    table = "\n".join(["| name | what it is |", "|---|---|", *rows])
    pages["api/index.md"] = f"# API\n\n{table}\n\n## By folder\n\n{listed}\n"
    return pages


def _public() -> list[str]:
    return [name for name in pyparallel.__all__ if not name.startswith("_")]


def _home(name: str) -> str:
    """The full name of a public one, where it is defined."""
    value = getattr(pyparallel, name)
    return f"{value.__module__}.{value.__qualname__}"


def _first_line(name: str) -> str:
    text = (getattr(pyparallel, name).__doc__ or "").strip().split("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    shutil.rmtree(PAGES, ignore_errors=True)
    (PAGES / "api").mkdir(parents=True)
    for document, page in DOCUMENTS.items():
        if document.exists():
            (PAGES / page).write_text(page_of(document))
    for path in (ROOT / "docs").rglob("*"):
        if path.suffix in ASSETS:
            copy = PAGES / path.relative_to(ROOT / "docs")
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    for page, text in api_pages().items():
        (PAGES / page).write_text(text)
    # mkdocs resolves what mkdocs.yml names from the folder that it is started in.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(CONFIG)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
