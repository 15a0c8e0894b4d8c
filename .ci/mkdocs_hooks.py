"""What the documentation site needs beyond MkDocs, so that the same files read well on GitHub.

- README.md, CONTRIBUTING.md, CHANGELOG.md and the tutorial notebook become pages.
- Links to files outside `docs/` lead to a page of the site that shows the file.
- Formulas become MathML, which browsers draw without a script.
"""

import base64
import html
import json
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/tutorial.ipynb": "tutorial.md",
}
NOTEBOOK = "examples/tutorial.ipynb"
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", flags=re.M | re.S)
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.S)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made of files outside `docs/`, and a page for each file that is linked."""
    sources = {page.src_uri: Path(page.abs_src_path).read_text() for page in files.documentation_pages()}
    for name, page in PAGES.items():
        if (ROOT / name).exists():
            is_notebook = name.endswith(".ipynb")
            text = _notebook(files, config) if is_notebook else (ROOT / name).read_text()
            sources[page] = text
            files.append(File.generated(config, page, content=text))
    linked = {name for page, text in sources.items() for name in _outside(page, text)}
    for name in sorted(linked):
        files.append(File.generated(config, _shown(name), content=_listing(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Points the links of a page to the pages of the site."""
    return _outside_code(markdown, lambda text: LINK.sub(lambda m: _link(page.file.src_uri, m), text))


def on_page_content(content: str, **_: Any) -> str:
    """Turns TeX into MathML."""
    return MATH.sub(
        lambda m: convert(html.unescape(m[3]).strip(), display="block" if m[2] == "[" else "inline"), content
    )


def _source_of(page: str) -> str:
    """The file of the repository that a page is made of."""
    made_of = {page: name for name, page in PAGES.items()}
    return made_of.get(page, f"docs/{page}")


def _target(page: str, link: str) -> str | None:
    """The file of the repository that a link of a page leads to; None for links elsewhere and within the page."""
    path = link.partition("#")[0]
    if re.match(r"[a-z]+:", link) or not path:
        return None
    return os.path.normpath(os.path.join(os.path.dirname(_source_of(page)), path))


def _outside(page: str, text: str) -> set[str]:
    """The files that a page links to and that are no pages by themselves."""
    links = [m[2] for part in CODE.split(text)[::2] for m in LINK.finditer(part)]
    targets = {_target(page, link) for link in links}
    outside = {name for name in targets if name and not name.startswith("docs/") and name not in PAGES}
    return {name for name in outside if (ROOT / name).exists()}


def _link(page: str, match: re.Match[str]) -> str:
    target, (_, _, anchor) = _target(page, match[2]), match[2].partition("#")
    if target is None:
        return match[0]
    if target in PAGES:
        target = PAGES[target]
    elif target.startswith("docs/"):
        target = target.removeprefix("docs/")
    elif (ROOT / target).exists():
        target = _shown(target)
    else:  # a picture of the notebook, or a broken link, which MkDocs reports
        return match[0]
    path = os.path.relpath(target, os.path.dirname(page) or ".")
    return f"{match[1]}{path}{'#' + anchor if anchor else ''}{match[3]}"


def _shown(name: str) -> str:
    return f"files/{name}.md"


def _listing(path: Path) -> str:
    """The page that shows a file or lists a folder."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path.relative_to(ROOT)}\n\n"
    if path.is_dir():
        return head + "".join(f"- `{p.name}`\n" for p in sorted(path.iterdir()) if not p.name.startswith(("_", ".")))
    language = {".py": "python", ".yaml": "yaml", ".md": "markdown", ".toml": "toml"}.get(path.suffix, "text")
    return f"{head}````{language}\n{path.read_text()}\n````\n"


def _outside_code(text: str, change: Any) -> str:
    parts = CODE.split(text)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def _notebook(files: Files, config: Any) -> str:
    """The notebook as a page: its text, its code, and the printed and drawn results that are stored in it."""
    parts = []
    for number, cell in enumerate(json.loads((ROOT / NOTEBOOK).read_text())["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"tutorial-{number}.png"
                content = base64.b64decode("".join(data["image/png"]))
                files.append(File.generated(config, picture, content=content))
                parts.append(f"![result of the cell above]({picture})")
            elif text := "".join(output.get("text", "")):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)
