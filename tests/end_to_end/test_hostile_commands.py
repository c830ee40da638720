"""Command lines that no one should type: each ends with a sentence, and soon."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from steepest import cli
from steepest.commands import COMMANDS
from steepest.lab.arguments import _options
from steepest.lab.studies import edge_of_stability
from steepest.lab.sweep import runs

SECONDS = 20  # for one command, on a busy machine
SAMPLES = 25  # of each command

MINE = """
import sys, torch
from torch import nn

def build(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

def batches(inputs=6, count=20, classes=True):
    torch.manual_seed(1)
    while True:
        x = torch.randn(count, inputs)
        yield x, x[:, :3].argmax(1) if classes else torch.randn(count, 3)

def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1])
def optimizer(model): return torch.optim.AdamW(model.parameters())

def exits(*a, **k): sys.exit(0)
def exits_by_name(*a, **k): raise SystemExit("bye")
def closes(*a, **k): raise GeneratorExit("closed")
def stops(*a, **k): raise Stop("stopped")
def fails(*a, **k): return {}["missing"]
def opens(*a, **k): return open("/no/such/file")
def runs_out(*a, **k): raise MemoryError
def recurses(*a, **k): return recurses()
def nothing(*a, **k): return None
def not_callable(*a, **k): return 3
def many(model, batch): return model(batch[0])
def not_finite(model, batch): return loss(model, batch) * float("nan")
def detached(model, batch): return loss(model, batch).detach()
def no_batches(): return []
def one_batch(): return [next(batches())]
def wide_batches(): return batches(inputs=7)
def empty_batches(): return batches(count=0)
def float_batches(): return batches(classes=False)
def text_batches(): return ["abc"] * 100
def breaking_batches():
    yield next(batches())
    raise OSError(28, "No space left on device")
def stopping_batches():
    for _ in range(5): yield next(batches())
    raise Stop("no more")
class Stop(BaseException): pass
class ClosingStep(torch.optim.SGD):
    def step(self, closure=None): raise GeneratorExit("in a step")
def closing_step(model): return ClosingStep(model.parameters(), lr=0.1)
class ClosingForward(nn.Linear):
    def forward(self, x): raise GeneratorExit("forward")
def closing_forward(**k): return ClosingForward(6, 3)
def no_parameters(**k): return nn.Identity()
def vectors(**k): return nn.LayerNorm(6)
def frozen(width=8): return build(width).requires_grad_(False)
def on_meta(width=8):
    with torch.device("meta"):
        return build(width)
def of_others(model): return torch.optim.SGD(build().parameters(), lr=0.1)
def bad_rate(model): return torch.optim.SGD(model.parameters(), lr=-1)
class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    def backward(ctx, g): raise KeyError("in backward")
def breaking_backward(model, batch): return Backward.apply(loss(model, batch))
def in_place(model, batch):
    hidden = model(batch[0]).sigmoid()
    value = hidden.square().mean()
    hidden += 1
    return value
