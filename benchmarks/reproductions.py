"""Keep the verdicts of `steepest reproduce` in the docs: `python benchmarks/reproductions.py OUT`.

OUT is the folder that the command wrote. The summary of each paper goes to docs/reproductions, and
the tables of the README and of the pages there are written anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from steepest.files import read_json, sealed
from steepest.lab.papers import PAPERS
from steepest.lab.papers.tables import (
    between_marks,
    checks_page,
    claims_page,
    rounded,
    verdicts_page,
)

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "reproductions"


@dataclass(frozen=True)
class Settings:
    """Where the measurements are."""

    out: tyro.conf.Positional[Path | None] = None
    """The folder of `steepest reproduce`; without it the tables are written from what is kept."""


def stored() -> list[dict[str, Any]]:
    """Return the summaries that are kept, in the order of the papers."""
    files = [PAGES / f"{name}.json" for name in PAPERS]
    return [read_json(file) for file in files if file.exists()]


def pages() -> dict[Path, str]:
    """Return what every page with a generated table must be."""
    summaries = stored()
    written = {
        PAGES / f"{summary['paper']['name']}.md": ("claims", claims_page(summary))
        for summary in summaries
    }
    written[ROOT / "README.md"] = ("verdicts", verdicts_page(summaries, "docs/reproductions"))
    written[PAGES / "README.md"] = ("verdicts", verdicts_page(summaries, "."))
    written[PAGES / "checks.md"] = ("checks", checks_page(list(PAPERS.values())))
    return {
        page: between_marks(page.read_text(), mark, content)
        for page, (mark, content) in written.items()
    }


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    for name in PAPERS if settings.out else ():
        file = settings.out / "reports" / name / "summary.json"
        if not file.exists():
            print(f"{file} is not there; the page of {name} stays as it was")
            continue
        summary = rounded(read_json(file), digits=5)
        text = json.dumps(sealed(summary), separators=(",", ":"))
        (PAGES / f"{name}.json").write_text(text.replace('{"name":', '\n{"name":') + "\n")
    for page, text in pages().items():
        page.write_text(text)
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
