"""Part 1: the last step of every training loop on the device against the CPU's, and against float64.

All three start from the same checkpoint, one step before the end of a short training on real images, and make the same
step: in float32 on the CPU, in float32 on the device, and with everything in float64 on the CPU. The distance of a
result x from the one in float64, r, is |x - r| / |r - s|, for each file of the checkpoint; s is the state before.

The device may be ALLOWED = 64 times as far from float64 as the CPU is. Other orders of summation and Winograd's
convolution take a part of that. TF32, which keeps 11 bits where float32 keeps 24, would be 2^13 = 8,192 times as far.
Where the CPU happens to be nearer than LEAST = 2^-22, a few roundings of the state, that counts in its place.

ReLU is replaced by SiLU: at its kink the smallest rounding decides which side is taken. TF32 is off, and every step is
made twice: deterministic kernels give the same bits.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from spice_dist import artifacts
from spice_dist.config import Config, override
from spice_dist.data.dataset import open_data, prepare
from spice_dist.data.sources import Source
from spice_dist.distributed import checkpoint, collectives
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import Interrupted
from spice_dist.recipes import cifar10_short
from spice_dist.stages import TABLE
from tests.gpu.context import OUT_OF_TIME, Context, apart
from tests.gpu.results import OutOfTime, in_one_line
from tests.methods.conftest import SMALL

NAME = "equal"
CPU = torch.device("cpu")
ALLOWED = 64.0
LEAST = 2.0**-22
TRAIN = {row.name: row for row in TABLE}
PRECISION = "fp32"  # of the device
FEW_STEPS = {
    "moco.epochs": 1,
    "byol.epochs": 1,
    "byol.warmup": 0,
    "imc_swav.epochs": 1,
    "spice_self.epochs": 2,
    "spice_semi.steps": 3,
    "scan.epochs": 1,
    "self_label.epochs": 1,
    "spice_tune.epochs": 2,
    "spice_tune.labelled": 16,
    "spice_tune.strong_views": 2,
    "spice_tune.guard_steps": 5,
    "spice_tune.neighbors": 0,
    "spice_tune.regroup": False,
    "spice_tune.head_steps": 20,
}
COLOUR = {  # CIFAR-10 with the networks of its recipes
    "moco.batch": 32,
    "moco.queue": 64,
    "byol.batch": 32,
    "byol.hidden": 512,
    "imc_swav.batch": 32,
    "imc_swav.prototypes": 64,
    "imc_swav.warmup": 2,
    "imc_swav.classifiers": 2,
    "spice_self.heads": 3,
    "spice_self.repeats": 1,
    "spice_semi.labelled": 16,
    "spice_semi.ratio": 3,
    "scan.batch": 32,
    "self_label.batch": 32,
    "self_label.threshold": 0.11,
}


@dataclass(frozen=True)
class Case:
    stage: str
    changes: dict[str, Any] = field(default_factory=dict)
    before: str = ""  # a stage without steps that must be done first

    @property
    def name(self) -> str:
        return " ".join([self.stage, *(f"{name}={value}" for name, value in self.changes.items())])


CASES = (
    Case("moco"),
    Case("byol"),
    Case("imc_swav"),
    Case("spice_self", before="features"),
    Case("spice_self", {"spice_self.joint": True}),
    Case("spice_semi", before="reliable"),
    Case("scan"),
    Case("self_label"),
    Case("spice_tune"),
)


@dataclass(frozen=True)
class ImageSet:
    name: str
    source: Source
    config: Config


def image_sets(context: Context) -> list[ImageSet]:
    """The digits, and CIFAR-10 where it is there."""
    digits = ImageSet("digits", few(open_data("digits"), 200), override(SMALL, FEW_STEPS))
    if context.cifar is None or context.tiny:
        return [digits]
    config = override(cifar10_short(), FEW_STEPS | COLOUR)
    return [digits, ImageSet("cifar10", few(open_data(f"cifar10:{context.cifar}"), 96), config)]


def few(source: Source, count: int) -> Source:
    assert source.labels is not None
    return replace(source, paths=source.paths[:count], labels=source.labels[:count])


def run(context: Context) -> None:
    torch.set_num_threads(min(8, torch.get_num_threads()))  # more would wait for each other in networks so small
    for images in image_sets(context):
        if all(context.results.row(NAME, f"{case.name} on {images.name}") for case in CASES):
            continue
        folder = context.folder / "runs" / f"{NAME}-{images.name}"
        shutil.rmtree(folder, ignore_errors=True)
        for step in (on_cpu, in_float64, on_device, with_process_group):
            why = apart(step, context, images, folder, deadline=context.deadline)
            context.results.read()
            if why == OUT_OF_TIME:
                raise OutOfTime
            if why:
                context.results.add(NAME, f"{step.__name__} on {images.name}", False, error=why)
        context.require_time()


# ---------------------------------------------------------------- the same step in several ways


def on_cpu(context: Context, images: ImageSet, folder: Path) -> None:
    """Leave for each case the state before its last step, `start`, and after it, `float32`."""
    base = folder / "base"
    prepare(images.source, images.config.data, artifacts.data(base))
    for case in CASES:
        context.require_time()
        try:
            with smooth():
                if case.before:
                    TRAIN[case.before].train(
                        *arguments(case.before, images.config), LocalWorker(base, case.before, CPU)
                    )
                start = copied(base, folder / case.name / "start")
                shutil.rmtree(start / case.stage, ignore_errors=True)  # that of other settings
                with suppress(Interrupted):
                    train(case, images, StopsBeforeLast(start, case.stage, CPU))
                after = copied(start, folder / case.name / "float32")
                train(case, images, LocalWorker(after, case.stage, CPU))
            if not case.changes:
                shutil.copytree(after / case.stage, base / case.stage)
        except Exception as error:
            failed(context, case, images, "on the CPU", error)


def in_float64(context: Context, images: ImageSet, folder: Path) -> None:
    with everything_in_float64():
        for case in CASES:
            again(context, case, images, folder, "float64", lambda run, stage: LocalWorker(run, stage, CPU))


def on_device(context: Context, images: ImageSet, folder: Path) -> None:
    def worker(run: Path, stage: str) -> LocalWorker:
        return LocalWorker(run, stage, context.device)

    with exact() as complaints:
        for case in CASES:
            started = monotonic()
            complaints.clear()
            for variant in ("device", "twice"):
                again(context, case, images, folder, variant, worker, PRECISION)
            if not all((folder / case.name / variant).exists() for variant in ("float64", "device", "twice")):
                continue  # a row says why
            with context.results.measured(NAME, f"{case.name} on {images.name}") as numbers:
                numbers |= compared(folder / case.name, case.stage, "device")
                one, two = (last_state(folder / case.name / variant / case.stage) for variant in ("device", "twice"))
                numbers["same_bits_twice"] = all(torch.equal(one[name], two[name]) for name in one)
                numbers["not_deterministic"] = sorted(set(complaints))
                numbers["ok"] = numbers.pop("within") and numbers["same_bits_twice"]
                numbers["step_seconds"] = monotonic() - started


def with_process_group(context: Context, images: ImageSet, folder: Path) -> None:
    """The same by way of a process group of one rank, whose collectives are called as those of several are."""

    def worker(run: Path, stage: str) -> LocalWorker:
        return GroupWorker(run, stage, context.device)

    backend = "nccl" if context.device.type == "cuda" else "gloo"
    store = folder / "store"
    if context.device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, f"file://{store.resolve()}", rank=0, world_size=1)
    with exact(), mock.patch.object(collectives, "alone", return_value=False):
        for case in CASES:
            again(context, case, images, folder, backend, worker, PRECISION)
            if not all((folder / case.name / variant).exists() for variant in ("float64", backend)):
                continue
            with context.results.measured(NAME, f"{case.name} on {images.name}, one rank of {backend}") as numbers:
                numbers |= compared(folder / case.name, case.stage, backend)
                numbers["ok"] = numbers.pop("within")


def again(
    context: Context,
    case: Case,
    images: ImageSet,
    folder: Path,
    variant: str,
    worker: Callable[[Path, str], LocalWorker],
    precision: str = "fp32",
) -> None:
    """Make the last step of the case once more, in a folder of the name of the variant."""
    context.require_time()
    if not (folder / case.name / "float32").exists():
        return
    after = copied(folder / case.name / "start", folder / case.name / variant)
    try:
        with smooth():
            train(case, images, worker(after, case.stage), precision)
    except Exception as error:
        shutil.rmtree(after)
        failed(context, case, images, variant, error)


def failed(context: Context, case: Case, images: ImageSet, variant: str, error: Exception) -> None:
    context.results.add(NAME, f"{case.name} on {images.name}", False, variant=variant, error=in_one_line(error))


def train(case: Case, images: ImageSet, worker: LocalWorker, precision: str = "fp32") -> None:
    config = override(images.config, case.changes | {"precision": precision})
    TRAIN[case.stage].train(*arguments(case.stage, config), worker)


def arguments(stage: str, config: Config) -> tuple[Config, Any]:
    return config, TRAIN[stage].settings_in(config)


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


class StopsBeforeLast(LocalWorker):
    """Saves the state before the last step, and ends the training there."""

    def report(self, step: int, total: int, *args: Any, **options: Any) -> None:
        self.stop_requested = lambda: step == total - 1
        super().report(step, total, *args, **options)


class GroupWorker(LocalWorker):
    """A worker of the process group, however few they are."""

    def wrap(self, module: nn.Module) -> nn.Module:
        wrapped = nn.parallel.DistributedDataParallel(module)
        wrapped.broadcast_buffers = False  # the argument for it has another name from torch 2.15 on
        return wrapped


@contextmanager
def smooth() -> Iterator[None]:
    with (
        mock.patch.object(nn.ReLU, "forward", lambda _, x: F.silu(x)),
        mock.patch.object(torch, "relu", F.silu),
    ):
        yield


@contextmanager
def everything_in_float64() -> Iterator[None]:
    """Let what is float32 be float64: new tensors, tensors of arrays, and what is made float explicitly."""
    from_numpy = torch.from_numpy

    def doubled(array: Any) -> Tensor:
        tensor = from_numpy(array)
        return tensor.double() if tensor.is_floating_point() else tensor

    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(Tensor, "float", Tensor.double),
            mock.patch.object(torch, "from_numpy", doubled),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def exact() -> Iterator[list[str]]:
    """Turn TF32 off and deterministic kernels on; the list takes the names of operations that have none."""
    complaints: list[str] = []

    def note(message: Warning | str, *args: Any, **options: Any) -> None:
        if "deterministic" in str(message):
            complaints.append(str(message).split()[0])

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    with ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        stack.enter_context(mock.patch.object(warnings, "showwarning", note))
        yield complaints


# ---------------------------------------------------------------- distances


def compared(case: Path, stage: str, variant: str) -> dict[str, Any]:
    """Hold the state that the variant has left against the CPU's, by their distances from float64.

    Returns: the largest distance of each, the file whose distance is largest beside what is allowed, and whether all
    are within that.
    """
    start = state_before(case / "float64" / stage)
    reference, cpu, other = (last_state(case / name / stage) for name in ("float64", "float32", variant))
    of_cpu, of_other = distances(start, reference, cpu), distances(start, reference, other)
    share = {name: of_other[name] / (ALLOWED * max(of_cpu[name], LEAST)) for name in of_other}
    worst = max(share, key=share.__getitem__)
    return {
        "distance": of_other[worst],
        "cpu": of_cpu[worst],
        "file": worst,
        "share_of_allowed": share[worst],
        "within": all(value <= 1 for value in share.values()),
        "loss": last_loss(case / variant / stage),
        "loss_cpu": last_loss(case / "float32" / stage),
    }


def distances(start: dict[str, Tensor], reference: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, float]:
    """Compute |x - r| / |r - s| for each file of a checkpoint; infinite where there is NaN or another tensor."""
    files = sorted({name.split("/")[0] for name in reference})
    return {file: distance(*(of_file(tensors, file) for tensors in (start, reference, state))) for file in files}


def of_file(tensors: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    return {name: value.double() for name, value in tensors.items() if name.startswith(f"{file}/")}


def distance(start: dict[str, Tensor], reference: dict[str, Tensor], state: dict[str, Tensor]) -> float:
    if reference.keys() != state.keys():
        return float("inf")
    zero = torch.zeros(())
    moved = sum(float((reference[name] - start.get(name, zero)).nan_to_num().square().sum()) for name in reference)
    error = sum(float((state[name] - reference[name]).square().sum()) for name in reference)
    if error == 0:
        return 0.0
    return (error / moved) ** 0.5 if moved and error == error else float("inf")


def last_state(stage: Path) -> dict[str, Tensor]:
    saved = checkpoint.newest(stage / "checkpoints")
    assert saved is not None
    return state(saved.path)


def state_before(stage: Path) -> dict[str, Tensor]:
    return state(min(path for path in (stage / "checkpoints").iterdir() if path.name.isdecimal()))


def state(path: Path) -> dict[str, Tensor]:
    saved = checkpoint.load(path)
    files = sorted(file.stem for file in path.glob("*.safetensors"))
    return {f"{file}/{name}": value for file in files for name, value in saved.tensors(file).items()}


def last_loss(stage: Path) -> float:
    return json.loads((stage / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
