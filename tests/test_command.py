"""The command as people expect it: help with examples, a version, completion, a reader that has had enough."""

import argparse
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import spice_dist
from spice_dist import cli

REPOSITORY = Path(__file__).resolve().parents[1]
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


def test_a_broken_pipe_within_the_program_is_no_quiet_end(monkeypatch, capsys):
    def fail(*_):
        raise BrokenPipeError("a worker has ended")

    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(cli, "_write_to_nothing", lambda _: None)
    assert cli.main(["settings"]) == cli.MISTAKE
    assert capsys.readouterr().err == "spice-dist: a worker has ended\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("call", "code"), [("--version", 0), ("fit nowhere --out x", 1)])
def test_closed_streams_change_neither_the_code_nor_the_files(tmp_path, call, code, closed):
    """What would be opened next would get the number of a closed stream, and what is printed."""
    program = f"{sys.executable} -m spice_dist {call} {closed}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "2>" in closed or done.stderr.count("spice-dist: ") == code
    assert list(tmp_path.iterdir()) == []


def test_an_output_without_room_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(MODULE, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "spice-dist: No space left on device; make room, then start the same command again\n"
    assert done.returncode == cli.MISTAKE


def test_characters_that_a_terminal_lacks_are_escaped(monkeypatch):
    def show(*_):
        print("0.93 ± 0.01 日本")
        print("ü", file=sys.stderr)
        return 0

    shown = {name: io.TextIOWrapper(io.BytesIO(), "ascii") for name in ("stdout", "stderr")}
    for name, stream in shown.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(cli, "_run", show)
    assert cli.main([]) == 0
    shown["stderr"].flush()
    written = {name: stream.buffer.getvalue() for name, stream in shown.items()}  # type: ignore
    assert written == {"stdout": b"0.93 \\xb1 0.01 \\u65e5\\u672c\n", "stderr": b"\\xfc\n"}


CLOSED = [
    "fit {0}/closed --out {0}/open/r", "fit {0}/closed/in --out {0}/open/r", "fit {0}/closed/a.npy --out {0}/open/r",
    "fit {0}/closed/list.csv --out {0}/open/run", "fit {0}/closed/x.beton --out {0}/open/run",
    "fit {0}/in --config {0}/closed/config.json --out {0}/open/run", "fit cifar10:{0}/closed --out {0}/open/run",
    "fit digits --out {0}/closed/run", "pack {0}/in {0}/closed/x.beton --size 8", "pack {0}/closed/in {0}/open/x.beton",
    "predict {0}/closed digits", "predict {0}/closed/run digits", "predict {0}/run {0}/closed/a.png",
    "evaluate {0}/closed", "evaluate {0}/closed/run", "evaluate {0}/closed/run --probe knn", "report {0}/closed/run",
    "apply {0}/closed/run {0}/closed/edits.json", "export {0}/closed/run {0}/open/x.csv --to csv",
    "suggest-k {0}/closed", "predict {0}/run {0}/closed/list.txt",
]  # fmt: skip
# root without the capabilities by which permissions do not count for it
WITHOUT_RIGHTS = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, which counts from the next program on
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
TELL = """
import contextlib, io, json, os, sys, traceback
from spice_dist import cli
told = {"listed": os.access(sys.argv[1], os.R_OK)}
for line in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(line.split())
        except SystemExit as end:
            code = end.code
        except Exception:
            code = traceback.format_exc()
    told[line] = code, said.getvalue()
print(json.dumps(told))
"""


def test_folders_that_are_closed_are_one_line_in_every_command(tmp_path):
    for name in ("closed", "open", "in", "run/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run/model/model.json").write_text("{}")
    (tmp_path / "in/a.png").write_bytes(b"no image")
    (tmp_path / "closed").chmod(0)
    lines = [line.format(tmp_path) for line in CLOSED]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RIGHTS, TELL, str(tmp_path / "closed")],
        input=json.dumps(lines), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert not told.pop("listed"), "the folder must be closed to the command"
    for line, (code, said) in told.items():
        assert code == 1, (line, code)
        shown = said.splitlines()
        assert len([words for words in shown if words.startswith("spice-dist: ")]) == 1, (line, said)
        assert shown[-1].startswith("spice-dist: "), (line, said)
        assert "closed" in shown[-1] or "ermission" in shown[-1], (line, said)


@pytest.mark.parametrize(
    ("options", "line", "meaning"),
    [
        (
            "--nodes 4 --gpus 8",
            "--nodes=4 --gpus-per-node=8 --cpus-per-task=64 --mem=256G --time=24:00:00",
            "4 nodes for 24:00:00, each with 8 GPUs, 64 CPUs, 256G of memory; 32 workers, a number that bn_groups must "
            "be a multiple of (--set bn_groups=32)",
        ),
        (
            "--cpus 2 --mem 5000M --time 20 --partition main",
            "--nodes=1 --cpus-per-task=2 --mem=5000M --time=20 --partition=main",
            "1 node for 20, each with 2 CPUs, 5000M of memory",
        ),
    ],
)
def test_slurm_prints_what_sbatch_is_given_and_what_it_means(capsys, monkeypatch, options, line, meaning):
    monkeypatch.setenv("SPICE_HOME", str(REPOSITORY))
    command = "fit digits --out 'a b'"
    assert cli.main(["slurm", *options.split(), "--", *shlex.split(command)]) == 0
    assert capsys.readouterr().out == f"sbatch {line} {REPOSITORY}/slurm/fit.sbatch {command}\n{meaning}\n"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (None, "this machine has no sbatch"),
        (
            "echo 'sbatch: error: invalid partition specified: urgent' >&2; exit 1",
            "invalid partition specified: urgent",
        ),
    ],
)
def test_what_keeps_slurm_from_taking_a_job_is_one_line(capsys, monkeypatch, tmp_path, program, words):
    monkeypatch.setenv("PATH", str(tmp_path))
    if program:
        (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "sbatch").chmod(0o755)
    assert cli.main(["slurm", "--submit", "--", "fit", "digits", "--out", "runs/a"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert words in said


def test_slurm_without_a_checkout_says_how_to_name_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SPICE_HOME", str(tmp_path))
    assert cli.main(["slurm", "--", "fit", "digits", "--out", "runs/a"]) == 1
    assert "name the checkout, which has it, in SPICE_HOME" in capsys.readouterr().err


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
