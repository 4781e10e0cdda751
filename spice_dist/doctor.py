"""`spice-dist doctor`: check whether a run can start and finish here, before it waits in a queue.

Every check yields findings, each shown in one line; an error in a check is a finding, so that it hides no other.
"""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from spice_dist.config import Config, override
from spice_dist.cost import duration, measured_speed
from spice_dist.data.beton import check_pixels, verify
from spice_dist.data.decode import Packing
from spice_dist.data.decode_pool import packed_in_order
from spice_dist.data.files import publish_json
from spice_dist.data.left_out import left_out, left_out_line
from spice_dist.data.manifest import manifest_path
from spice_dist.data.sources import Source, is_beton
from spice_dist.distributed.worker import usable_cores
from spice_dist.errors import UserError
from spice_dist.launching import Launch, plan
from spice_dist.stages import check_settings, estimate

if TYPE_CHECKING:
    from spice_dist.distributed.ray_nodes import Report

OK, NOTE, BAD = "ok", "note", "BAD"
FREE = 5e9  # bytes that a run folder may need besides the packed images: checkpoints, features, a report
LIBRARIES = 1e9  # bytes of a worker that has imported torch
LOOK_AT = 20  # images of a source that are tried
OPEN_FILES = 4096  # Ray's processes hold a connection to each other


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: `OK`, `NOTE` (a run starts, but read this) or `BAD` (it would fail)."""

    check: str
    state: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state:<5}{self.check:<10}{self.text}{f'; fix: {self.fix}' * bool(self.fix)}"


@dataclass(frozen=True)
class IntendedRun:
    """The intended run, as far as it is given; without it only this machine is checked."""

    prepare: Callable[[], tuple[Source, Config]] | None = None  # UserError if they cannot be used
    out: Path | None = None
    launch: Launch = field(default_factory=Launch)


Check = Callable[[IntendedRun], Iterator[Finding]]


def findings(run: IntendedRun) -> Iterator[Finding]:
    """Run all checks in order; each relies on those before it."""
    checks: dict[str, Check] = {
        "python": python, "packages": packages, "torch": accelerator, "ffcv": ffcv, "limits": limits,
        "network": network, "slurm": slurm, "storage": storage, "ray": ray_cluster, "data": images,
    }  # fmt: skip
    for name, check in checks.items():
        try:
            yield from check(run)
        except UserError as error:
            yield Finding(name, BAD, str(error))
        except Exception as error:  # a broken library raises anything; the other checks still count
            yield Finding(name, BAD, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def python(run: IntendedRun) -> Iterator[Finding]:
    host = os.uname()
    machine = f"{host.sysname} {host.machine}, {usable_cores()} cores"
    yield Finding("python", OK, f"{platform.python_version()} on {machine}")


def packages(run: IntendedRun) -> Iterator[Finding]:
    """Compare with what pyproject.toml asks for, without its extras."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("spice_dist") or []]
    except PackageNotFoundError:
        yield Finding("packages", BAD, "spice_dist is not installed", "launch/setup.sh, or pip install -e .")
        return
    missing = [str(item) for item in wanted if item.marker is None and not _satisfied(item.name, item.specifier)]
    if missing:
        yield Finding("packages", BAD, f"not as needed: {', '.join(missing)}", "launch/setup.sh")
    else:
        shown = ", ".join(f"{name} {version(name)}" for name in ("spice_dist", "ray", "timm", "numpy"))
        yield Finding("packages", OK, shown)


def _satisfied(name: str, wanted) -> bool:
    try:
        return wanted.contains(version(name), prereleases=True)
    except PackageNotFoundError:
        return False


def accelerator(run: IntendedRun) -> Iterator[Finding]:
    """Check that torch sees the GPUs of this machine: otherwise a run trains on the CPU by mistake."""
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        text = f"{torch.__version__}, {torch.cuda.device_count()} GPUs ({', '.join(sorted(names))})"
        if torch.distributed.is_nccl_available():
            from torch.cuda import nccl

            yield Finding("torch", OK, f"{text}, NCCL {'.'.join(map(str, nccl.version()))}")
        else:
            yield Finding("torch", BAD, f"{text}, but no NCCL", "install a CUDA build of torch for Linux")
        return
    text = f"{torch.__version__}, no GPU"
    if Path("/dev/nvidia0").exists():
        why = "its build has no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda} does not start"
        fix = "install the build of torch for its driver (nvidia-smi tells)"
        yield Finding("torch", BAD, f"{text}, but this machine has one: {why}", fix)
    elif not torch.distributed.is_gloo_available():
        yield Finding("torch", BAD, f"{text}, no gloo", "install a build of torch with distributed")
    else:
        yield Finding("torch", OK, f"{text}: trains on the CPU, workers talk by gloo")


