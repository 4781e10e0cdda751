"""The command as people expect it: help with examples, a version, completion, a reader that has had enough."""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import spice_dist
from spice_dist import cli

MODULE = [sys.executable, "-m", "spice_dist"]


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


@pytest.mark.parametrize("name", commands())
def test_every_help_ends_with_examples_that_the_command_understands(name):
    """Each line of the examples is parsed: an option that is renamed here is renamed there."""
    shown = commands()[name].format_help()
    _, _, examples = shown.partition("\nexamples:\n")
    calls = re.findall(r"(?<!_)spice-dist (\w.*?)(?: {3,}|[|)>]|$)", examples, re.MULTILINE)
    assert any(call.split()[0] == name for call in calls), "no example of the command itself"
    for call in calls:
        cli.parser().parse_args(call.split())


def test_alone_it_says_what_to_do_first(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 12
    for call in re.findall(r"spice-dist (\w.*?)(?: {3,}|;|$)", shown, re.MULTILINE):
        if call.split()[0] in commands() and "--help" not in call:
            cli.parser().parse_args(call.split())
    assert "fit digits --out runs/digits" in shown


def test_the_module_and_its_version(capsys):
    done = subprocess.run([*MODULE, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"spice-dist {importlib.metadata.version('spice_dist')}\n"
    assert spice_dist.__version__ in done.stdout


def test_the_package_shows_its_names_and_its_types():
    assert set(spice_dist.__all__) <= set(dir(spice_dist))
    assert (Path(spice_dist.__file__).parent / "py.typed").exists()
    listed = "import sys, spice_dist; dir(spice_dist); print({'torch', 'numpy', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("arguments", ["settings", "--help", "", "completion bash"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_closes_the_pipe_ends_it_quietly(arguments, unbuffered):
    """Also at the end of the interpreter, which writes what is still in its buffer; 141 as of any program there."""
    if arguments.startswith("completion"):
        pytest.importorskip("shtab")
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [*MODULE, *arguments.split()],
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(theirs)
    assert done.stderr == ""
    # argparse itself takes no notice where it writes the help without a buffer
    assert done.returncode == (cli.OK if unbuffered and arguments == "--help" else cli.CLOSED)


def test_a_broken_pipe_within_the_program_is_no_quiet_end(monkeypatch):
    def fail(*_):
        raise BrokenPipeError("a worker has ended")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(BrokenPipeError, match="a worker has ended"):
        cli.main(["settings"])


def completed(script: str, line: str, folder: Path) -> list[str]:
    """What bash offers at the end of a line."""
    words = line.split(" ")
    program = f"""
    {script}
    cd {folder}
    COMP_WORDS=({" ".join(word or "''" for word in words)}) COMP_CWORD={len(words) - 1}
    $(complete -p spice-dist | sed 's/.*-F \\([^ ]*\\).*/\\1/') spice-dist "{words[-1]}" "{words[-2]}"
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    return done.stdout.split()


def test_bash_completes_commands_options_choices_and_files(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "photos").mkdir()
    assert set(completed(script, "spice-dist ", tmp_path)) >= set(commands())
    assert completed(script, "spice-dist pred", tmp_path) == ["predict"]
    assert "--unreadable" in completed(script, "spice-dist predict --un", tmp_path)
    assert completed(script, "spice-dist predict --unreadable k", tmp_path) == ["keep"]
    assert "photos" in " ".join(completed(script, "spice-dist fit ph", tmp_path))


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_its_completion(capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", "zsh"]) == 0
    done = subprocess.run(["zsh", "-n"], input=capsys.readouterr().out, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)


def test_without_its_package_completion_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert "pip install shtab" in capsys.readouterr().err
