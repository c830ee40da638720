"""What a user names on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steepest import Monitor, Muon, cli
from steepest.diagnosis import Plan
from steepest.lab.errors import InputError
from steepest.lab.imports import imported
from steepest.lab.losses import loss_of

MINE = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
def batches():
    torch.manual_seed(1)
    while True:
        x = torch.randn(200, 6)
        yield x, x[:, :3].argmax(1)
def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
def three(model):
    return 3
class Box:
    inside = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: Any) -> str:
    name = f"mine_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    return name


def test_import_paths(mine: str) -> None:
    assert imported(f"{mine}:Box.inside") == 3
    assert isinstance(imported(f"{mine}:build")(), nn.Module)
    for path, sentence in (
        (mine, "my_package.module:name"),
        (f"{mine}:nothing", f"{mine} .* nothing; .*build"),
        ("no_such_module:name", "ModuleNotFoundError"),
        ("broken:name", "broken .*ZeroDivision"),
    ):
        with pytest.raises(InputError, match=sentence):
            imported(path)


def test_losses_by_default() -> None:
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.arange(5) % 3
    assert torch.equal(loss_of(model, (x, y)), F.cross_entropy(model(x), y))
    tokens = torch.randint(3, (2, 7))
    sequence = nn.Embedding(3, 3)
    expected = F.cross_entropy(sequence(tokens).flatten(0, 1), tokens.flatten())
    assert torch.equal(loss_of(sequence, [tokens, tokens]), expected)
    with pytest.raises(ValueError, match="batch of type Tensor"):
        loss_of(model, x)
    with pytest.raises(ValueError, match="integer classes"):
        loss_of(model, (x, torch.randn(5, 3)))


def test_the_command(mine: str, tmp_path: Path, capsys: Any) -> None:
    given = ["diagnose", f"{mine}:build", "--batches", f"{mine}:batches", "--out", "here"]
    cli.main([*given, "--loss", f"{mine}:loss", "--json"])
    out = capsys.readouterr().out
    assert '"kind": "diagnosis"' in out
    assert (tmp_path / "here" / "report.html").exists()
    assert len(Plan.load(tmp_path / "here" / "plan.toml")) == 4
    page = (tmp_path / "here" / "report.html").read_text()
    (tmp_path / "here" / "report.html").unlink()
    cli.main(["report", "here"])
    assert (tmp_path / "here" / "report.html").read_text() == page
    cli.main([*given[:-1], "there"])
    assert "0 " in capsys.readouterr().out
    assert "expected at least 4" in _refused([*given[:-1], "few", "--count", "2"], capsys)


def _refused(given: list[str], capsys: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(given)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_an_edited_plan_is_not_overwritten(
    mine: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    given = ["diagnose", f"{mine}:build", "--batches", f"{mine}:batches", "--level", "quick"]
    cli.main(given)  # in a folder that is named after the settings
    cli.main(given)  # nobody edited
    [plan] = tmp_path.glob("runs/diagnosis-*/plan.toml")
    edited = plan.read_text().replace("spectral", "adamw")
    plan.write_text(edited)
    with monkeypatch.context() as nothing:
        nothing.setattr("steepest.lab.studies.diagnosis_study.started", None)  # not even begun
        said = _refused(given, capsys)
    assert f"got {plan.relative_to(tmp_path)}, which was edited" in said
    assert "move it to another place, or choose another --out" in said
    assert plan.read_text() == edited
    plan.rename(tmp_path / "mine.toml")
    cli.main(given)
    assert plan.exists()


def test_a_folder_of_something_else_is_not_written_to(
    mine: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "other").mkdir()
    for name in ("config.json", "report.html"):
        (tmp_path / "other" / name).write_text('{"build": "another"}')
    given = ["diagnose", f"{mine}:build", "--batches", f"{mine}:batches", "--out", "other"]
    assert "other holds a run with other settings" in _refused(given, capsys)
    assert (tmp_path / "other" / "report.html").read_text() == '{"build": "another"}'


def test_what_is_no_model_no_batches_no_optimizer_no_file_is_a_sentence(
    mine: str, capsys: Any
) -> None:
    def said(model: str, batches: str, *more: str) -> str:
        return _refused(
            ["diagnose", f"{mine}:{model}", "--batches", f"{mine}:{batches}", *more], capsys
        )

    assert f"{mine}:loss failed: TypeError: loss() missing 2 required" in said("loss", "batches")
    assert "expected a model, or a function that takes no arguments" in said("loss", "batches")
    assert f"got '{mine}:batches', which gives a generator" in said("batches", "batches")
    assert "expected batches, or a function that takes no arguments" in said("build", "loss")
    assert "expected an iterable of batches" in said("build", "Box.inside")
    wrong = ("--level", "quick", "--optimizer", f"{mine}:three")
    assert "got an optimizer of type int, expected one of torch" in said("build", "batches", *wrong)
    missing = said("build", "batches", "--monitored", "nofile")
    assert "got nofile, which cannot be read" in missing
    assert "--out" not in missing


def test_nothing_to_tell_is_an_exit_code(mine: str, tmp_path: Path) -> None:
    (tmp_path / "noise.py").write_text(
        MINE.replace("x[:, :3].argmax(1)", "torch.randint(3, (200,))").replace("200", "4")
    )
    given = ["diagnose", "noise:build", "--batches", "noise:batches", "--level", "quick"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*given, "--count", "3"])
    assert stopped.value.code == 3


def test_the_audit_and_the_monitor_go_into_the_report(
    mine: str, tmp_path: Path, capsys: Any
) -> None:
    model = imported(f"{mine}:build")()
    batch = next(iter(imported(f"{mine}:batches")()))
    optimizer = Muon(model, lr=0.02)
    with Monitor(model, optimizer, every=1, path=tmp_path / "steps.jsonl"):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
    given = ["diagnose", f"{mine}:build", "--batches", f"{mine}:batches", "--out", "here"]
    given += ["--level", "quick", "--monitored", "steps.jsonl", "--optimizer"]
    (tmp_path / "optimizers.py").write_text(
        "import torch, steepest\n"
        "def some(model): return torch.optim.Muon([model[0].weight], lr=0.02)\n"
        "def all_of_it(model): return steepest.Muon(model)\n"
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main([*given, "optimizers:some"])
    assert stopped.value.code == 4
    assert "audit: not trained" in capsys.readouterr().out
    page = (tmp_path / "here" / "report.html").read_text()
    assert "Audit of the optimizer" in page
    assert "Over training" in page
    given[given.index("here")] = "there"
    cli.main([*given, "optimizers:all_of_it"])
    assert "audit:" not in capsys.readouterr().out
    (tmp_path / "steps.jsonl").write_text("no records")
    with pytest.raises(SystemExit) as stopped:
        cli.main([*given, "optimizers:all_of_it"])
    assert stopped.value.code == 2
    assert "expected the path= of a steepest.Monitor" in capsys.readouterr().err