a_list = [1, 2]
"""
OTHER_MODULES = {
    "broken": "1 / 0",
    "torn": "def (",
    "leaves": "import sys; sys.exit(3)",
    "needs": "import no_such_package",
}

SMALL = {"--width": "16", "--depth": "1", "--model-options": "heads=2", "--batch": "2"}
SMALL |= {"--context": "16", "--data": "text.txt"}
GOOD: dict[str, tuple[list[str], dict[str, str]]] = {
    "train": ([], {**SMALL, "--steps": "2", "--validate-windows": "2"}),
    "study": ([], {**SMALL, "--steps": "2", "--seeds": "1", "--optimizers": "muon"}),
    "diagnose": (
        ["mine:build"],
        {"--batches": "mine:batches", "--level": "quick", "--count": "3"},
    ),
    "transfer": (
        ["mine:build"],
        {
            "--batches": "mine:batches", "--sizes": "width=8 width=16", "--steps": "4",
            "--seeds": "1", "--grid-only": "",
        },
    ),
    "reproduce": (
        ["spectral-condition"],
        {"--claim": "condition-is-sufficient", "--workers": "1"},
    ),
    "report": (["emptydir"], {}),
}  # fmt: skip
"""Of each command arguments that work (but for the report), and options with their values."""

MINES = ["build", "batches", "loss", "optimizer", *(
    line.split()[1].partition("(")[0].partition("=")[0]
    for line in MINE.splitlines()
    if line.startswith("def ") and "(" in line
), "a_list", "no_such_name", ""]  # fmt: skip
PATHS = ["mine:" + name for name in dict.fromkeys(MINES)]
PATHS += [f"{module}:x" for module in (*OTHER_MODULES, "no_such_module", "", ".", "a:b")] + ["mine"]

NUMBERS = ["nan", "inf", "-inf", "-1", "0", "-0.0", "1e400", "1e-320", "abc", "", "1,5", "9" * 30]
COUNTS = ["0", "-1", "1", "nan", "1.5", "2e1", "abc", "", "9" * 30, "9" * 5000, "true"]
FILES = ["text.txt", "text.txt/x", "emptydir", "readonly", ".", "/", "/proc/x", "/dev/null", ""]
FILES += ["no such/ü", "x" * 300, "page.html", "torn.json", "binary.bin"]
WORDS = ["", "no", "None", "muon muon", "[", "*", "a=1", "momentum=abc", "width=0", "width=8,"]
WORDS += [
    "width=16",
    "depth=2",
    "width=8 width=8",
    "width=" + "9" * 30,
    "cuda:99",
    "meta",
    "=",
    "é",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with files of all kinds, and workers that work in this process."""

    def one_after_another(
        work: Callable[..., None], tasks: Mapping[str, Any], workers: int
    ) -> Iterator[tuple[str, Any]]:
        for name, task in tasks.items():
            work(task, lambda message: None)
            yield name, None

    monkeypatch.setattr(runs, "in_processes", one_after_another)
    monkeypatch.setattr(edge_of_stability, "in_processes", one_after_another)
    (tmp_path / "mine.py").write_text(MINE)
    for name, text in OTHER_MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "text.txt").write_text("how vexingly quick daft zebras jump. " * 300)
    (tmp_path / "page.html").write_text("<html></html>")
    (tmp_path / "torn.json").write_text('{"kind": ')
    (tmp_path / "binary.bin").write_bytes(bytes(range(255)))
    (tmp_path / "emptydir").mkdir()
    (tmp_path / "readonly").mkdir(mode=0o500)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    (tmp_path / "readonly").chmod(0o700)


def _kind(command: str, option: str) -> Any:
    settings: Any = COMMANDS[command]
    for part in option.removeprefix("--").replace("-", "_").split("."):
        settings = get_type_hints(settings)[part]
    return settings


def _hostile(rng: random.Random, command: str, option: str) -> str:
    """A value for the option that it is not made for, or hardly."""
    if option in ("--batches", "--loss", "--optimizer") and command in ("diagnose", "transfer"):
        return rng.choice(PATHS)
    if option == "--data":
        return rng.choice(FILES)
    kind = _kind(command, option)
    if get_origin(kind) is UnionType:
        kind = get_args(kind)[0]
    values = {int: COUNTS, float: NUMBERS, Path: FILES}.get(kind, WORDS)
    return rng.choice(values)


def _command_line(rng: random.Random, command: str) -> list[str]:
    """Arguments that work, with one to three changes."""
    positional, options = GOOD[command][0].copy(), GOOD[command][1].copy()
    known = sorted(
        o for o in _options(COMMANDS[command])
        if o not in ("--compile", "--device", "--minutes", "--threads")
    )  # fmt: skip
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.random()
        if change < 0.75:
            option = rng.choice([o for o in known if "no-" not in o] or known)
            is_flag = _kind(command, option) is bool
            options[option] = "" if is_flag else _hostile(rng, command, option)
        elif change < 0.85:
            options[rng.choice(("--otu", "--learning-rate", "--model.widht", "-x", "---"))] = "3"
        elif positional:
            positional[0] = rng.choice(FILES if command == "report" else PATHS)
    words = [*positional]
    for option, value in options.items():
        several = get_origin(_kind(command, option)) is tuple if option in known else False
        words += [option, *(value.split(" ") if several else [value] * (value != "" or (option in
                  known and _kind(command, option) is not bool)))]  # fmt: skip
    return [command, *words]


