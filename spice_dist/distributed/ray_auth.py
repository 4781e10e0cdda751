"""Authenticate at Ray clusters by a private token, since a process that may use a cluster can run any code on it."""

import atexit
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from spice_dist.distributed import ray_local
from spice_dist.errors import UserError

DEFAULT_TOKEN = Path("~/.ray/auth_token")  # where Ray looks if the environment names none
SECONDS = 10.0  # how long a cluster may take to answer
OWN_TOKEN = "token"  # in a private folder
OPEN, REFUSED = "open", "refused"
# Run by a child process, which reads mode and token by itself.
PROBE = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).get_all_node_info(timeout=float(sys.argv[2]))
    print("open")
except AuthenticationError:
    print("refused")
"""
AUTO = """
from ray._private.services import get_ray_address_from_environment
print(get_ray_address_from_environment("auto", None))
"""


def use_own_token() -> None:
    """Set the token of the cluster that this process starts: the user's, or a secret that its sessions share."""
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        require_private_token()
        _set_mode("token")
        return
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    token = stack.enter_context(ray_local.held_folder(Path(tempfile.gettempdir()))) / OWN_TOKEN
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    _set_mode("token")


def own_folders() -> list[Path]:
    """Return the private folder of the token that this process made, if it made one."""
    path = token_file()
    return [path.parent] if path.name == OWN_TOKEN and (path.parent / ray_local.HELD).exists() else []


def use_token_of(address: str, insecure: bool = False) -> None:
    """Let this process use the cluster at `address`, given as `host:port`.

    Raises:
        UserError: no cluster answers; it asks for no token and `insecure` is False; it refuses our token.
    """
    require_answer(address)
    if answer_to(address, {"RAY_AUTH_MODE": "disabled"}) == OPEN:
        if not insecure:
            raise UserError(
                f"the Ray cluster at {address} asks for no token: whoever reaches it runs code on it; start it with "
                "RAY_AUTH_MODE=token (launch/ray_cluster.yaml shows how), or give --insecure"
            )
        _set_mode("disabled")
        return
    require_private_token()
    if not has_token():
        raise UserError(
            f"the Ray cluster at {address} asks for a token, and none is here: put it into a file of mode 0600 and "
            "name that in RAY_AUTH_TOKEN_PATH"
        )
    if answer_to(address, {"RAY_AUTH_MODE": "token"}) != OPEN:
        raise UserError(
            f"the Ray cluster at {address} refuses the token of {token_place()}: copy the one it was started with"
        )
    _set_mode("token")


def _set_mode(mode: str) -> None:
    """Set Ray's authentication mode; a Ray that is imported already has read mode and token, and reads them again."""
    os.environ["RAY_AUTH_MODE"] = mode
    if "ray" in sys.modules:
        import ray._raylet

        raylet: Any = ray._raylet  # an extension module without types
        raylet.Config.initialize(json.dumps({"AUTH_MODE": mode}))
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def require_answer(address: str, seconds: float = SECONDS) -> None:
    """Raise UserError at once if nothing listens at host:port; Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "://" in host:
        raise UserError(
            f"--address is {address!r}; give host:port of the cluster's head, or auto on one of its nodes (from "
            "elsewhere: launch/ray_job.sh)"
        )
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"no Ray cluster answers at {address} ({reason}); start one or leave --address out") from error


def answer_to(address: str, environment: dict[str, str]) -> str:
    """Return how the cluster answers a process with these variables, OPEN or REFUSED; UserError if it does neither."""
    command = [sys.executable, "-c", PROBE, address, str(SECONDS)]
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=6 * SECONDS
        )
        answer = done.stdout.strip()
    except subprocess.TimeoutExpired:
        answer = ""
    if answer not in (OPEN, REFUSED):
        raise UserError(f"what answers at {address} is no Ray cluster of this version; give the port of its head node")
    return answer


def resolved(address: str) -> str:
    """Resolve "auto" to host:port: the cluster that RAY_ADDRESS names, else the one that runs on this machine."""
    if address != "auto":
        return address
    try:
        done = subprocess.run([sys.executable, "-c", AUTO], capture_output=True, text=True, timeout=6 * SECONDS)
        running = "" if done.returncode else done.stdout.strip()
    except subprocess.TimeoutExpired:
        running = ""
    if not running:
        raise UserError("--address is auto, but no Ray cluster runs on this machine; give host:port")
    return running


def has_token() -> bool:
    """Return whether Ray would find a token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    return token_file().is_file()


def token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_TOKEN).expanduser()


def token_place() -> str:
    """Return where Ray's token is; never the token."""
    return "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(token_file())


def require_private_token() -> None:
    """Raise UserError if others can read or write the file of Ray's token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_file()
    if path.is_file() and path.stat().st_mode & 0o077:
        raise UserError(f"others can read the token in {path}: make a new one, and chmod 600 {path}")
