"""Functions of the user's own: whose an error is, and where in their code it happened."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import steepest
from steepest.lab.errors import InputError

_OURS = os.path.dirname(os.path.abspath(steepest.__file__)) + os.sep
_INSTALLED = tuple(
    sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_CALLS_OF_MODULES = os.path.join("torch", "nn", "modules", "module.py")


class UserCodeError(InputError):
    """An error of the user's code: a sentence that names the place, and their traceback.

    Attributes:
        traceback: the lines of it that are not of this package; empty if the error was raised by
            what their code handed over, and not in it.
    """

    def __init__(self, sentence: str, lines: str = ""):
        super().__init__(sentence)
        self.traceback = lines


def guarded(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the user's function. `user_code_error` knows its errors; `sys.exit` in it is one.

    Whatever it raises but `KeyboardInterrupt` leaves it as an `Exception`.

    Args:
        path: what the user calls it.
        function: what is at that path.
    """

    @functools.wraps(function)
    def call_of_user(*arguments: Any, **named: Any) -> Any:
        _ = path  # seen by `user_code_error`
        try:
            return function(*arguments, **named)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit, GeneratorExit, and classes beside Exception
            raise _no_exception(path, _frames(error), error) from error

    return call_of_user


def user_code_error(error: BaseException) -> UserCodeError | None:
    """Return what to tell the user if their own code raised this or what it comes from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserCodeError):
            return cause
        if (origin := _told(cause)) is not None:
            path, frames = origin
            if not isinstance(cause, Exception):
                return _no_exception(path, frames, cause)
            place, lines = _place(frames, path, cause)
            if cause is not error:  # ours already says what went wrong
                return UserCodeError(f"{error}{place}", lines)
            fault = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return UserCodeError(f"{path or 'your code'} failed: {fault}{place}", lines)
        cause = cause.__cause__
    return None


def _no_exception(
    path: str, frames: list[tuple[FrameType, int]], error: BaseException
) -> UserCodeError:
    """What to tell of `sys.exit` in the user's code, and of all else that is no `Exception`."""
    place, lines = _place(frames, path, error)
    fault = f"called sys.exit ({error!r})" if isinstance(error, SystemExit) else f"raised {error!r}"
    return UserCodeError(
        f"{path or 'your code'} {fault}{place}; expected it to return, or to raise an Exception",
        lines,
    )


@contextmanager
def sentences_for_errors() -> Iterator[None]:
    """Turn what the library refuses into an `InputError`, and errors of the user's code too."""
    try:
        yield
    except InputError:  # a sentence already
        raise
    except Exception as error:
        if (theirs := user_code_error(error)) is not None:
            raise theirs from error
        refusals = (ValueError, TypeError, FloatingPointError, NotImplementedError)
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            raise InputError(
                f"got {unknown[1]!r}, which is no setting of the optimizer; expected what its "
                "class takes"
            ) from error
        if isinstance(error, refusals):
            raise InputError(str(error)) from error
        if isinstance(error, RuntimeError | IndexError) and not _is_ours(_frames(error)[-1][0]):
            raise InputError(
                f"torch cannot do this with your model and loss: {sentence_of_torch(error)}"
            ) from error
        raise


def sentence_of_torch(error: Exception) -> str:
    """Return what torch says of its error, and of a wrong class what would be a right one.

    >>> sentence_of_torch(IndexError("Target 5 is out of bounds."))
    'Target 5 is out of bounds; expected classes from 0 to one less than the outputs of the model'
    """
    said = str(error).rstrip(".")
    if isinstance(error, IndexError) and said.startswith("Target"):
        said += "; expected classes from 0 to one less than the outputs of the model"
    return said


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    return list(traceback.walk_tb(error.__traceback__))


def _told(error: BaseException) -> tuple[str, list[tuple[FrameType, int]]] | None:
    """The path of the user's function and the frames behind its call, if it raised the error."""
    frames = _frames(error)
    for i, (frame, _) in reversed(list(enumerate(frames))):
        if frame.f_code.co_name == "call_of_user" and frame.f_code.co_filename == __file__:
            inside = frames[i + 1 :]
            if any(not _is_ours(frame) for frame, _ in inside) or not inside:
                return frame.f_locals["path"], inside
            return None
    ours = [
        i
        for i, (frame, _) in enumerate(frames)
        if _is_ours(frame) and not frame.f_code.co_flags & inspect.CO_GENERATOR  # of a `with` block
    ]
    called = frames[ours[0] :] if ours else []
    return ("", called) if any(_is_users(frame, "") for frame, _ in called) else None


def _place(frames: list[tuple[FrameType, int]], path: str, error: BaseException) -> tuple[str, str]:
    """Where in the user's code it was, as words and as a traceback; empty if it was elsewhere."""
    last = [(frame, line) for frame, line in frames if _is_users(frame, path)][-1:]
    lines = "".join(traceback.format_exception_only(error))
    if isinstance(error, SyntaxError) and error.filename:
        return f", at {error.filename}, line {error.lineno}", lines
    if not last:
        return "", ""
    [(frame, line)] = last
    first = next(i for i, (frame, _) in enumerate(frames) if _is_users(frame, path))
    shown = traceback.StackSummary.extract(
        (frame, line)
        for frame, line in frames[first:]
        if not _is_ours(frame) and not frame.f_code.co_filename.endswith(_CALLS_OF_MODULES)
    )
    lines = "".join([*shown.format(), lines])
    return f", at {frame.f_code.co_filename}, line {line}, in {frame.f_code.co_name}", lines


def _is_ours(frame: FrameType) -> bool:
    """Whether this package or the machinery of imports is running in the frame."""
    return frame.f_code.co_filename.startswith((_OURS, "<frozen importlib"))


def _is_users(frame: FrameType, path: str) -> bool:
    """Whether it is code of the user: no library's, but for one that they named a function of."""
    name = os.path.abspath(frame.f_code.co_filename)
    package = path.partition(":")[0].partition(".")[0]
    if package and str(frame.f_globals.get("__name__", "")).partition(".")[0] == package:
        return True
    return not (
        _is_ours(frame) or frame.f_code.co_filename.startswith("<") or name.startswith(_INSTALLED)
    )
