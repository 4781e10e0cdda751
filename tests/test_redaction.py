"""Secrets of URLs are shown nowhere; everything else of an address is."""

import subprocess
import sys

import pytest

from spice_dist.redaction import hidden, secrets_of, without_secrets

SECRET = "sesame-1234"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"https://me:{SECRET}@host:80/a@b/c.jpg?token={SECRET}&v=1#x", "https://host:80/a@b/c.jpg"),
        (f"https://{SECRET}@host/x", "https://host/x"),
        (f"s3://KEY:with/{SECRET}@bucket/x", "s3://bucket/x"),
        (f"simplecache::https://me:{SECRET}@host/x", "simplecache::https://host/x"),
        (f"--set=url=https://me:{SECRET}@host/x", "--set=url=https://host/x"),
    ],
)
def test_what_a_url_may_keep_secret_is_left_out_and_hidden_in_the_errors_of_libraries(url, shown):
    assert without_secrets(url) == shown
    assert SECRET not in hidden(f"cannot open {url} or {url!r}", url)


@pytest.mark.parametrize("text", ["photos/a@b:c?d", "s3://bucket/me@home/x", "https://host:8080/a@b", "--set", ""])
def test_texts_without_secrets_stay_as_they_are(text):
    assert without_secrets(text) == text
    assert secrets_of(text) == []


def test_a_password_is_found_alone_and_as_libraries_show_an_escaped_one():
    assert hidden(f"403 for {SECRET}", f"https://me:{SECRET}@host/x") == "403 for ***"
    assert hidden("no user with pass/word", "https://me:pass%2Fword@host/x") == "no user with ***"


def test_neither_the_process_list_nor_a_mistake_shows_them():
    url = f"nosuch://me:{SECRET}@host/x?sig={SECRET}-ü"
    program = (
        "import sys; from pathlib import Path; from spice_dist.cli import main\n"
        "before = Path('/proc/self/cmdline').read_bytes(); print(main())\n"
        "after = Path('/proc/self/cmdline').read_bytes(); print(len(before) == len(after), after, sys.argv)"
    )
    command = [sys.executable, "-c", program, "predict", ".", url, "--out", "x.csv"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60, text=True)
    assert SECRET not in done.stdout + done.stderr
    assert done.stdout.startswith("1\nTrue"), "nothing else of the arguments has moved"
    assert "'nosuch://host/x', '--out'" in done.stdout
