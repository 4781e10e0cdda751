"""Run all stages in order: finished ones are skipped, interrupted ones resumed, changed settings refused."""

import contextlib
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spice_dist import artifacts
from spice_dist.config import Config, override
from spice_dist.data.checksums import record_files
from spice_dist.data.dataset import can_travel, ingest_options, open_data, prepare
from spice_dist.data.files import publish_json, require_regular_files
from spice_dist.data.sources import Source
from spice_dist.distributed import setbacks
from spice_dist.distributed.worker import LocalWorker, StageCall
from spice_dist.earlier import Earlier, carry_over
from spice_dist.errors import Interrupted, UserError, plain
from spice_dist.evaluate import note_seconds, relabel
from spice_dist.launching import Launch, in_words, plan
from spice_dist.methods import spice_semi
from spice_dist.methods.plumbing import new_backbone
from spice_dist.outer_stages import accept, evaluation, is_evaluated, packing
from spice_dist.ownership import owned
from spice_dist.stage_records import (
    damaged_outputs,
    forget_other_clusters,
    images_of_run,
    refuse_changes,
    reopen,
    stage_record,
    write_stage_record,
)
from spice_dist.stages import Stage, check_settings, stage_settings, stages_of
from spice_dist.task import AUTO
from spice_dist.terminal import Bar, StopSignal

SMALL = 50_000  # fewer images are embedded by one worker, in less time than FFCV's reader compiles

Settings = dict[str, dict[str, Any]]  # by stage, in order: what the stage's result depends on


@dataclass(frozen=True)
class OpenRun:
    """One call of `fit` on a run folder, which this process owns meanwhile."""

    config: Config
    source: Source
    settings: Settings
    folder: Path
    device: torch.device
    sizes: tuple[int, ...]  # possible numbers of workers, ascending; (0,): none beside this process
    threads: int
    launch: Launch
    stop: StopSignal
    earlier: Earlier | None = None  # the run that it goes on from

    def up_to(self, last: str) -> "OpenRun":
        """Return the same run, ending with the stage `last`."""
        names = list(self.settings)
        return replace(self, settings={name: self.settings[name] for name in names[: names.index(last) + 1]})


def fit(
    config: Config,
    data: str | Source,
    out: Path,
    launch: Launch,
    command: list[str] | None = None,
    until: str | None = None,
    network: str = "",
    earlier: Earlier | None = None,
) -> dict[str, Any]:
    """Run all stages on `data` in the folder `out`; return the contents of metrics.json.

    Args:
        until: the last stage to run; the result is the clustering after it.
        network: one line about the network, if it was chosen automatically.
        earlier: the run that this one goes on from.

    Raises:
        UserError: the data, the settings or the folder cannot be used; the message says why.
        Interrupted: a signal ended the run; the same call resumes it.
    """
    with _opened(config, data, out, launch, command, network, earlier) as run:
        if until is not None:
            run = run.up_to(_end_named(until, run))
        _run_stages(run, evaluates=True)
        with run.stop.at_once():  # every file appears whole or not at all, and is made again
            return _conclude(run)


def _end_named(until: str, run: OpenRun) -> str:
    ends = [stage.name for stage in stages_of(run.config) if stage.clusters]
    if until not in ends:
        possible = f"can end with {', '.join(ends)}" if ends else "has one end only; leave --until out"
        raise UserError(f'--until is "{until}"; a run of these settings {possible}')
    return until


def fit_until(
    last: str,
    config: Config,
    data: str | Source,
    out: Path,
    launch: Launch,
    command: list[str] | None = None,
    network: str = "",
) -> None:
    """Run the stages of `fit` up to the one named `last`; raise what `fit` raises."""
    with _opened(config, data, out, launch, command, network) as run:
        _run_stages(run.up_to(last), evaluates=False)


