"""A folder elsewhere, `scheme://...`, through fsspec: listed at once, read file by file, in any number of threads."""

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from spice_dist.data.folders import IMAGE_SUFFIXES, SYSTEM_FOLDERS, is_image_name, suffix_of
from spice_dist.data.sources import MAX_CELL_BYTES, BadImage, Listed, Source, folder_labels
from spice_dist.errors import UserError
from spice_dist.redaction import hidden, without_secrets

STAMPS = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified")  # one of them differs once a file changes
LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def is_remote(data: str) -> bool:
    """Return whether DATA is a remote address; `file://` is this machine, which is read without fsspec."""
    return "://" in data and not data.startswith("file://")


def remote_source(url: str, *, with_labels: bool) -> Source:
    """List the image files below `url`, by their names relative to it, in byte order; hidden ones are skipped.

    Raises:
        UserError: no such place, no permission, no image, or a library that is missing.
    """
    shown = without_secrets(url)
    system, root = _file_system(url, shown)
    try:
        files: dict[str, Any] = system.find(root, detail=True)
    except Exception as error:  # every file system raises other errors
        raise UserError(f"cannot list {shown}: {_first_line(error, url)}") from error
    if not files:
        raise UserError(f"there is nothing at {shown}: check the address")
    prefix = root.rstrip("/") + "/"
    inside = {
        name.removeprefix(prefix): details for name, details in files.items() if details.get("type") != "directory"
    }
    names = sorted(filter(_is_image, inside), key=os.fsencode)
    others = [name for name in inside if not _is_image(name) and not _is_hidden(name)]
    if not names:
        wanted = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"no image file at {shown}: found {len(files)} others, looked for {wanted}")
    labels, label_names = folder_labels(shown, names) if with_labels else (None, [])
    return replace(
        remote_files(url, names, [_listed(inside[name]) for name in names]),
        labels=labels,
        label_names=label_names,
        ignored=dict(Counter(suffix_of(name) for name in others)),
    )


def remote_files(url: str, names: list[str], listed: list[Listed]) -> Source:
    """Take the files of these names below `url`, as `remote_source` has listed them."""
    shown = without_secrets(url)
    system, root = _file_system(url, shown)
    bucket = _Bucket(system, root.rstrip("/") + "/", names, listed, url)
    return Source(shown, names, bucket.read, encoded=True, stamps=bucket.stamp, listed=listed.__getitem__)


def _listed(details: dict[str, Any]) -> Listed:
    return details.get("size") or 0, " ".join(str(details[key]) for key in STAMPS if key in details)


@dataclass(frozen=True)
class _Bucket:
    """Files elsewhere; unlike functions within functions, its methods can be sent to any process."""

    system: Any  # of fsspec
    prefix: str
    names: list[str]
    listed: list[Listed]
    url: str = field(repr=False)  # may hold a password

    def read(self, i: int) -> bytes:
        size = self.listed[i][0]
        if size > MAX_CELL_BYTES:
            raise BadImage(f"file of {size >> 20} MiB, at most {MAX_CELL_BYTES >> 20} are read")
        try:
            data = self.system.cat_file(self.prefix + self.names[i], start=0, end=MAX_CELL_BYTES + 1)
        except Exception as error:  # every file system raises other errors; the run goes on without this image
            raise BadImage(f"cannot read: {_first_line(error, self.url)}") from error
        if not 0 < len(data) <= MAX_CELL_BYTES:
            raise BadImage("empty file" if not data else f"more than {MAX_CELL_BYTES >> 20} MiB")
        return data

    def stamp(self, i: int) -> str:
        return self.listed[i][1]


def _file_system(url: str, shown: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.partition("://")[0]
    if scheme == "memory":
        raise UserError(f"{shown} is in the memory of another process: give a folder or a remote address")
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = LIBRARIES.get(scheme)
        hint = f"pip install {package}" if package else _first_line(error, url)
        raise UserError(f"reading {shown} needs another library: {hint}") from error
    except Exception as error:  # an unknown scheme, an address that is none
        raise UserError(f"cannot open {shown}: {_first_line(error, url)}") from error


def _is_image(name: str) -> bool:
    return not _is_hidden(name) and is_image_name(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in SYSTEM_FOLDERS for part in name.split("/"))


def _first_line(error: Exception, url: str) -> str:
    return hidden((str(error).strip() or type(error).__name__).splitlines()[0], url)