def ffcv(run: IntendedRun) -> Iterator[Finding]:
    """Import FFCV in a child process: a library of another version may crash it."""
    code = "from spice_dist.data.ffcv_decoder import why_no_ffcv as why; print(why() or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    missing = done.stdout.strip() if done.returncode == 0 else f"FFCV ends Python ({done.returncode})"
    if not missing:
        yield Finding("ffcv", OK, f"{version('ffcv')}, with its native decoder")
        return
    fix = "apt-get install libopencv-dev libturbojpeg0-dev, then launch/setup.sh"
    yield Finding("ffcv", NOTE, f"{missing}; torchvision decodes the images, slower", fix)


def limits(run: IntendedRun) -> Iterator[Finding]:
    files, shared = resource.getrlimit(resource.RLIMIT_NOFILE), shutil.disk_usage("/dev/shm").total
    if files[1] != resource.RLIM_INFINITY and files[1] < OPEN_FILES:
        yield Finding("limits", BAD, f"{files[1]} open files", f"ulimit -n {OPEN_FILES}, or limits.conf")
    elif shared < 1 << 28:
        fix = "docker run --shm-size 2g, or an emptyDir of medium Memory at /dev/shm"
        yield Finding("limits", NOTE, f"/dev/shm holds {shared >> 20} MB: Ray falls back to the disk", fix)
    else:
        yield Finding("limits", OK, f"{files[1]} open files, /dev/shm of {shared / 1e9:.1f} GB")


