"""The files in launch/ against the schemas of what reads them, and their rules for tokens and dashboards."""

import copy
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
GROUP = {"rayStartParams": STRINGS, "template": {"type": "object"}}
# Of the fields in KubeRay's reference of its resources, those that the file may use: its CRD comes in no package.
RAY_JOB = {
    "apiVersion": {"const": "ray.io/v1"},
    "kind": {"const": "RayJob"},
    "metadata": {"type": "object"},
    "spec": {
        "entrypoint": {"type": "string"},
        "backoffLimit": {"type": "integer", "minimum": 0},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "rayClusterSpec": {
            "rayVersion": {"type": "string"},
            "authOptions": {"mode": {"enum": ["token", "disabled"]}, "secretName": {"type": "string"}},
            "headGroupSpec": GROUP,
            "workerGroupSpecs": [
                {
                    "groupName": {"type": "string"},
                    "replicas": {"type": "integer", "minimum": 0},
                    "minReplicas": {"type": "integer", "minimum": 0},
                    "maxReplicas": {"type": "integer", "minimum": 0},
                    **GROUP,
                }
            ],
        },
    },
}


def schema(fields: Any) -> dict:
    """The JSON schema of such a tree: an object has no other fields; what has a "type", "enum" or "const" is a leaf."""
    if isinstance(fields, list):
        return {"type": "array", "items": schema(fields[0])}
    if not isinstance(fields, dict) or any(
        isinstance(fields.get(name), str | list) for name in ("type", "enum", "const")
    ):
        return fields
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: schema(value) for name, value in fields.items()},
    }


@pytest.fixture
def resources() -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / "kuberay.yaml").read_text()))


def pods(job: dict) -> list[dict]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(group["template"])} for group in groups]


def check_kubernetes(resources: list[dict]) -> None:
    """ValidationError unless the RayJob has only fields of KubeRay's, and all else only of Kubernetes'."""
    job, *others = resources
    jsonschema.validate(job, schema(RAY_JOB))
    for resource in [*pods(job), *others]:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_the_kuberay_file_is_as_kuberay_and_kubernetes_define_it(resources):
    check_kubernetes(resources)


