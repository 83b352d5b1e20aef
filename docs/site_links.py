"""A hook of mkdocs: files of the repository that the pages link to become part of the site, under repository/.

The pages are written so that their links work in the repository. Here a link that leaves docs/ is rewritten, and its
file is added. A link to a file that does not exist stays as it is, and `mkdocs build --strict` reports it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MOUNT = "repository"
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def repository_path(uri: str) -> str:
    """Where a page or file of the site lies in the repository."""
    return uri.removeprefix(f"{MOUNT}/") if uri.startswith(f"{MOUNT}/") else f"docs/{uri}"


def site_uri(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{MOUNT}/{path}"


def targets(path: str) -> set[str]:
    """The paths in the repository that a Markdown file links to."""
    text = FENCE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    return {normpath(os.path.join(os.path.dirname(path), link)) for _, link, _, _ in LINK.findall(text)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what these files link to in turn."""
    waiting = [repository_path(file.src_uri) for file in files if file.src_uri.endswith(".md")]
    seen = set(waiting)
    while waiting:
        for path in sorted(targets(waiting.pop()) - seen):
            source = ROOT / path
            if path.startswith("docs/") or not source.exists():
                continue
            if source.is_dir():
                source, path = source / "README.md", f"{path}/README.md"
            if not source.is_file() or path in seen:
                continue
            seen.add(path)
            files.append(File.generated(config, site_uri(path), abs_src_path=str(source)))
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links that leave docs/, and those of the files that were added."""
    here = page.file.src_uri
    folder = os.path.dirname(repository_path(here))

    def rewrite(match: re.Match[str]) -> str:
        path = normpath(os.path.join(folder, match[2]))
        if (ROOT / path).is_dir():
            path = f"{path}/README.md"
        uri = relpath(site_uri(path), os.path.dirname(here) or ".")
        return f"{match[1]}{uri}{match[3] or ''}{match[4]}"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in parts)
