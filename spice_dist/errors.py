"""Errors and warnings that a user reads in one line."""

import errno
import os
import warnings
from pathlib import Path

PACKAGE = Path(__file__).parent
REMEDIES = {
    errno.EACCES: "; give a place that you may read and write, or ask for the rights",
    errno.EPERM: "; give a place that you may read and write, or ask for the rights",
    errno.EROFS: "; give a place that can be written",
    errno.ENOSPC: "; make room, then start the same command again",
    errno.EDQUOT: "; make room, then start the same command again",
    errno.EMFILE: "; allow more open files: ulimit -n 4096",
}
_AS_BEFORE = warnings.formatwarning


class UserError(Exception):
    """A mistake in the input: what is wrong, where, and how to fix it. The command prints it and exits with 1."""


class Interrupted(BaseException):
    """The run was asked to stop; the state is saved, and the same command resumes from it.

    Like KeyboardInterrupt no Exception: code that goes on after any error must not go on after this.
    """


class NotFinite(UserError):
    """The loss of a stage is infinite or no number at `step` of `total`."""

    def __init__(self, message: str, step: int, total: int):
        super().__init__(message)
        self.step, self.total = step, total


class DamagedFile(UserError):
    """A file of this program that is truncated, altered or unfinished."""


def of_system(error: OSError) -> str:
    """Return what the system refuses in one line, with the place and, where it is known, the remedy."""
    reason = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    remedy = REMEDIES.get(error.errno or 0, "")
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)!r}: "
    return f"{place}{reason}{remedy}"


def no_folder(path: Path) -> str:
    """Say why nothing can be written into a folder: there is none, or a file stands in its place."""
    file = next((place for place in (path, *path.parents) if os.path.isfile(place)), None)
    return f"there is no folder {path}" if file is None else f"{file} is a file, no folder"


def plain(text: str) -> str:
    """Return the text with Python escapes for what a terminal would obey: names of files can hold any character."""
    return "".join(c if c.isprintable() or c in "\t\n" else c.encode("unicode_escape").decode() for c in text)


def warn_in_one_line() -> None:
    """Print this package's warnings, from now on, without the file and the code that they come from.

    Those of scikit-learn are not printed: they name its functions, and the verdict of a run says what they mean.
    """
    warnings.formatwarning = _one_line
    warnings.filterwarnings("ignore", module="sklearn")


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
        return f"spice-dist: {plain(str(message))}\n"
    return plain(_AS_BEFORE(message, category, filename, lineno, line))


def out_of_memory(stage: str, error: Exception) -> UserError:
    """Return the error for a GPU whose memory did not suffice."""
    reason = str(error).splitlines()[0] if str(error) else "out of memory"
    return UserError(f"{stage} needs more memory than the GPU has ({reason}); set a smaller batch or image size")
