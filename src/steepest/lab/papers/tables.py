"""Tables of the documentation: the claims of a paper, all verdicts, and the checks of every paper.

They are made from stored summaries and from the claims themselves, and never typed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from steepest.lab.errors import InputError
from steepest.lab.papers.claim import Paper
from steepest.lab.papers.judging import VERDICTS


def claims_page(summary: Mapping[str, Any]) -> str:
    """Return the claims of a paper with their verdicts, as Markdown; false claims come last."""
    lines = [
        "| claim | what it allows | paper | here | verdict |",
        "|---|---|---|---|---|",
    ]
    for claim in sorted(summary["claims"], key=lambda claim: bool(claim["control"])):
        about = (
            f"{_escaped(claim['sentence'])} `{claim['name']}`, {claim['place']}, {claim['source']}"
        )
        allowed = _escaped(f"{claim['quantity']}: {claim['limits']}")
        if claim["verdict"] in VERDICTS[2:]:
            verdict = f"{claim['verdict']}: {claim['reason']}"
        else:
            verdict = f"**{claim['verdict']}**"
        paper = _escaped(claim["paper"]) or "no figure"
        lines.append("| " + " | ".join((about, allowed, paper, _measured(claim), verdict)) + " |")
    return "\n".join(lines)


def verdicts_page(summaries: Sequence[Mapping[str, Any]], folder: str) -> str:
    """Return how many claims of every paper have which verdict, as Markdown.

    Args:
        summaries: one for each paper.
        folder: of the pages that the table leads to.
    """
    lines = [
        f"| paper | {' | '.join(VERDICTS)} |",
        f"|---|{'---:|' * len(VERDICTS)}",
    ]
    for summary in summaries:
        verdicts = [claim["verdict"] for claim in summary["claims"] if not claim["control"]]
        counts = [str(verdicts.count(verdict) or "") for verdict in VERDICTS]
        name = summary["paper"]["name"]
        lines.append(f"| [{name}]({folder}/{name}.md) | {' | '.join(counts)} |")
    return "\n".join(lines)


def checks_page(papers: Sequence[Paper]) -> str:
    """Return every check of the papers with the claims that answer it, or why there is none."""
    lines = []
    for paper in papers:
        lines += [
            f"## {paper.title}",
            "",
            "| check | what it asks | claims, or why there is none |",
        ]
        lines.append("|---|---|---|")
        for check, sentence in paper.checks.items():
            answers = [
                f"`{claim.name}` ({claim.place})" for claim in paper.claims if check in claim.checks
            ]
            answer = ", ".join(answers) or f"Left out: {paper.left_out[check]}"
            lines.append(f"| {check} | {sentence} | {answer} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def between_marks(text: str, mark: str, content: str) -> str:
    """Return a text with the content between `<!-- mark -->` and `<!-- /mark -->`.

    Raises:
        InputError: for a text without these two marks.

    >>> print(between_marks("<!-- a -->old<!-- /a -->", "a", "new"))
    <!-- a -->
    new
    <!-- /a -->
    """
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if begin not in text or end not in text:
        raise InputError(f"got a page without {begin} and {end}, expected both")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def rounded(value: Any, digits: int = 6) -> Any:
    """Return plain content with rounded numbers, which keeps stored files small.

    >>> rounded({"loss": [0.123456789, None, 12]})
    {'loss': [0.123457, None, 12]}
    """
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def _measured(claim: Mapping[str, Any]) -> str:
    """The mean with half its interval, or the values of all seeds where there is none."""
    values = [value for value in claim["values"] if value is not None]
    if not values:
        return ""
    interval = claim["interval"]
    if interval is None or interval["high"] == interval["value"]:
        return _short(fmean(values))
    return f"{_short(interval['value'])} ± {_short(interval['high'] - interval['value'], 2)}"


def _escaped(text: str) -> str:
    """A text without what Markdown would read as emphasis or as the end of a cell."""
    return re.sub(r"([|*_])", r"\\\1", text)


def _short(value: float, digits: int = 4) -> str:
    text = f"{value:.{digits}g}"
    return re.sub(r"e([+-])0", r"e\1", text)