@pytest.mark.parametrize("command", GOOD)
def test_hostile_command_lines_end_with_a_sentence(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(18)
    for _ in range(SAMPLES):
        _ends_well(_command_line(rng, command), capsys)


@pytest.mark.parametrize("option", ["build", "--batches", "--loss", "--optimizer"])
@pytest.mark.parametrize("command", ["diagnose", "transfer"])
def test_each_kind_of_bad_code_of_the_user_is_a_sentence(
    command: str, option: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--optimizer` of transfer is a word, which these are not."""
    for path in PATHS:
        positional, options = GOOD[command]
        options = options if option == "build" else {**options, option: path}
        words = [word for pair in options.items() for word in pair if word]
        words = [part for word in words for part in word.split(" ")]
        _ends_well([command, path if option == "build" else positional[0], *words], capsys)


def _ends_well(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def late(*_: Any) -> None:
        raise AssertionError(f"{arguments} is not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    code: Any = 0
    try:
        cli.main(arguments)
    except SystemExit as left:
        code = left.code
    except Exception as error:
        raise AssertionError(f"{arguments} raised {error!r}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said = capsys.readouterr()
    assert code in (0, 2, 3, 4), arguments
    assert "Traceback" not in said.err + said.out, arguments
    if code == 2:
        assert len(said.err.split()) > 4, arguments
        assert "steepest/src/" not in said.err.partition("In your code:")[2]


def test_an_error_of_the_users_code_names_the_place_and_shows_no_frame_of_ours(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = next(i for i, s in enumerate(MINE.splitlines(), 1) if s.startswith("def fails"))
    for arguments in (
        ["diagnose", "mine:build", "--batches", "mine:batches", "--loss", "mine:fails"],
        ["diagnose", "mine:build", "--batches", "mine:batches", "--optimizer", "mine:fails"],
        ["transfer", "mine:fails", "--batches", "mine:batches", "--sizes", "width=8", "width=16"],
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        said = capsys.readouterr().err
        assert f"mine.py, line {number}, in fails" in said
        sentence, _, lines = said.partition("In your code:")
        assert "'missing'" in sentence
        assert lines.rstrip().endswith("KeyError: 'missing'")
        assert "steepest" not in lines


def test_sys_exit_in_a_function_of_the_user_is_their_error_and_not_the_exit_code(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ["--batches", "mine:batches"]
    for arguments in (
        ["diagnose", "mine:exits", *good],
        ["diagnose", "leaves:x", *good],
        ["diagnose", "mine:build", *good, "--loss", "mine:exits_by_name"],
        ["transfer", "mine:exits", *good, "--sizes", "width=8", "width=16"],
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        said = capsys.readouterr().err
        assert "called sys.exit" in said
        assert "expected it to return, or to raise an Exception" in said


@pytest.mark.parametrize(
    ("arguments", "sentence", "where"),
    [
        ("mine:build --loss mine:closes", "mine:closes raised GeneratorExit('closed')", "closes"),
        ("mine:stops", "mine:stops raised Stop('stopped')", "stops"),
        ("mine:closing_forward", "the default loss raised GeneratorExit('forward')", "forward"),
        ("mine:build --optimizer mine:closing_step", "raised GeneratorExit('in a step')", "step"),
        (
            "mine:build --batches mine:stopping_batches",
            "raised Stop('no more')",
            "stopping_batches",
        ),
    ],
)
def test_what_is_no_exception_is_an_error_of_the_user_too(
    arguments: str, sentence: str, where: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both where a function of theirs is called and where an object of theirs is at work."""
    batches = [] if "--batches" in arguments else ["--batches", "mine:batches"]
    quick = ["--level", "quick", "--count", "4"]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["diagnose", *arguments.split(), *batches, *quick])
    said = capsys.readouterr().err
    first, _, lines = " ".join(said.split()).partition("In your code:")
    assert sentence in first
    assert f"in {where}; expected it to return, or to raise an Exception" in first
    assert "mine.py" in lines
    assert "steepest" not in lines


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "(did you mean train?)"),
        (["repotr", "x"], "(did you mean report?)"),
        (["train", "--stesp", "3"], "no option of `steepest train` (did you mean --steps?)"),
        (["study", "--widht", "3"], "no option of `steepest study` (did you mean --width?)"),
        (["diagnose", "--optmizer", "a:b"], "`steepest diagnose` (did you mean --optimizer?)"),
        (["reproduce", "edge-of-stability", "--optimizers", "muno"], "did you mean muon"),
        (["train", "--lr", "fast"], "got 'fast', expected a number"),
        (["study", "--steps", "1.5"], "got '1.5', expected a whole number"),
        (["train", "--steps", "3", "extra"], "got 'extra', which belongs to no option"),
        (["--lr", "3", "train"], "and its options behind it"),
        (["train", "--clip", "0"], "got clip=0.0, expected a finite number above 0"),
        (["diagnose", "a:b", "--batches", "a:b", "--clip", "0"], "leave --clip out"),
        (["diagnose", "a:b", "--batches", "a:b", "--clip", "1"], "--clip without --optimizer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_messages_name_what_is_close(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert sentence in said
    assert "float | None" not in said
    assert "FLOAT" not in said


def test_help_says_how_to_get_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["--version"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
        assert "version" in capsys.readouterr().out or arguments == ["--version"]