@pytest.mark.parametrize(
    "path",
    [
        (0, "spec", "entrypont"),
        (0, "spec", "rayClusterSpec", "authOption"),
        (0, "spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"),
        (0, "spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "container"),
        (0, "spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"),
        (1, "spec", "accessMode"),
        (2, "spec", "ingres"),
    ],
)
def test_a_misspelt_field_would_be_found(resources, path):
    place = resources
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = "x"  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_kubernetes(resources)


def test_a_kuberay_run_asks_for_a_token_and_runs_a_command_that_exists(resources):
    from spice_dist.cli import parser

    spec = resources[0]["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    options = parser().parse_args(spec["entrypoint"].split()[1:])
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert options.workers == (2, 1 + group["maxReplicas"])  # the head is one
    mounted = pods(resources[0])[0]["spec"]["containers"][0]["volumeMounts"]
    assert str(options.out).startswith(mounted[0]["mountPath"])
    assert not options.insecure


def test_ray_up_takes_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((LAUNCH / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(prepare_config({**config, "setup_command": []}))


def test_every_node_of_ray_up_asks_for_the_token_and_keeps_it_private():
    config = yaml.safe_load((LAUNCH / "ray_cluster.yaml").read_text())
    started = [config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert all("RAY_AUTH_MODE=token" in command for command in started)
    assert "--dashboard-host=127.0.0.1" in started[0]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert config["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"
    assert len(config["provider"]["worker_ips"]) == config["max_workers"]


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def"])
def test_images_copy_files_that_exist_and_install_what_setup_does(name):
    text = (LAUNCH / name).read_text()
    for file in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "spice_dist"):
        assert file in text
        assert (LAUNCH.parent / file).exists()
    wanted = re.search(r"debian_packages=\((.*?)\)", (LAUNCH / "setup.sh").read_text())
    assert wanted
    ours = [package for package in wanted[1].split() if not package.startswith("python3")]  # the image brings Python
    assert all(package in text for package in ours)
    assert "RAY_AUTH_MODE=token" in text


def test_the_image_has_the_libraries_that_ffcv_is_linked_to():
    ffcv = pytest.importorskip("ffcv.libffcv")
    linked = subprocess.run(["ldd", ffcv.lib._name], capture_output=True, text=True).stdout
    wanted = {f"libopencv-{part}406" for part in re.findall(r"libopencv_(\w+)\.so\.406 ", linked)}
    assert wanted
    assert wanted == set(re.findall(r"libopencv-\w+406", (LAUNCH / "Dockerfile").read_text()))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_pass_shellcheck():
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    assert scripts
    assert subprocess.run(["shellcheck", *scripts], capture_output=True, text=True).stdout == ""


def ray_job(tmp_path: Path, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/ray_job.sh where the dashboard answers `code`; in place of Ray's command, echo shows what it was told."""
    curl = tmp_path / "curl"
    curl.write_text(f"#!/bin/sh\nprintf {code}\n")
    curl.chmod(0o755)
    names = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "RAY": "echo", **environment}
    return subprocess.run([str(LAUNCH / "ray_job.sh"), *arguments], env=names, capture_output=True, text=True)


def test_a_job_goes_to_a_cluster_that_asks_for_the_token_of_a_private_file(tmp_path):
    token = tmp_path / "token"
    token.write_text("0" * 64)
    submit = ("fit", "/data/my photos", "--out", "/runs/a")
    for mode, words in ((0o600, ""), (0o644, f"chmod 600 {token}"), (0o640, f"chmod 600 {token}")):
        token.chmod(mode)
        done = ray_job(tmp_path, "401", *submit, RAY_AUTH_TOKEN_PATH=str(token))
        assert (done.returncode, words in done.stderr) == (int(mode != 0o600), True)
        assert stat.S_IMODE(token.stat().st_mode) == mode
    token.chmod(0o600)
    done = ray_job(tmp_path, "403", *submit, RAY_AUTH_TOKEN_PATH=str(token))
    address = "--address http://127.0.0.1:8265 --"
    assert done.stdout == f"job submit {address} spice-dist fit /data/my photos --out /runs/a --address auto\n"
    assert "no token" in ray_job(tmp_path, "401", *submit).stderr


def test_a_job_for_a_cluster_that_lets_anybody_in_is_refused_unless_told(tmp_path):
    refused = ray_job(tmp_path, "200", "fit", "digits")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--insecure" in refused.stderr
    told = ray_job(tmp_path, "200", "--insecure", "fit", "digits")
    assert told.stdout.endswith("-- spice-dist fit digits --address auto --insecure\n")
    assert ray_job(tmp_path, "000", "fit", "digits").returncode == 1


def test_commands_without_workers_are_not_told_of_the_cluster(tmp_path):
    done = ray_job(tmp_path, "200", "--insecure", "report", "/runs/a")
    assert done.stdout.endswith("-- spice-dist report /runs/a\n")


def checkout(folder: Path) -> Path:
    """A checkout whose programs only write down how they were called, to `calls`."""
    (folder / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "setup.sh", folder / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(LAUNCH.parent / name, folder)
    for program in ("bin/g++", "bin/pkg-config", "bin/apt-get", "bin/sudo", "bin/python3", ".venv/bin/python"):
        path = folder / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{path.name} $*" >>"{folder}/calls"\n')
        path.chmod(0o755)
    return folder


def set_up(folder: Path, *level: str) -> list[str]:
    """What launch/setup.sh installs by pip."""
    (folder / "calls").write_text("")
    names = {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
    subprocess.run([str(folder / "launch/setup.sh"), *level], env=names, check=True, capture_output=True)
    calls = (folder / "calls").read_text()
    assert "apt-get" not in calls
    return re.findall(r"-e (\S+)", calls)


def test_each_level_installs_what_it_needs_once_and_a_higher_one_is_enough(tmp_path):
    folder = checkout(tmp_path / "all")
    assert set_up(folder, "run") == [".[photos]"], "no FFCV, no compiler, no tools of tests"
    assert set_up(folder, "run") == []
    assert set_up(folder) == [".[photos,cluster]", ".[ffcv]"]
    assert set_up(folder, "test") == [".[photos,cluster,dev]", ".[ffcv]"]
    for level in ("run", "cluster", "test"):
        assert set_up(folder, level) == []
    again = checkout(tmp_path / "tests first")
    assert set_up(again, "test") == [".[photos,cluster,dev]", ".[ffcv]"]
    assert set_up(again, "run") == set_up(again) == []
    (again / "constraints.txt").write_text("changed")
    assert set_up(again, "run") == [".[photos]"]


def test_an_unknown_level_is_one_line(tmp_path):
    done = subprocess.run([str(LAUNCH / "setup.sh"), "all"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "run|cluster|test" in done.stderr


def test_the_quick_start_sets_up_what_runs_and_the_tests_what_tests():
    wanted = {"quickstart.sh": "run", "test.sh": "test", "test_slurm.sh": "test"}
    for script, level in wanted.items():
        assert f"launch/setup.sh {level}\n" in (LAUNCH / script).read_text()