@contextlib.contextmanager
def _opened(
    config: Config,
    data: str | Source,
    out: Path,
    launch: Launch,
    command: list[str] | None,
    network: str,
    earlier: Earlier | None = None,
) -> Iterator[OpenRun]:
    """Open the run in the folder `out`; whatever can be refused is refused before anything is trained."""
    source = data if isinstance(data, Source) else open_data(data, launch.labels)
    check_settings(config, source, source.name)
    backbone = new_backbone(config)  # raises here, not after packing, if it cannot be built
    if config.spice_semi.network:
        new_backbone(spice_semi.network_task(config, config.spice_semi))
    folder = out.resolve()
    images = Path(source.name).resolve()
    inside = folder == images or images in folder.parents
    if inside and (images / source.paths[0]).is_file():  # not a data set of that name
        raise UserError(f"--out {out} is inside the folder of the images; give a folder elsewhere")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, threads = plan(config, launch)
    if artifacts.sweep_file(folder).exists():
        raise UserError(f"{folder} holds a sweep; give another --out")
    if artifacts.corrections_summary_file(folder).exists():
        raise UserError(f"{folder} holds corrected groups, which fit would make anew; give another --out")
    with owned(folder) as owner, StopSignal() as stop:
        launch = replace(launch, storage=replace(launch.storage, owner=owner))
        require_regular_files(folder)
        settings = stage_settings(config, source, images_of_run(folder, source), earlier.digest if earlier else "")
        run = OpenRun(config, source, settings, folder, device, sizes, threads, launch, stop, earlier)
        forget_other_clusters(folder, run.settings)
        for stage, settings in run.settings.items():
            refuse_changes(folder, stage, settings)
        _write_config(run, command, network)
        if network:
            print(plain(f"network: {network}"), file=sys.stderr)
        print(_summary(run, sum(parameter.numel() for parameter in backbone.parameters())), file=sys.stderr)
        try:
            yield run
        except Interrupted:
            stop.check()  # its message names the signal
            raise
        except UserError as error:
            raise _with_remedy(error, run, command) from None


def _with_remedy(error: UserError, run: OpenRun, command: list[str] | None) -> UserError:
    """Return the error; if a stage did not stay finite, with the command that trains it anew at a lower rate."""
    for row in stages_of(run.config):
        settings = row.settings_in(run.config)
        done = (stage_record(run.folder, row.name) or {}).get("done")
        if not done and setbacks.gave_up(run.folder / row.name) and hasattr(settings, "lr"):
            lower = f"{row.settings}.lr={min(settings.lr * setbacks.LOWERED**2, type(settings)().lr):g}"
            again = shlex.join([*command, "--set", lower]) if command else f"fit again with {lower}"
            return UserError(f"{error}, also with {setbacks.LOWERED:g} times its rate; to train it anew: {again}")
    return error


def _summary(run: OpenRun, parameters: int) -> str:
    config, threads = run.config, run.threads
    clusters = "as many clusters as the features suggest" if config.clusters == AUTO else f"{config.clusters} clusters"
    networks = " + ".join(name for name, _ in config.backbone.networks)
    return (
        f"{len(run.source.paths)} images into {clusters}: {networks} of {parameters / 1e6:.2f} M parameters, "
        f"{in_words(run.sizes)} Ray workers, {threads} thread{'s' * (threads > 1)} each, {run.device.type}"
    )


