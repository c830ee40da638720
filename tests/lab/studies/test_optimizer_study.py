from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.data import load
from steepest.lab.errors import InputError
from steepest.lab.files import read_json, write_json
from steepest.lab.studies import optimizer_study
from steepest.lab.studies.optimizer_study import Contender, study
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.sweep import Run
from steepest.lab.terminal import optimizer_table
from steepest.lab.train import named_optimizer
from steepest.lab.train.run_folder import read_metrics
from steepest.printing import as_text


class Quiet:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.phases: list[tuple[str, list[str]]] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def phase(self, name: str, runs: list[Run]) -> None:
        self.phases.append((name, [run.out.name for run in runs]))

    def steps(self, running: dict[Path, int]) -> None:
        pass


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    text = tmp_path / "text.txt"
    text.write_text("pack my box with five dozen liquor jugs. " * 200)
    return StudyConfig(
        optimizers=("adamw", "muon"), steps=5, seeds=2, data=str(text), workers=2,
        width=16, depth=1, model_options=("heads=2",), context=16, batch=2,
    )  # fmt: skip


def _pretend(monkeypatch: pytest.MonkeyPatch, loss: Any) -> list[str]:
    """Replace training by a formula, to study the study."""
    made: list[str] = []

    def run_all(runs: list[Run], workers: int, on_progress: Any) -> None:
        for run in runs:
            if run.finished:
                continue
            made.append(run.out.name)
            run.out.mkdir(parents=True, exist_ok=True)
            value = loss(run.config.optimizer, run.config.rate, run.config.seed)
            result = {
                "status": "finished" if value is not None else "diverged",
                "validation_loss": value, "reason": "pretended", "step_seconds": 0.01,
                "optimizer_share": 0.1, "wall_seconds": 1.0, "start_seconds": 0.1,
                "validation_seconds": 0.01, "peak_memory_bytes": 1, "optimizer_state_bytes": 1,
            }  # fmt: skip
            write_json(run.out / "result.json", result)

    monkeypatch.setattr(optimizer_study, "run_all", run_all)
    return made


def _bowl(best: float) -> Any:
    """A loss with its minimum at a rate, and a little noise from the seed."""
    from math import log2

    return lambda name, rate, seed: 2.0 + 0.1 * log2(rate / best) ** 2 + 0.001 * seed


def _entry(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in summary["optimizers"] if entry["name"] == name)


def test_a_small_study_from_end_to_end(config: StudyConfig, tmp_path: Path) -> None:
    """Real runs: fair by construction, and not one of them run again."""
    first = Quiet()
    summary = study(config, tmp_path / "study", first)
    for entry in summary["optimizers"]:
        rates = [rate["lr"] for rate in entry["rates"]]
        assert len(rates) >= 3
        assert entry["validation_loss"]["n"] == 2
        assert entry["conditions"]
        assert len(entry["curves"]) == 2
        if entry["verdict"] == "tuned":
            assert rates[0] < entry["best_lr"] < rates[-1]
    assert _entry(summary, "adamw")["gap_to_baseline"] is None
    assert _entry(summary, "muon")["gap_to_baseline"]["n"] == 2
    again = Quiet()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "study").rglob("result.json")}
    repeated = study(config, tmp_path / "study", again)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "study").rglob("result.json")} == stamps
    assert repeated["optimizers"] == summary["optimizers"]
    more = study(replace(config, seeds=3), tmp_path / "study", Quiet())
    assert _entry(more, "muon")["validation_loss"]["n"] == 3
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_runs_differ_in_the_matrices_optimizer_alone(config: StudyConfig, tmp_path: Path) -> None:
    study(config, tmp_path / "study", Quiet())
    configs = [read_json(p) for p in (tmp_path / "study" / "runs").rglob("config.json")]
    varying = {"optimizer", "lr", "seed", "conditions_every"}
    shared = [{k: v for k, v in c.items() if k not in varying} for c in configs]
    assert len(shared) > 8
    assert all(each == shared[0] for each in shared)
    starts = {}
    for place in (tmp_path / "study" / "runs").iterdir():
        line = read_metrics(place)[0]
        starts.setdefault(read_json(place / "config.json")["seed"], set()).add(line["loss"])
    assert all(len(losses) == 1 for losses in starts.values())  # same init, same first batch


@pytest.mark.parametrize("best", [0.008, 0.03, 0.1, 0.002])
def test_a_grid_grows_until_the_best_rate_lies_inside(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: float
) -> None:
    _pretend(monkeypatch, _bowl(best))
    summary = study(config, tmp_path / "study", Quiet())
    for entry in summary["optimizers"]:
        rates = [rate["lr"] for rate in entry["rates"]]
        assert entry["verdict"] == "tuned"
        assert rates[0] < entry["best_lr"] < rates[-1]
        assert best / 1.5 < entry["best_lr"] < best * 1.5
        assert all(b / a == pytest.approx(2) for a, b in itertools.pairwise(rates))