def network(run: IntendedRun) -> Iterator[Finding]:
    """Check that other nodes can reach the address of this host's name; Debian maps it to 127.0.1.1."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        yield Finding("network", NOTE, f"{host} has no address ({error})", "add it to /etc/hosts, unless it is alone")
        return
    if address.startswith("127."):
        fix = "start Ray with --node-ip-address, as launch/ and slurm/ do; on one machine it does not matter"
        yield Finding("network", NOTE, f"{host} is {address}, which other nodes cannot reach", fix)
    else:
        yield Finding("network", OK, f"{host} is {address}")


def slurm(run: IntendedRun) -> Iterator[Finding]:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        sbatch = shutil.which("sbatch")
        yield Finding("slurm", OK, f"{sbatch} is here, and this is no job" if sbatch else "none here")
        return
    names = ("SLURM_JOB_NUM_NODES", "SLURM_CPUS_ON_NODE", "SLURM_GPUS_ON_NODE")
    nodes, cores, gpus = (os.environ.get(name, "no") for name in names)
    memory = os.environ.get("SLURM_MEM_PER_NODE")
    text = f"job {job}: {nodes} nodes; on this one {cores} cores, {gpus} GPUs, {memory or 'no limit of'} MB"
    if memory is None:
        yield Finding("slurm", NOTE, text, "give --mem, or Ray counts the memory of the whole machine")
    elif not (shutil.which("scontrol") and shutil.which("srun")):
        yield Finding("slurm", BAD, f"{text}, but no srun and scontrol", "add SLURM's commands to PATH")
    else:
        yield Finding("slurm", OK, text)


def storage(run: IntendedRun) -> Iterator[Finding]:
    """Write where the run folder and the scratch folder are or will be, with the calls that save a checkpoint."""
    for option, wanted in (("--out", run.out), ("--scratch", run.launch.storage.scratch)):
        folder = _existing(wanted)
        if folder is not None:
            yield _of_folder(option, folder)


def _of_folder(option: str, folder: Path) -> Finding:
    probe = folder / f".doctor-{os.getpid()}.json"
    try:
        publish_json(probe, {})
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except (OSError, UserError) as error:
        return Finding("storage", BAD, f"{folder}: {error}", f"give another {option}, or ask for the rights")
    scarce = free < FREE
    text = f"{folder}: written, flushed and renamed; {free / 1e9:,.0f} GB free"
    return Finding("storage", NOTE if scarce else OK, text, "make room: a full disk stops checkpoints" * scarce)


def _existing(folder: Path | None) -> Path | None:
    """Return the folder if it exists, else the nearest existing one above it."""
    if folder is None:
        return None
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())


def ray_cluster(run: IntendedRun) -> Iterator[Finding]:
    from spice_dist.distributed import ray_auth, ray_local

    address = run.launch.address
    if address is None:
        if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):  # else a run makes its own
            ray_auth.require_private_token()
        folder = ray_local.temporary_folder()
        text = f"a run starts its own on this machine, with a token of its own and private files in {folder}"
        yield Finding("ray", OK, f"{version('ray')}; {text}")
        return
    from spice_dist.distributed import ray_nodes, ray_train

    with ray_train.session(address, 0, run.launch.insecure):
        if run.launch.insecure:
            yield Finding("ray", NOTE, f"{address} may let anybody in", "leave --insecure out")
        else:
            yield Finding("ray", OK, f"{address} asks for a token and takes the one of {ray_auth.token_place()}")
        here = ray_nodes.report_of_this_node(None, None).versions
        for name, report in ray_nodes.survey(_existing(run.out)):
            yield _of_node(name, report, here)
        seats, kind = ray_nodes.seats(), ray_nodes.kind_of_seat()
        wanted = run.launch.workers
        least = wanted[0] if isinstance(wanted, tuple) else wanted or 1
        if seats < least:
            yield Finding("ray", BAD, f"{seats} {kind}s for {least} workers", "fewer --workers, or more nodes")
        else:
            yield Finding("ray", OK, f"room for {seats} workers, a {kind} each")


def _of_node(name: str, report: "Report | str", here: dict[str, str]) -> Finding:
    if isinstance(report, str):
        fix = "install the same environment there: launch/setup.sh, launch/Dockerfile or launch/apptainer.def"
        return Finding("node", BAD, f"{name}: {report}", fix)
    other = [what for what in here if report.versions[what] != here[what]]
    if other:
        text = ", ".join(f"{what} {report.versions[what]} instead of {here[what]}" for what in other)
        return Finding("node", BAD, f"{name}: {text}", "install the same versions on every node")
    if report.problem:
        fix = "give an --out that every node mounts at the same place"
        return Finding("node", BAD, f"{name}: {report.problem}", fix)
    written = f", writes to --out ({report.free / 1e9:,.0f} GB free)" * bool(report.free)
    return Finding("node", OK, f"{name}: the same versions{written}")


def images(run: IntendedRun) -> Iterator[Finding]:
    """Check the data and, if it can be used, what the recipe costs on it."""
    if run.prepare is None:
        return
    source, config = run.prepare()
    packed_here = is_beton(source.name) and manifest_path(Path(source.name)).exists()
    yield _of_beton(Path(source.name)) if packed_here else _of_source(source, config)
    yield _of_cost(source, config, run.launch)


def _of_beton(path: Path) -> Finding:
    """Verify the structure and every checksum of a .beton file."""
    info = verify(path)
    check_pixels(info)
    return Finding("data", OK, f"{info.n:,} images, {info.file_size / 1e9:.2f} GB, structure and checksums as written")


def _of_source(source: Source, config: Config) -> Finding:
    """Decode some of the images, at even distances, as a run would."""
    subset = list(range(0, len(source.paths), max(1, len(source.paths) // LOOK_AT)))
    file = source.file
    tried = replace(
        source,
        paths=[source.paths[i] for i in subset],
        read=lambda i: source.read(subset[i]),
        file=None if file is None else lambda i: file(subset[i]),
    )
    packing = Packing("raw", 32, max_megapixels=config.data.max_megapixels)
    packed = packed_in_order(tried, packing, workers=1)
    bad = [name for name, result in zip(tried.paths, packed, strict=True) if isinstance(result, str)]
    text = f"{len(source.paths):,} images; of {len(subset)} tried {len(bad)} cannot be used"
    if line := left_out_line(left_out(source.ignored, len(source.refused), 0), len(source.paths)):
        text += f"; {line}"
    if bad:
        return Finding("data", NOTE, f"{text}, such as {bad[0]!r}", "look at it; more than data.max_bad stop a run")
    return Finding("data", OK, text)


def _of_cost(source: Source, config: Config, launch: Launch) -> Finding:
    """Estimate memory of the largest stage with the fewest workers, and time of all stages, on this machine."""
    check_settings(config, source, source.name)
    sizes, threads = plan(config, launch)
    gpu = torch.cuda.is_available()
    precision = config.precision if gpu or config.precision != "auto" else "fp32"
    workers, most = max(1, sizes[0]), max(1, sizes[-1])
    passes = 1 if gpu else config.bn_groups // workers
    costs = estimate(override(config, {"precision": precision}), source.training, source.clustered, workers, passes)
    largest, need = max(((name, cost.memory) for name, cost in costs.items()), key=lambda item: item[1])
    need = need if gpu else workers * (need + LIBRARIES)
    have = torch.cuda.mem_get_info()[0] if gpu else _memory()
    torch.set_num_threads(threads)
    speed = cache(partial(measured_speed, device=torch.device("cuda" if gpu else "cpu"), precision=precision))
    seconds = sum(cost.seconds(lambda network, learns: most * speed(network, learns)) for cost in costs.values())
    where = "on a GPU" if gpu else "here"
    text = (
        f"{need / 1e9:.1f} GB of {have / 1e9:.1f} GB {where} ({largest}, at {workers} workers); "
        f"about {duration(seconds)} with {most} workers as fast as this machine"
    )
    if need > have:
        return Finding("cost", BAD, text, "a smaller batch (--set), more workers, or a machine with more memory")
    left = float(os.environ.get("SLURM_JOB_END_TIME", "inf")) - time.time()
    if seconds > left:
        return Finding("cost", NOTE, f"{text}; this job ends in {duration(left)}", "--time, or let it be requeued")
    return Finding("cost", OK, text)


def _memory() -> float:
    """Return the bytes that this process and its children may still use: of the job, or else of the machine."""
    megabytes = os.environ.get("SLURM_MEM_PER_NODE")
    free = float(psutil.virtual_memory().available)
    return min(free, float(megabytes) * 2**20) if megabytes and megabytes.isdecimal() else free