def _run_stages(run: OpenRun, evaluates: bool) -> None:
    """Run the stages that are not finished, or whose files are damaged, then the evaluation if that is asked for."""
    damaged = _reopen_damaged(run)
    finished = {stage for stage in run.settings if (stage_record(run.folder, stage) or {}).get("done")}
    for stage in run.settings:
        if stage in finished:
            print(f"{stage:<11} finished before", file=sys.stderr)
    rows = [row for row in stages_of(run.config) if row.name in run.settings and row.name not in finished]
    stages = [_stage_call(row, run) for row in rows]
    if "data" in finished and not artifacts.packed_file(run.folder).exists():
        prepare(run.source, run.config.data, artifacts.data(run.folder))  # a link; the packed file was moved
    if "data" in finished and (evaluates or any(row.reads_labels for row in rows)):
        _relabel(run)
    if (
        evaluates
        and not damaged
        and (finished != set(run.settings) or not is_evaluated(run.config, run.folder, finished))
    ):
        stages.append(evaluation(_with_plain_loader(run), list(run.settings)[-1]))
    with _ray_session(run) if stages and run.sizes != (0,) else contextlib.nullcontext():
        if "data" not in finished and stages and _packs_on_workers(run):
            stages.insert(0, packing(run.config, run.source, ingest_options(run.config.data)))
        elif "data" not in finished:
            with _recorded(run, "data") as bar:
                folder = artifacts.data(run.folder)
                accept(run.config, prepare(run.source, run.config.data, folder, bar.show), folder)
        if run.earlier is not None and stages:
            with Bar("from", run.stop) as bar:
                carry_over(run.earlier, run.config, run.folder, run.device, bar.show)
        if run.sizes == (0,):
            _train_here(run, stages)
        elif stages:
            _train_on_workers(run, stages)
    _remove_later(run, damaged, finished)
    if damaged:
        artifacts.metrics_file(run.folder).unlink(missing_ok=True)  # what it tells may have come out otherwise
        _run_stages(run, evaluates)


def _relabel(run: OpenRun) -> None:
    """Take the labels that the source has now; the images may have been packed without labels."""
    if relabel(run.folder, run.source):
        artifacts.metrics_file(run.folder).unlink(missing_ok=True)  # the scores are made again, also by a later call


def _remove_later(run: OpenRun, damaged: dict[str, dict[str, str]], finished: set[str]) -> None:
    """Remove the finished stages after a damaged one that has come out otherwise than it was."""
    names = list(run.settings)
    for stage, before in damaged.items():
        later = [name for name in names[names.index(stage) + 1 :] if name in finished]
        if later and before and before != (stage_record(run.folder, stage) or {}).get("sha256"):
            print(f"{stage} has come out otherwise than before: {', '.join(later)} are made again", file=sys.stderr)
            for name in later:
                shutil.rmtree(run.folder / name)
            return


def _reopen_damaged(run: OpenRun) -> dict[str, dict[str, str]]:
    """Let finished stages be done again whose files are damaged; return what the digests of their files were."""
    found = {}
    for stage in run.settings:
        record = stage_record(run.folder, stage)
        if record and record["done"] and (damaged := damaged_outputs(run.folder, stage)):
            where = run.folder / stage / damaged[0]
            print(f"{where} is damaged or missing: the stage {stage} is done again", file=sys.stderr)
            reopen(run.folder, stage, damaged)
            found[stage] = record["sha256"]
    return found


def _stage_call(row: Stage, run: OpenRun) -> StageCall:
    task = _with_plain_loader(run) if row.plain_loader else run.config
    many = len(run.source.paths) >= SMALL and run.sizes != (0,)  # without workers this process takes all cores
    return StageCall(row.name, row.train, task, row.settings_in(run.config), row.shared(run.config, many))


def _conclude(run: OpenRun) -> dict[str, Any]:
    """Write the times of the stages, the card and the report of a run that is evaluated; return its scores."""
    from spice_dist.model_card import write_card
    from spice_dist.report import write_report

    folder = run.folder
    seconds = {stage: (stage_record(folder, stage) or {}).get("seconds", 0.0) for stage in run.settings}
    metrics = note_seconds(folder, seconds)
    write_card(folder)
    write_report(folder)
    return metrics


@contextlib.contextmanager
def _ray_session(run: OpenRun) -> Iterator[None]:
    from spice_dist.distributed import ray_nodes, ray_train

    address = run.launch.address
    where = f"joining the Ray cluster at {address}" if address else "starting Ray"
    print(f"{where} for {in_words(run.sizes)} workers", file=sys.stderr)
    with ray_train.session(address, num_cpus=run.sizes[-1], insecure=run.launch.insecure):
        run.stop.check()  # Ray takes many seconds to start, and cannot be interrupted meanwhile
        if address:
            ray_nodes.require_shared(run.folder)
        yield