def test_a_grid_that_diverges_everywhere_grows_without_a_hole(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowest = {name: min(named_optimizer(name).rates) for name in config.optimizers}
    _pretend(monkeypatch, lambda name, rate, seed: None if rate > lowest[name] / 3 else 2 - rate)
    summary = study(config, tmp_path / "study", Quiet())
    for entry in summary["optimizers"]:
        rates = [rate["lr"] for rate in entry["rates"]]
        assert entry["verdict"] == "tuned"
        assert entry["best_lr"] == lowest[entry["name"]] / 4
        assert all(b / a == pytest.approx(2) for a, b in itertools.pairwise(rates))


def test_an_optimum_out_of_reach_is_inconclusive(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, lambda name, rate, seed: 3.0 - rate if name == "muon" else 2.0 + rate)
    summary = study(config, tmp_path / "study", Quiet())
    assert [entry["verdict"] for entry in summary["optimizers"]] == ["inconclusive"] * 2
    assert "lies at the edge, and a grid grows no further" in _entry(summary, "muon")["reason"]
    monkeypatch.setattr(optimizer_study._Study, "time_for", lambda *_: False)
    summary = study(config, tmp_path / "hurried", Quiet())
    assert "lies at the edge, and the time was spent" in _entry(summary, "muon")["reason"]


def test_divergence_everywhere_or_of_a_seed_is_inconclusive(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bowl = _bowl(0.02)

    def loss(name: str, rate: float, seed: int) -> float | None:
        if name == "muon":
            return None
        return None if seed == 2 else float(bowl(name, rate, seed))

    _pretend(monkeypatch, loss)
    summary = study(config, tmp_path / "study", Quiet())
    muon, adamw = _entry(summary, "muon"), _entry(summary, "adamw")
    assert (muon["verdict"], muon["best_lr"], muon["validation_loss"]) == (
        "inconclusive",
        None,
        None,
    )
    assert "diverged" in muon["reason"]
    assert (adamw["verdict"], adamw["validation_loss"]["n"]) == ("inconclusive", 1)
    assert "1 of 2 fresh seeds diverged" in adamw["reason"]


def test_the_interval_comes_from_seeds_the_rate_was_not_chosen_on(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, _bowl(0.02))
    summary = study(config, tmp_path / "study", Quiet())
    muon = _entry(summary, "muon")
    assert muon["validation_loss"]["mean"] == pytest.approx(2.0 + 0.001 * (1 + 2) / 2)
    best = next(rate for rate in muon["rates"] if rate["lr"] == muon["best_lr"])
    assert [(run["seed"], run["purpose"]) for run in best["runs"]] == [
        (0, "tuning"), (1, "seed"), (2, "seed"),
    ]  # fmt: skip
    assert muon["gap_to_baseline"]["low"] is not None


def test_the_plan_keeps_to_the_budget_and_shrinks_the_model_before_the_safeguards(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, _bowl(0.02))
    planned = replace(config, steps=None, minutes=1.0, width=64, depth=4)
    quiet = Quiet()
    summary = study(planned, tmp_path / "a", quiet)
    runs = 2 * (3 + 1 + 2)
    steps = summary["settings"]["steps"]
    assert 0 < runs * steps * 0.01 / 2 < 60
    assert summary["settings"]["model width"] == 64
    tight = study(replace(planned, minutes=0.12), tmp_path / "b", quiet)
    assert tight["settings"]["model width"] < 64
    assert any("the model shrinks" in note for note in tight["plan"]["notes"])
    assert _entry(tight, "muon")["validation_loss"]["n"] == 2
    with pytest.raises(InputError, match="give more minutes"):
        study(replace(planned, minutes=0.01), tmp_path / "c", quiet)


def test_more_minutes_after_too_few_make_a_plan_of_their_own(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, _bowl(0.02))
    planned = replace(config, steps=None, minutes=1.0, width=64, depth=4)
    with pytest.raises(InputError, match="give more minutes"):
        study(replace(planned, minutes=0.01), tmp_path / "study", Quiet())
    summary = study(planned, tmp_path / "study", Quiet())
    assert summary["settings"]["model width"] == 64
    assert summary["plan"]["notes"] == []


def test_other_minutes_say_that_the_plan_stays(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, _bowl(0.02))
    planned = replace(config, steps=None, minutes=1.0)
    first, same, longer = Quiet(), Quiet(), Quiet()
    study(planned, tmp_path / "study", first)
    study(planned, tmp_path / "study", same)
    study(replace(planned, minutes=5.0), tmp_path / "study", longer)
    assert not any("the plan of" in said for said in first.said + same.said)
    assert any("the plan of 1 minutes" in said and "stays" in said for said in longer.said)


def test_runs_that_diverged_early_do_not_make_the_others_look_short(
    config: StudyConfig, tmp_path: Path
) -> None:
    planned = replace(config, steps=None, minutes=20 / 60)
    for name, result in [
        ("a", {"status": "finished", "wall_seconds": 10.0}),
        ("b", {"status": "diverged", "validation_loss": None}),
    ]:
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_json(tmp_path / "runs" / name / "result.json", result)
    plan = {"spent": 0.0, "notes": [], "steps": 5, "model": {"width": 16, "depth": 1}}
    write_json(tmp_path / "plan.json", plan)
    conducted = optimizer_study._Study(planned, tmp_path, load(planned.data), Quiet())
    assert not conducted.time_for(
        Contender("muon"), 0.5
    )  # five more runs by two workers: 25 seconds of 20


def test_a_finished_run_that_lost_measurements_is_an_error(
    config: StudyConfig, tmp_path: Path
) -> None:
    study(config, tmp_path / "study", Quiet())
    path = next((tmp_path / "study" / "runs").glob("muon-*-seed2")) / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match=r"cut off: .* step 5\."):
        study(config, tmp_path / "study", Quiet())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device": "nonsense"}, "not to be had here"),
        ({"momentum": 3.0}, "got momentum"),
        ({"context": 10**6}, "more than the context"),
    ],
)
def test_what_cannot_begin_leaves_no_folder(
    config: StudyConfig, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        study(replace(config, **changes), tmp_path / "study", Quiet())
    assert not (tmp_path / "study").exists()


def test_other_settings_in_the_same_folder_are_refused(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, _bowl(0.02))
    study(config, tmp_path / "study", Quiet())
    with pytest.raises(InputError, match=r"batch was 2, now 4"):
        study(replace(config, batch=4), tmp_path / "study", Quiet())


@pytest.mark.parametrize(
    "changes",
    [{"minutes": 0}, {"minutes": float("nan")}, {"seeds": 0}, {"optimizers": ()},
     {"optimizers": ("muon", "muon")}, {"steps": 0}, {"workers": 0}],
)  # fmt: skip
def test_impossible_settings_get_a_sentence(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="got"):
        StudyConfig(**changes)


def test_a_second_number_is_tuned_with_the_rate(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of each optimizer is found where its two numbers are best together."""
    place = {"adamw": (0.008, 0.1), "muon": (0.08, 0.0)}
    configs: list[Any] = []

    def run_all(runs: list[Run], workers: int, on_progress: Any) -> None:
        for run in runs:
            rate, decay = place[run.config.optimizer]
            loss = 2 + math.log(run.config.rate / rate) ** 2 + abs(run.config.weight_decay - decay)
            configs.append(run.config)
            run.out.mkdir(parents=True, exist_ok=True)
            write_json(run.out / "result.json", {"status": "finished", "validation_loss": loss})

    monkeypatch.setattr(optimizer_study, "run_all", run_all)
    varied = replace(config, vary="weight_decay=0,0.1,0.5")
    summary = study(varied, tmp_path / "study", Quiet())
    adamw, muon = _entry(summary, "adamw"), _entry(summary, "muon")
    assert (adamw["best_lr"], muon["best_lr"]) == (0.008, 0.08)
    assert adamw["verdict"] == muon["verdict"] == "tuned"  # no decay is no edge
    assert "the best weight_decay of 0, 0.1, 0.5 is 0.1" in adamw["reason"]
    assert [row["weight_decay"] for row in adamw["varied"]] == [0, 0.1, 0.5]
    shown = as_text(optimizer_table(summary), 120)
    assert next(line for line in shown.splitlines() if "best weight decay" in line).split()[
        -2:
    ] == [
        "0.1",
        "0",
    ]
    assert [row["best_lr"] for row in muon["varied"]] == [0.08] * 3
    fresh = {c.weight_decay for c in configs if c.seed > 0 and c.optimizer == "adamw"}
    assert fresh == {0.1}
    place["muon"] = (0.08, 0.9)
    summary = study(varied, tmp_path / "edge", Quiet())
    assert _entry(summary, "muon")["verdict"] == "inconclusive"
    assert "is 0.5, at the edge" in _entry(summary, "muon")["reason"]


@pytest.mark.parametrize(
    ("vary", "sentence"),
    [
        ("momentum", "expected one of momentum"),
        ("weight-decy=0,1", "did you mean weight_decay"),
        ("momentum=0.9,high", "expected numbers"),
        ("momentum=0.9", "at least two different values"),
        ("momentum=0.9,2", "got momentum=2"),
    ],
)
def test_a_second_number_that_cannot_be_varied(vary: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        StudyConfig(vary=vary)


def test_an_optimizer_that_ignores_the_second_number_is_tuned_without_it() -> None:
    names = ("muon", "signsgd", "muon:momentum=0.5", "torch.optim:Adagrad:lr=0.1")
    config = StudyConfig(vary="momentum=0.8,0.9,0.95", optimizers=names)
    assert [len(config.variants_of(name)) for name in names] == [3, 1, 1, 1]
    decay = StudyConfig(vary="weight_decay=0,0.1,0.5", optimizers=names)
    assert [len(decay.variants_of(name)) for name in names] == [3, 3, 3, 3]
