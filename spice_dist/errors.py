"""Errors and warnings that a user reads in one line."""

import warnings
from pathlib import Path

PACKAGE = Path(__file__).parent
_AS_BEFORE = warnings.formatwarning


class UserError(Exception):
    """A mistake in the input: what is wrong, where, and how to fix it. The command prints it and exits with 1."""


class Interrupted(Exception):
    """The run was asked to stop; the state is saved, and the same command resumes from it."""


class DamagedFile(UserError):
    """A file of this program that is truncated, altered or unfinished."""


def warn_in_one_line() -> None:
    """Print this package's warnings, from now on, without the file and the code that they come from."""
    warnings.formatwarning = _one_line


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
        return f"spice-dist: {message}\n"
    return _AS_BEFORE(message, category, filename, lineno, line)


def out_of_memory(stage: str, error: Exception) -> UserError:
    """Return the error for a GPU whose memory did not suffice."""
    reason = str(error).splitlines()[0] if str(error) else "out of memory"
    return UserError(f"{stage} needs more memory than the GPU has ({reason}); set a smaller batch or image size")