@contextlib.contextmanager
def _recorded(run: OpenRun, stage: str) -> Iterator[Bar]:
    """Show a stage's bar; record its time, and that it is done unless an exception ends it."""
    spent = (stage_record(run.folder, stage) or {}).get("seconds", 0.0)
    started = time.monotonic()
    write_stage_record(run.folder, stage, run.settings[stage], False, spent)

    def write(done: bool) -> None:
        write_stage_record(run.folder, stage, run.settings[stage], done, spent + time.monotonic() - started)

    try:
        with Bar(stage, run.stop) as bar:
            yield bar
            bar.fill()
    except BaseException:
        with contextlib.suppress(UserError, OSError):  # must not hide the error
            write(False)
        raise
    write(True)
    run.stop.check()


def _train_here(run: OpenRun, stages: list[StageCall]) -> None:
    for stage in stages:
        with _shown(run, stage) as bar:
            storage = run.launch.storage
            worker = LocalWorker(run.folder, stage.name, run.device, run.stop.requested, bar.show, storage)
            with contextlib.nullcontext() if stage.has_folder else run.stop.at_once():
                stage.run(worker, run.threads)


def _shown(run: OpenRun, stage: StageCall) -> AbstractContextManager[Bar]:
    """Show the bar of a stage, and record it if it has a folder."""
    return _recorded(run, stage.name) if stage.has_folder else Bar(stage.name, run.stop)


def _train_on_workers(run: OpenRun, stages: list[StageCall]) -> None:
    """Train on the workers of the Ray session: one group runs all stages, and reports when it begins one."""
    from spice_dist.distributed import ray_channel, ray_elastic, ray_train

    names = [stage.name for stage in stages]
    # before a worker can save: workers go on while this process is held up
    for name in (stage.name for stage in stages if stage.has_folder):
        spent = (stage_record(run.folder, name) or {}).get("seconds", 0.0)
        write_stage_record(run.folder, name, run.settings[name], False, spent)
    with contextlib.ExitStack() as current:
        reached, bar = 0, current.enter_context(_shown(run, stages[0]))

        def reach(stage: int) -> None:
            nonlocal reached, bar
            while reached < stage:
                current.close()
                reached += 1
                bar = current.enter_context(_shown(run, stages[reached]))

        def progress(shown: ray_channel.Progress) -> None:
            reach(names.index(shown.stage))
            if shown.total:
                bar.show(shown.done, shown.total, shown.loss)

        def message(line: str) -> None:
            tqdm.write(plain(line), sys.stderr)

        job = ray_train.Job(
            tuple(stages), run.folder, run.threads, run.stop.requested, progress, message, run.launch.storage
        )
        ray_elastic.train(job, run.sizes)
        reach(len(names) - 1)


def _packs_on_workers(run: OpenRun) -> bool:
    """Tell whether workers pack the images: those of one node would share the cores that this process uses too."""
    from spice_dist.distributed import ray_nodes

    return run.sizes != (0,) and run.earlier is None and can_travel(run.source) and ray_nodes.count() > 1


def _with_plain_loader(run: OpenRun) -> Config:
    """Return the configuration with which a small set is read without FFCV, whose reader takes longer to compile."""
    if len(run.source.paths) >= SMALL or run.config.data.loader != "auto":
        return run.config
    return override(run.config, {"data.loader": "torch"})


def _write_config(run: OpenRun, command: list[str] | None, network: str) -> None:
    from importlib.metadata import version

    packages = ("torch", "torchvision", "timm", "ray", "numpy", "scikit-learn")
    about = {
        "version": 1,
        "command": command,
        "config": asdict(run.config),
        "network": network,
        "data": {"source": Path(run.source.name).name, "images": run.settings["data"]["images"]},
        "launch": {"workers": run.launch.workers, "threads": run.threads, "device": run.device.type},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    publish_json(artifacts.config_file(run.folder), about)
    record_files(run.folder, ["config.json"])
