"""Keep passwords and tokens of URLs out of all that is shown and written."""

import ctypes
import re
import sys
from pathlib import Path
from urllib.parse import unquote

HIDDEN = "***"
SHORTEST = 4  # characters of a secret that is sought in a text; shorter ones are in any text
ARG_START, ARG_END = 48, 49  # fields of /proc/PID/stat, counted from 1: where the arguments are that ps shows


def without_secrets(url: str) -> str:
    """Return the URL without its user, password, query and fragment; any other text as it is."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    place, user = _parts(rest)[:2]
    return f"{scheme}://{place.removeprefix(user)}"


def hidden(text: str, url: str) -> str:
    """Return the text, such as an error of a library, with *** for whatever `without_secrets` leaves out of the URL."""
    for secret in secrets_of(url):
        text = text.replace(secret, HIDDEN)
    return text


def secrets_of(url: str) -> list[str]:
    """Return the texts that must not be seen, longest first: as the URL has them, and decoded."""
    _, user, query = _parts(url.partition("://")[2])
    values = re.split(r"[&;#]", query[1:])
    password = user[:-1].partition(":")[2] or user[:-1]  # without one the name is a token
    parts = [query, password, *values, *(value.partition("=")[2] for value in values)]
    found = {text for part in parts for text in (part, unquote(part)) if len(text) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def _parts(rest: str) -> tuple[str, str, str]:
    """Split what follows :// into (all before the query, the part of that which names a user, query and fragment)."""
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority = place.partition("/")[0]
    # without a port after the colon, a password with a slash that nobody has escaped
    unescaped = "@" not in authority and not authority.rpartition(":")[2].isdecimal() and ":" in authority
    before, at, _ = (place if unescaped else authority).rpartition("@")
    return place, before + at, rest[len(place) :]


def hide_arguments() -> None:
    """Overwrite the secrets in the arguments of this process, for sys.argv and for ps."""
    secrets = [secret for item in sys.argv for secret in secrets_of(item)]
    if not secrets:
        return
    sys.argv = [without_secrets(item) for item in sys.argv]
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # from the third on
    start, end = int(fields[ARG_START - 3]), int(fields[ARG_END - 3])
    shown = ctypes.string_at(start, end - start)
    for secret in secrets:
        shown = shown.replace(secret.encode(), b"*" * len(secret.encode()))
    ctypes.memmove(start, shown, len(shown))
