"""A secret key of this user, by which the program knows a packed file that it has written itself.

A checksum shows damage; a stranger can compute it too. A file without a seal of this key is read as foreign.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from spice_dist.data.files import read_regular


def key_file() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "spice_dist/seal.key"


def seal(content: bytes) -> str | None:
    """Return the HMAC-SHA256 of the content; None where no key can be kept, such as without a home."""
    key = _key() or _new_key()
    return None if key is None else _sealed(key, content)


def is_sealed(content: bytes, found: object) -> bool:
    """Return whether `found` is what `seal` returns for the content."""
    key = _key()
    return key is not None and hmac.compare_digest(str(found).encode(), _sealed(key, content).encode())


def _sealed(key: bytes, content: bytes) -> str:
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _key() -> bytes | None:
    """Return the key; None if there is none, or others can read or write it."""
    path = key_file()
    try:
        status = path.stat()
        return read_regular(path) if status.st_uid == os.geteuid() and not status.st_mode & 0o077 else None
    except OSError:
        return None


def _new_key() -> bytes | None:
    """Make the key, unless another process has made it meanwhile."""
    path = key_file()
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(mode=0o600, exist_ok=False)
        temporary.write_bytes(secrets.token_bytes(32))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return _key()
