"""The files in launch/ against the schemas of what reads them, and their rules for tokens and dashboards."""

import argparse
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
# Of the fields in the API reference of KubeRay 1.7.1, those that the files may use: its CRDs come in no package.
JOB_SPEC = {
    "entrypoint": {"type": "string"},
    "backoffLimit": {"type": "integer", "minimum": 0},
    "shutdownAfterJobFinishes": {"type": "boolean"},
    "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
    "deletionStrategy": {
        "deletionRules": [
            {
                "policy": {"enum": ["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]},
                "condition": {
                    "jobStatus": {"enum": ["SUCCEEDED", "FAILED"]},
                    "jobDeploymentStatus": {"const": "Failed"},
                    "ttlSeconds": {"type": "integer", "minimum": 0},
                },
            }
        ]
    },
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
}
CRON_SPEC = {
    "schedule": {"type": "string", "pattern": r"^\S+( \S+){4}$"},
    "timeZone": {"type": "string", "minLength": 1},
    "suspend": {"type": "boolean"},
    "jobTemplate": JOB_SPEC,
}
KINDS = {
    kind: {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": {"type": "object"}, "spec": spec}
    for kind, spec in (("RayJob", JOB_SPEC), ("RayCronJob", CRON_SPEC))
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


RUN, NIGHTLY = "kuberay.yaml", "kuberay_cron.yaml"


def resources(name: str) -> list[dict]:
    """The resources of a file and of the base that is applied with it, those of KubeRay first."""
    files = [(LAUNCH / file).read_text() for file in (name, "kuberay_base.yaml")]
    return [resource for file in files for resource in yaml.safe_load_all(file)]


def job_spec(resource: dict) -> dict:
    return resource["spec"].get("jobTemplate", resource["spec"])


def pods(job: dict) -> list[dict]:
    cluster = job_spec(job)["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(group["template"])} for group in groups]


def check_kubernetes(resources: list[dict]) -> None:
    """ValidationError unless the RayJob has only fields of KubeRay's, and all else only of Kubernetes'."""
    job, *others = resources
    jsonschema.validate(job, schema(KINDS[job["kind"]]))
    for resource in [*pods(job), *others]:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def check_deletion(job: dict) -> None:
    """AssertionError unless KubeRay's webhook and, with a queue, Kueue's would take what is deleted when."""
    spec = job_spec(job)
    queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    assert spec.get("shutdownAfterJobFinishes") or not queue, "Kueue wants its resources back"
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    assert not rules or not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & set(spec), "one way or the other"
    order = ["DeleteWorkers", "DeleteCluster", "DeleteSelf"]
    seconds: dict[str, list[tuple[int, int]]] = {}
    for rule in rules:
        condition = dict(rule["condition"])
        after = condition.pop("ttlSeconds", 0)
        ((_, state),) = condition.items()
        seconds.setdefault(state, []).append((after, order.index(rule["policy"])))
    for steps in seconds.values():
        assert [policy for _, policy in sorted(steps)] == sorted(policy for _, policy in steps), "the smallest first"


@pytest.mark.parametrize("name", [RUN, NIGHTLY])
def test_the_kuberay_files_are_as_kuberay_and_kubernetes_define_them(name):
    check_kubernetes(resources(name))
    check_deletion(resources(name)[0])


CLUSTER = ("rayClusterSpec",)


@pytest.mark.parametrize("name", [RUN, NIGHTLY])
@pytest.mark.parametrize(
    "path",
    [
        ("entrypont",),
        (*CLUSTER, "authOption"),
        (*CLUSTER, "workerGroupSpecs", 0, "replica"),
        (*CLUSTER, "headGroupSpec", "template", "spec", "container"),
        (*CLUSTER, "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"),
    ],
)
def test_a_misspelt_field_would_be_found(name, path):
    found = resources(name)
    misspell(job_spec(found[0]), path)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_kubernetes(found)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("PersistentVolumeClaim", ("spec", "accessMode")),
        ("NetworkPolicy", ("spec", "ingres")),
        ("ConfigMap", ("date",)),
        ("RayCronJob", ("spec", "timezone")),
        ("RayCronJob", ("spec", "jobTemplate", "deletionStrategy", "deletionRules", 0, "condition", "ttl")),
    ],
)
def test_a_misspelt_field_beside_the_job_would_be_found(kind, path):
    found = resources(NIGHTLY)
    misspell(next(resource for resource in found if resource["kind"] == kind), path)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_kubernetes(found)


def misspell(place: Any, path: tuple) -> None:
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = "x"


def test_a_kuberay_run_asks_for_a_token_and_runs_a_command_that_exists():
    from spice_dist.cli import parser

    (job, *_) = resources(RUN)
    spec = job_spec(job)
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    options = parser().parse_args(spec["entrypoint"].split()[1:])
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert options.workers == (2, 1 + group["maxReplicas"])  # the head is one
    mounted = pods(job)[0]["spec"]["containers"][0]["volumeMounts"]
    assert str(options.out).startswith(mounted[0]["mountPath"])
    assert not options.insecure


def test_every_night_goes_on_from_the_newest_run_that_is_finished(tmp_path):
    """Its script is run, with a program in place of spice-dist that prints its arguments."""
    from spice_dist.cli import parser

    job, script, *_ = resources(NIGHTLY)
    spec = job_spec(job)
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    program = tmp_path / "bin/spice-dist"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"")
    program.chmod(0o755)
    runs, (name, text) = tmp_path / "runs", script["data"].popitem()
    assert spec["entrypoint"] == f"bash /scripts/{name}"
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "DATA": "s3://bucket/photos", "RUNS": str(runs)}

    def tonight() -> argparse.Namespace:
        done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=True)
        return parser().parse_args(done.stdout.splitlines())

    first = tonight()
    assert (first.data, first.start, first.out.parent) == ("s3://bucket/photos", None, runs)
    for day, finished in (("2026-11-28", True), ("2026-11-29", True), ("2026-11-30", False), (first.out.name, True)):
        (runs / day).mkdir(parents=True)
        if finished:
            (runs / day / "metrics.json").touch()
    again = tonight()
    assert (again.start, again.out) == (runs / "2026-11-29", first.out)
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert again.workers == (1, 1 + group["maxReplicas"])


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
