"""Keep a finished run as the one that the README quotes: its claims, its figures, and what each result was made with and took.

    python tools/reference.py results reference/cpu
"""
import json, shutil, sys
from pathlib import Path


def keep(results: Path, reference: Path) -> None:
    "Put what is small of `results` in the place of `reference`."
    shutil.rmtree(reference, ignore_errors=True)
    shutil.copytree(results / "figures", reference / "figures")
    for name in ("claims.json", "claims.md", "profile.json", "manifest.json"): shutil.copy(results / name, reference)
    (reference / "runs").mkdir()
    for path in sorted(results.glob("*/*/result.json")):
        about = json.loads(path.read_text(encoding="utf-8")) | dict(cost=json.loads((path.parent / "cost.json").read_text(encoding="utf-8")))
        (reference / "runs" / f"{path.parts[-3]}-{path.parts[-2]}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": keep(*map(Path, sys.argv[1:]))
