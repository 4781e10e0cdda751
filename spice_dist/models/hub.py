"""Find a file of weights in the hub's cache, or download it with a deadline.

A child process downloads, since it can be ended: no library's time-out holds for a name look-up or a server that
trickles. The child puts a file into the cache only if it is complete and is the one that the hub announced.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from urllib.parse import urlsplit

from spice_dist.data.files import Progress

ANSWER_SECONDS = 6.0  # from the start of the child to the hub's description of the file
WINDOW_SECONDS = 10.0  # over which the speed of a download is measured
DOWNLOAD_SECONDS = 120.0  # for the whole file
PIECE = 1 << 18  # bytes written at a time, so that a slow download is not taken for a stalled one


class HubError(Exception):
    """A file is not available from the hub; the message is one clause."""


class NoSuchFile(HubError):
    """The hub answers, but lacks the file."""


def cached(repo: str, filename: str) -> Path | None:
    """Find a complete file in huggingface_hub's cache, or None; `repo` is "owner/name" or "owner/name@tag"."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repo.partition("@")
    try:
        path = try_to_load_from_cache(name, filename, revision=revision or None)
    except OSError:  # another user's cache that this one may not read
        return None
    return Path(path) if isinstance(path, str) and _is_whole(Path(path)) else None


def fetch(repo: str, filename: str, seconds: float, progress: Progress = lambda done, total: None) -> Path:
    """Download the file into the cache, within ANSWER_SECONDS for a first answer and `seconds` for the rest.

    A download that would take longer ends after WINDOW_SECONDS. `progress` gets (bytes received, all bytes).

    Raises:
        HubError: HF_HUB_OFFLINE is set, or the hub cannot be reached, answers with an error, or is too slow.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set")
    host = urlsplit(constants.ENDPOINT).netloc
    variables = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_CACHE": str(constants.HF_HUB_CACHE)}
    # Xet's partial files are elsewhere and show no speed; telemetry would send one more request
    variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    package = str(Path(__file__).parents[2])
    variables["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(
        [sys.executable, "-m", "spice_dist.models.hub", repo, filename, str(seconds)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **variables},
    )  # fmt: skip
    try:
        size = _first_answer(child, host)
        _wait(child, host, _partial_files(Path(constants.HF_HUB_CACHE), repo), size, seconds, progress)
    finally:
        _end(child)
    if (path := cached(repo, filename)) is None:
        raise HubError(f"{host} gave no whole file")
    return path


def _first_answer(child: subprocess.Popen, host: str) -> int:
    """Return the size of the file in bytes that the hub announces."""
    assert child.stdout is not None
    if not wait([child.stdout.fileno()], ANSWER_SECONDS):
        raise HubError(f"{host} did not answer within {ANSWER_SECONDS:g} s")
    return _answer(child, host)["size"]


def _wait(child: subprocess.Popen, host: str, folder: Path, size: int, seconds: float, progress: Progress) -> None:
    """Wait for the child's success; raise a HubError if it reports an error, or is too slow."""
    began = since = time.monotonic()
    before = first = _bytes_in(folder)
    while child.poll() is None:
        time.sleep(0.05 if time.monotonic() < began + 1 else 0.2)
        now, here = time.monotonic(), _bytes_in(folder)
        progress(min(max(here - first, 0), size), size)
        if here < before:  # a download is complete, this one or another process's
            before, since = here, now
        if now - since < WINDOW_SECONDS and now - began < seconds:
            continue
        if here - before < size * WINDOW_SECONDS / seconds or now - began >= seconds:
            speed = (here - before) / 1e3 / (now - since)
            raise HubError(f"{host} sends {speed:.3g} kB/s, too slow for {size / 1e6:.3g} MB within {seconds:g} s")
        before, since = here, now
    _answer(child, host)


def _answer(child: subprocess.Popen, host: str) -> dict:
    """Read the next line of the child; raise a HubError if it holds an error."""
    assert child.stdout is not None
    try:
        answer = json.loads(child.stdout.readline())
    except ValueError:
        raise HubError(f"the download from {host} ended without a word") from None
    if "error" in answer:
        raise (NoSuchFile if answer["missing"] else HubError)(f"{host} {answer['error']}")
    return answer


def _end(child: subprocess.Popen) -> None:
    child.terminate()  # it removes its partial file
    try:
        child.wait(2)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    assert child.stdout is not None
    child.stdout.close()


def _partial_files(cache: Path, repo: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache / repo_folder_name(repo_id=repo.partition("@")[0], repo_type="model") / "blobs"


def _bytes_in(folder: Path) -> int:
    """Count the bytes of all incomplete downloads in the folder: another process may be downloading this file."""
    total = 0
    for path in folder.glob("*.incomplete"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _is_whole(path: Path) -> bool:
    """Tell whether a file is as long as its header says; only safetensors have a header."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return path.is_file()
    try:
        with safe_open(path, framework="numpy") as file:
            return len(file.keys()) > 0
    except Exception:  # a page of HTML, an empty or an incomplete file
        return False


def _download(repo: str, filename: str) -> None:
    """Run in the child: print the size once the hub has answered, and one more line when the file is in the cache."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    constants.DOWNLOAD_CHUNK_SIZE = PIECE
    name, _, tag = repo.partition("@")
    revision = tag or None
    about = get_hf_file_metadata(hf_hub_url(name, filename, revision=revision), timeout=ANSWER_SECONDS)
    if not (about.commit_hash and about.etag and about.size):  # a log-in page or a proxy's front page
        raise HubError("is no model hub: its answer lacks what one says of a file")
    _say(size=about.size)
    earlier = try_to_load_from_cache(name, filename, revision=revision)
    if isinstance(earlier, str) and not _is_whole(Path(earlier)):
        _remove(Path(earlier))
    path = Path(hf_hub_download(name, filename, revision=revision))
    if not _is_whole(path) or (re.fullmatch("[0-9a-f]{64}", about.etag) and _sha256(path) != about.etag):
        _remove(path)
        raise HubError("sent something else than the file that it announced")
    _say(done=True)


def _remove(path: Path) -> None:
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(**said: object) -> None:
    print(json.dumps(said), flush=True)


def _clause(error: Exception) -> str:
    """Describe the failure of the host, without the text that libraries add."""
    response = getattr(error, "response", None)
    if (status := getattr(response, "status_code", None)) is not None:
        return f"answers with status {status}"
    if isinstance(error, HubError):
        return str(error)
    kind, reason = type(error).__name__, (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    if "Timeout" in kind:
        return "did not answer in time"
    return f"cannot be reached ({reason})" if "Connect" in kind else f"gave no file ({kind}: {reason[:200]})"


def _main(repo: str, filename: str, seconds: str) -> None:
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda *_: sys.exit(1))  # an exception, so that the partial file is removed
    signal.alarm(int(ANSWER_SECONDS + float(seconds)) + 1)  # ends the child even if the parent has died
    try:
        _download(repo, filename)
    except Exception as error:  # the internet, the hub and the disk each raise errors of their own
        missing = getattr(getattr(error, "response", None), "status_code", None) == 404
        _say(error=_clause(error), missing=missing)
        sys.exit(1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
