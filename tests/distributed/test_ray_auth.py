"""Tokens: made private, never named, and asked for. What real clusters answer is in tests/slurm/test_ray_cluster.py."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spice_dist.distributed import ray_auth
from spice_dist.errors import UserError

VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def environment(monkeypatch):
    """Without a token, and as it was afterwards."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_cluster_of_our_own_gets_a_secret_in_a_private_file(environment):
    ray_auth.use_own_token()
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    secret = path.read_text()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in os.environ  # which every child and its listing would show
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(bytes.fromhex(secret)) == 32
    ray_auth.use_own_token()  # the next session of this process
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text() == secret


def test_each_secret_is_another(environment):
    secrets = []
    for _ in range(2):
        ray_auth.use_own_token()
        secrets.append(Path(os.environ.pop("RAY_AUTH_TOKEN_PATH")).read_text())
    assert secrets[0] != secrets[1]


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "head", "head:", "10.0.0.1:port", ":6379x"])
def test_an_address_that_is_none_is_told_in_one_line(address):
    with pytest.raises(UserError, match="give host:port"):
        ray_auth.require_answer(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999999", "no.such.host.invalid:6379"])
def test_where_nobody_answers_it_says_so_at_once(address):
    with pytest.raises(UserError, match="no Ray cluster answers at"):
        ray_auth.require_answer(address, seconds=2.0)


def answers(monkeypatch, **by_mode: str) -> list[str]:
    """A cluster that answers so to a process of each mode; the modes that asked are returned as they come."""
    asked: list[str] = []

    def answer(address: str, environment: dict[str, str]) -> str:
        asked.append(environment["RAY_AUTH_MODE"])
        return by_mode[asked[-1]]

    monkeypatch.setattr(ray_auth, "require_answer", lambda address: None)
    monkeypatch.setattr(ray_auth, "answer_to", answer)
    return asked


def test_a_cluster_that_lets_anybody_in_is_refused_unless_told(environment):
    asked = answers(environment, disabled="open")
    with pytest.raises(UserError, match="asks for no token"):
        ray_auth.use_token_of("head:6379")
    assert "RAY_AUTH_MODE" not in os.environ
    ray_auth.use_token_of("head:6379", insecure=True)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert asked == ["disabled", "disabled"]


def test_a_token_is_taken_from_a_private_file_and_must_be_the_clusters(environment, tmp_path):
    token = tmp_path / "token"
    environment.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    answers(environment, disabled="refused", token="refused")
    with pytest.raises(UserError, match="none is here"):
        ray_auth.use_token_of("head:6379")
    token.write_text("0" * 64)
    token.chmod(0o644)
    with pytest.raises(UserError, match="others can read"):
        ray_auth.use_token_of("head:6379")
    token.chmod(0o600)
    with pytest.raises(UserError, match=f"refuses the token of {token}"):
        ray_auth.use_token_of("head:6379")
    answers(environment, disabled="refused", token="open")
    ray_auth.use_token_of("head:6379")
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("default", ["token", "disabled"])
def test_the_mode_that_ray_takes_by_itself_changes_nothing(environment, default):
    """It is `disabled` for most clusters of Ray 2.60, and `token` for all from 2.61 on. The variable stands for it."""
    environment.setenv("RAY_AUTH_MODE", default)
    looked = subprocess.run([sys.executable, "-c", ray_auth.AUTO], capture_output=True, text=True)
    assert looked.returncode == 0 or "Could not find any running Ray" in looked.stderr, "it needs no token"
    for answer, insecure, mode in (("open", True, "disabled"), ("refused", False, "token")):
        asked = answers(environment, disabled=answer, token="open")
        environment.setenv("RAY_AUTH_TOKEN", "0" * 64)
        ray_auth.use_token_of("head:6379", insecure)
        assert (os.environ["RAY_AUTH_MODE"], asked[0]) == (mode, "disabled")
        environment.setenv("RAY_AUTH_MODE", default)
    ray_auth.use_own_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_look_for_a_cluster_of_this_machine_that_hangs_ends(environment):
    environment.setattr(ray_auth, "SECONDS", 0.1)
    environment.setattr(ray_auth, "AUTO", "import time; time.sleep(20)")
    began = time.monotonic()
    with pytest.raises(UserError, match="no Ray cluster runs on this machine"):
        ray_auth.resolved("auto")
    assert time.monotonic() - began < 10
