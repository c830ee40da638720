"""Runs or studies beside each other: what is equal, what differs, and what does not compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from steepest.lab.errors import InputError
from steepest.lab.report.wording import phrase
from steepest.lab.studies.schemas import kind_of
from steepest.lab.studies.stored import loss_unit, unit_of

MAIN = ("model", "data", "optimizer", "rate", "steps")
"""What a reader asks for first of a run."""
_REPEATED = {
    "model", "width", "depth", "model width", "model depth", "model options",
    "data", "batches", "optimizer", "lr", "steps",
}  # fmt: skip
"""Settings that say the same as `MAIN`."""
_MEASURING = ("every", "samples", "track", "profile")
"""How settings end that say what is measured or saved, and how often."""
_WINDOWS = ("context", "model context", "validate windows", "validation")
"""Settings that choose which part of the validation data is read."""
_LARGE = ("conditions", "sharpness")
"""Parts of a study that a comparison does not show."""


def comparison(summaries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the summary of a comparison, which holds the summaries of all its members.

    Args:
        summaries: of two or more runs or studies, by the names that are shown.

    Raises:
        InputError: for kinds that cannot be compared, or that are mixed.
    """
    kinds = {name: kind_of(summary) for name, summary in summaries.items()}
    if not set(kinds.values()) <= {"run", "study"} or len(set(kinds.values())) != 1:
        named = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise InputError(
            f"got {named}, expected several runs or several studies; give those of one kind"
        )
    kind = next(iter(kinds.values()))
    members = [{"name": name, "summary": _small(summary)} for name, summary in summaries.items()]
    return {
        "kind": "comparison",
        "title": f"{len(members)} {'runs' if kind == 'run' else 'studies'} compared",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "runs": members if kind == "run" else [],
        "studies": members if kind == "study" else [],
        "settings": _equal(_settings(members)),
        **{key: _equal(_parts(members, key)) for key in ("data", "environment")},
    }


def members_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the members of a comparison, each with a name and a summary."""
    return summary["runs"] or summary["studies"]


def _small(summary: dict[str, Any]) -> dict[str, Any]:
    """A study without what a comparison does not show; a run as it is."""
    if kind_of(summary) == "run":
        return summary
    return {
        **summary,
        "optimizers": [
            {key: value for key, value in entry.items() if key not in _LARGE}
            for entry in summary["optimizers"]
        ],
    }


def main_settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a reader asks for first of a run."""
    data = run.get("data") or {}
    values = (run["model"], data.get("name"), run["label"], run.get("lr"), run["steps"])
    return dict(zip(MAIN, values, strict=True))


def differing(members: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return the settings that are not the same for all, each with its value for each member.

    Of runs those in `MAIN` come first, and what is measured is left out.
    """
    is_run = all(kind_of(member["summary"]) == "run" for member in members)
    rows = [main_settings(member["summary"]) for member in members] if is_run else []
    main = [(name, [row[name] for row in rows]) for name in (MAIN if rows else ())]
    others = _settings(members)
    rest = [
        (name, [settings.get(name) for settings in others])
        for name in dict.fromkeys(name for settings in others for name in settings)
        if not (is_run and (name in _REPEATED or name.endswith(_MEASURING)))
    ]
    return [(name, values) for name, values in main + rest if _differ(values)]


def warnings_of(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each reason why losses of the members cannot be compared."""
    summaries = [member["summary"] for member in members]
    data, settings = _parts(members, "data"), _settings(members)
    units = [unit_of(summary) for summary in summaries]
    if _differ(units):
        named = phrase(list(dict.fromkeys(map(loss_unit, units))))
        return [f"Not comparable: these losses have other units, {named}."]
    sentences = []
    tokenizers = (
        [
            part.get("tokenizer") or own.get("tokenizer") or "bytes"
            for part, own in zip(data, settings, strict=True)
        ]
        if units[0] == "tokens"
        else ["none"]
    )
    names = [part.get("name") for part in data]
    if _differ(tokenizers):
        sentences.append(
            f"Losses are not comparable: the tokenizers differ ({_shown(tokenizers)}), so a token "
            "is not the same piece of text. Bits per byte stay comparable."
        )
    if _differ([part.get("sha256") for part in data]) and not (
        _differ(tokenizers) and not _differ(names)
    ):
        named = _shown(names) if _differ(names) else f"{names[0]}, with other contents"
        sentences.append(f"Losses are not comparable: the data differ ({named}).")
    windows = [[own.get(name) for name in _WINDOWS] for own in settings]
    if _differ(windows) and not sentences:
        sentences.append(
            "Losses are not quite comparable: the runs were validated on other windows, as "
            "the settings for context or validation differ."
        )
    baselines = [summary["baseline"] for summary in summaries if "baseline" in summary]
    if _differ(baselines):
        sentences.append(f"Gaps are to other baselines: {_shown(baselines)}.")
    open_ones = [
        f"{member['name']} ({member['summary']['status']})"
        for member in members
        if member["summary"].get("status", "finished") != "finished"
    ]
    if open_ones:
        have = "has" if len(open_ones) == 1 else "have"
        sentences.append(f"{phrase(open_ones)} {have} no final result.")
    return sentences


def machines_differ(members: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the times of the members come from machines that are not the same."""
    environments = _parts(members, "environment")
    keys = ("processor", "device", "cores", "platform")
    return _differ([[environment.get(key) for key in keys] for environment in environments])


def _parts(members: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    return [member["summary"].get(key) or {} for member in members]


def _settings(members: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings of all members under the names that a reader sees."""
    return [
        {str(name).replace("_", " "): value for name, value in settings.items()}
        for settings in _parts(members, "settings")
    ]


def _equal(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that are the same everywhere."""
    return {
        name: value
        for name, value in parts[0].items()
        if all(name in part and part[name] == value for part in parts)
    }


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])


def _shown(values: Sequence[Any]) -> str:
    return phrase(list(dict.fromkeys(map(str, values))))
