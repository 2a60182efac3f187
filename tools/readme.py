"""Write README.md from nbs/index.ipynb: its prose as it is, its code as fenced blocks, links and pictures relative to the repository.

    python tools/readme.py
"""
import json, posixpath, re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def from_top(match: re.Match) -> str:
    "A link relative to `nbs/` as one relative to the repository."
    target = match[1]
    return match[0] if re.match(r"[a-z]+:|#|/", target) else f"]({posixpath.normpath(posixpath.join('nbs', target))})"


def text_of(cell: dict) -> str | None:
    "A cell as markdown; None for hidden code."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return re.sub(r"\]\(([^)\s]+)\)", from_top, source)
    return None if cell["cell_type"] != "code" or source.startswith("#|") else f"```python\n{source}\n```"


def readme() -> str:
    "The README, as the landing page has it."
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(t.strip() for c in cells if (t := text_of(c))) + "\n"


if __name__ == "__main__": (ROOT / "README.md").write_text(readme(), encoding="utf-8")
