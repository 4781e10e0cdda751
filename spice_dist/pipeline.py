"""A run: the stages in order, each skipped when finished, resumed when interrupted, refused when it no longer fits."""

import contextlib
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from spice_dist import inference
from spice_dist.config import Config, flatten, override
from spice_dist.data.dataset import open_data, prepare
from spice_dist.data.files import publish_json
from spice_dist.data.manifest import Ingested
from spice_dist.data.sources import Source, listing
from spice_dist.distributed.worker import LocalWorker, Stage
from spice_dist.errors import Interrupted, UserError
from spice_dist.evaluate import evaluate, evaluate_given_labels, evaluate_imc_swav, evaluate_scan, relabel
from spice_dist.evaluate_graph import evaluate_graph
from spice_dist.launching import Launch, in_words, plan
from spice_dist.methods import (
    byol,
    given_labels,
    imc_swav,
    moco,
    reliable,
    scan,
    spice_graph,
    spice_self,
    spice_semi,
    spice_tune,
    suggested,
)
from spice_dist.methods.plumbing import new_backbone
from spice_dist.models.backbone import weights_fingerprint
from spice_dist.run_folder import forget_other_clusters, owned, refuse_changes, stage_record, write_stage_record
from spice_dist.task import AUTO, USING_LABELS, check_task
from spice_dist.terminal import Bar, StopSignal

# no pixel changes; weights count by their SHA-256; evaluation alone reads eval_bn
HARMLESS = ("data.loader", "data.max_bad", "backbone.weights", "backbone.other_weights", "imc_swav.eval_bn")
NEW = {"backbone.others": ()}  # settings that older run folders lack, which then had these values
# after these stages there are clusters: a run can end with any of them
CLUSTERING = ("spice_self", "spice_graph", "reliable", "spice_semi", "spice_tune", "imc_swav", "scan", "self_label")
SMALL = 50_000  # fewer images are embedded in less time than FFCV's reader compiles, and by one worker alone


@dataclass(frozen=True)
class Run:
    """One call of `fit` on one folder."""

    config: Config
    source: Source
    folder: Path
    device: torch.device
    sizes: tuple[int, ...]  # numbers of workers that may run, ascending; (0,): none beside this process
    threads: int
    launch: Launch
    stop: StopSignal


def fit(
    config: Config,
    data: str | Source,
    out: Path,
    launch: Launch,
    command: list[str] | None = None,
    until: str | None = None,
    network: str = "",
) -> dict[str, Any]:
    """Run all stages on `data` in the folder `out`; returns the contents of metrics.json.

    Args:
        until: the last stage to run; the result is then what there is after it.
        network: one line about the network, where it was chosen automatically.

    Raises:
        UserError: the data, the settings or the folder cannot be used; one line says why.
        Interrupted: asked to stop; the same call goes on from there.
    """
    with _opened(config, data, out, launch, command, network) as (run, settings):
        settings = _up_to(until, settings)
        finished = _run_stages(run, settings)
        return _conclude(run, settings, finished)


def _up_to(until: str | None, settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of the stages up to `until`; of all without one."""
    names = list(settings)
    if until is None:
        return settings
    if until not in (ends := [name for name in names if name in CLUSTERING]):
        raise UserError(f'--until is "{until}"; a run of these settings can end with {", ".join(ends)}')
    return {name: settings[name] for name in names[: names.index(until) + 1]}


def fit_until(
    last: str,
    config: Config,
    data: str | Source,
    out: Path,
    launch: Launch,
    command: list[str] | None = None,
    network: str = "",
) -> None:
    """The stages of `fit` up to the one named `last`; it raises what `fit` raises."""
    with _opened(config, data, out, launch, command, network) as (run, settings):
        names = list(settings)
        _run_stages(run, {name: settings[name] for name in names[: names.index(last) + 1]})


@contextlib.contextmanager
def _opened(
    config: Config, data: str | Source, out: Path, launch: Launch, command: list[str] | None, network: str
) -> Iterator[tuple[Run, dict[str, dict[str, Any]]]]:
    """The run in the folder `out`, which is ours meanwhile, and the settings of each of its stages."""
    source = data if isinstance(data, Source) else open_data(data, launch.labels)
    check_settings(config, source, source.name)
    backbone = new_backbone(config)  # what cannot be built is told at once
    if config.spice_semi.network:
        new_backbone(spice_semi.network_task(config, config.spice_semi))
    folder = out.resolve()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, threads = plan(config, launch)
    if (folder / "sweep.json").exists():
        raise UserError(f"{folder} holds a sweep; give another --out")
    with owned(folder), StopSignal() as stop:
        run = Run(config, source, folder, device, sizes, threads, launch, stop)
        settings = stage_settings(config, source)
        forget_other_clusters(folder, settings)
        for stage, values in settings.items():
            refuse_changes(folder, stage, values)
        _write_config(run, command, network)
        size = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
        if network:
            print(f"network: {network}", file=sys.stderr)
        clusters = (
            "as many clusters as the features suggest" if config.clusters == AUTO else f"{config.clusters} clusters"
        )
        print(
            f"{len(source.paths)} images into {clusters}: {_named(config)} of {size:.2f} M "
            f"parameters, {in_words(sizes)} Ray workers, {threads} thread{'s' * (threads > 1)} each, {device.type}",
            file=sys.stderr,
        )
        try:
            yield run, settings
        except Interrupted:
            stop.check()  # says which signal it was
            raise


def dry_run(config: Config, source: Source, launch: Launch) -> str:
    """What `fit` would cost, as a table; the settings are checked, nothing is written.

    Raises:
        UserError: `fit` would refuse these settings.
    """
    from spice_dist import cost

    check_settings(config, source, source.name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, threads = plan(config, launch)
    workers = max(1, sizes[-1])
    passes = 1 if device.type == "cuda" else config.bn_groups // workers
    torch.set_num_threads(threads)
    stages = cost.estimate(config, source.training, source.clustered, workers, passes)
    clusters = config.clusters or "suggested"
    heading = f"{len(source.paths):,} images into {clusters} clusters on {workers} workers"
    return f"{heading}\n{cost.table(stages, device, config.precision, workers)}"


def _run_stages(run: Run, settings: dict[str, dict[str, Any]]) -> set[str]:
    """Run those stages that have settings here and are not finished; returns which were finished before."""
    finished = {stage for stage in settings if (stage_record(run.folder, stage) or {}).get("done")}
    for stage in settings:
        if stage in finished:
            print(f"{stage:<11} finished before", file=sys.stderr)
    stages = [stage for stage in _stages(run) if stage.name in settings and stage.name not in finished]
    with _ray_session(run) if stages and run.sizes != (0,) else contextlib.nullcontext():
        if "data" not in finished:
            with _recorded(run, "data", settings["data"]) as bar:
                pack(run, bar)
        if any(stage.name == "given_labels" for stage in stages):
            relabel(run.folder, run.source)  # the images may have been packed without labels
        if run.sizes == (0,):
            _train_here(run, stages, settings)
        elif stages:
            _train_on_workers(run, stages, settings)
    return finished


def _stages(run: Run) -> list[Stage]:
    """All that may follow the packing of the images; a small set is not worth sharing where nothing is trained."""
    config, brief = run.config, _brief(run)
    large = len(run.source.paths) >= SMALL and run.sizes != (0,)  # alone, this process takes all cores
    return [
        *(Stage(name, train, config, own) for name, train, own in pretext_stages(config)),
        Stage("features", inference.embed, brief, None, shared=large),
        Stage(
            "spice_self", spice_self.train, brief, config.spice_self,
            shared=large and not config.spice_self.encodes_anew,
        ),
        Stage("graph", spice_graph.find_neighbors, config, config.graph, shared=False),
        Stage("suggest", suggested.suggest_clusters, config, None, shared=False),
        Stage("spice_graph", partial(suggested.follow, spice_graph.train), config, config.spice_graph, shared=False),
        Stage("reliable", partial(suggested.follow, reliable.select), config, config.reliable, shared=large),
        Stage("given_labels", given_labels.give, config, config.given_labels, shared=False),
        Stage("spice_semi", partial(suggested.follow, spice_semi.train), config, config.spice_semi),
        Stage("spice_tune", partial(suggested.follow, spice_tune.train), config, config.spice_tune, shared=False),
        Stage("scan", scan.train, config, config.scan),
        Stage("self_label", scan.self_label, config, config.self_label),
    ]  # fmt: skip


def _conclude(run: Run, settings: dict[str, dict[str, Any]], finished: set[str]) -> dict[str, Any]:
    """Assignments, scores and the report of a run whose stages are done; `finished` were so before this call."""
    from spice_dist.report import write_report

    config, folder, device, brief = run.config, run.folder, run.device, _brief(run)
    seconds = {stage: (stage_record(folder, stage) or {}).get("seconds", 0.0) for stage in settings}
    relabelled = "data" in finished and relabel(folder, run.source)
    if relabelled or finished != set(settings) or _evaluated_otherwise(config, settings, folder / "metrics.json"):
        with Bar("evaluate", run.stop) as bar:
            if config.method == "imc_swav":
                evaluate_imc_swav(brief, config.imc_swav, folder, device, seconds, bar.show)
            elif config.method == "scan":
                evaluate_scan(brief, folder, device, seconds, bar.show)
            elif config.method in USING_LABELS:
                evaluate_given_labels(brief, config.spice_semi, folder, device, seconds, bar.show)
            elif config.stage2 == "spice_graph":
                known = override(brief, {"clusters": suggested.with_suggested_clusters(brief, folder).clusters})
                evaluate_graph(known, folder, device, seconds, bar.show)
            else:
                evaluate(brief, config.spice_semi, folder, device, seconds, bar.show, list(settings)[-1])
    metrics = json.loads((folder / "metrics.json").read_text())
    write_report(folder)
    return metrics


def _evaluated_otherwise(config: Config, stages: Collection[str], metrics: Path) -> bool:
    """Whether there are no scores yet, or those of other stages, another method or other BatchNorm statistics."""
    if not metrics.exists():
        return True
    wanted = (config.method, config.imc_swav.eval_bn if config.method == "imc_swav" else None)
    found = json.loads(metrics.read_text())
    return (found.get("method"), found.get("eval_bn")) != wanted or set(found.get("seconds", ())) != set(stages)


def pretext_stages(config: Config) -> list[tuple[str, Callable[..., None], Any]]:
    """Stage 1 as (name, train, its settings); none if the backbone is taken as it is."""
    stages = [
        ("moco", moco.train, config.moco),
        ("byol", byol.train, config.byol),
        ("imc_swav", imc_swav.train, config.imc_swav),
    ]
    return [stage for stage in stages if stage[0] == config.pretext]


@contextlib.contextmanager
def _ray_session(run: Run) -> Iterator[None]:
    from spice_dist.distributed import ray_nodes, ray_train

    address = run.launch.address
    where = f"joining the Ray cluster at {address}" if address else "starting Ray"
    print(f"{where} for {in_words(run.sizes)} workers", file=sys.stderr)
    with ray_train.session(address, num_cpus=run.sizes[-1], insecure=run.launch.insecure):
        if address:
            ray_nodes.require_shared(run.folder)
        yield


def _named(config: Config) -> str:
    return " + ".join(name for name, _ in config.backbone.networks)


@contextlib.contextmanager
def _recorded(run: Run, stage: str, settings: dict[str, Any]) -> Iterator[Bar]:
    """The bar of a stage; its record says how long it took, and that it is done unless an exception ends it."""
    spent = (stage_record(run.folder, stage) or {}).get("seconds", 0.0)
    started = time.monotonic()
    write_stage_record(run.folder, stage, settings, False, spent)
    done = False
    try:
        with Bar(stage, run.stop) as bar:
            yield bar
            bar.fill()
        done = True
    finally:
        write_stage_record(run.folder, stage, settings, done, spent + time.monotonic() - started)
    run.stop.check()


def _train_here(run: Run, stages: list[Stage], settings: dict[str, dict[str, Any]]) -> None:
    for stage in stages:
        with _recorded(run, stage.name, settings[stage.name]) as bar:
            storage = run.launch.storage
            worker = LocalWorker(run.folder, stage.name, run.device, run.stop.requested, bar.show, storage)
            stage.run(worker, run.threads)


def _train_on_workers(run: Run, stages: list[Stage], settings: dict[str, dict[str, Any]]) -> None:
    """On the workers of the Ray session: one group of them goes through all stages, and tells when it begins one."""
    from spice_dist.distributed import ray_elastic, ray_train

    names = [stage.name for stage in stages]
    for name in names:  # before any of them can save: workers go on while this process is held up
        spent = (stage_record(run.folder, name) or {}).get("seconds", 0.0)
        write_stage_record(run.folder, name, settings[name], False, spent)
    with contextlib.ExitStack() as current:
        reached, bar = 0, current.enter_context(_recorded(run, names[0], settings[names[0]]))

        def reach(stage: int) -> None:
            nonlocal reached, bar
            while reached < stage:
                current.close()
                reached += 1
                bar = current.enter_context(_recorded(run, names[reached], settings[names[reached]]))

        def progress(shown: ray_train.Progress) -> None:
            reach(names.index(shown.stage))
            if shown.total:
                bar.show(shown.done, shown.total, shown.loss)

        def message(line: str) -> None:
            tqdm.write(line, sys.stderr)

        job = ray_train.Job(
            tuple(stages), run.folder, run.threads, run.stop.requested, progress, message, run.launch.storage
        )
        if len(run.sizes) == 1:
            ray_train.train_on_workers(job, run.sizes[0])
        else:
            ray_elastic.train(job, run.sizes)
        reach(len(names) - 1)


def pack(run: Run, bar: Bar) -> None:
    """The images as one verified file in FFCV's format."""
    folder = run.folder / "data"
    manifest = prepare(run.source, run.config.data, folder, bar.show)
    check_settings(run.config, manifest, manifest.source)
    if manifest.bad:
        tqdm.write(f"{manifest.bad} unreadable images are left out; {folder / 'quarantine.csv'} says why", sys.stderr)
    if manifest.duplicates:
        dropped = ", left out" * bool(manifest.dropped)
        tqdm.write(f"{manifest.duplicates} images are exact copies of others{dropped}", sys.stderr)


def _brief(run: Run) -> Config:
    """The configuration for stages that only pass over the images: a small set is not worth compiling FFCV's reader."""
    if len(run.source.paths) >= SMALL or run.config.data.loader != "auto":
        return run.config
    return override(run.config, {"data.loader": "torch"})


def _fingerprint(labels: np.ndarray | None) -> str:
    return hashlib.sha256(b"" if labels is None else labels.astype("<i8").tobytes()).hexdigest()[:16]


def images_of(source: Source) -> str:
    """What tells one list of images from another."""
    return f"{len(source.paths)} images, {listing(source)[:16]}"


def stage_settings(config: Config, source: Source) -> dict[str, dict[str, Any]]:
    """For each stage everything its result depends on: its own settings and those of the stages before it."""
    names = {
        "data": ("data",),
        **{
            name: ("seed", "bn_groups", "precision", "pretext", "backbone", name)
            for name, _, _ in pretext_stages(config)
        },
        "features": ("precision", "pretext", "backbone"),
    }
    if config.method in USING_LABELS:
        del names["features"]
        names["given_labels"] = ("seed", "clusters", "given_labels")
        names["spice_semi"] = ("bn_groups", "precision", "backbone", "spice_semi")
    if config.pretext == "imc_swav":
        names["imc_swav"] = ("clusters", *names["imc_swav"])
    if config.method == "spice" and config.stage2 == "spice_self":
        names["spice_self"] = ("seed", "clusters", "spice_self")
    if config.method == "spice" and config.stage2 == "spice_graph":
        names |= {"graph": ("graph",), "suggest": ("seed",), "spice_graph": ("clusters", "spice_graph")}
    if config.method == "spice":
        names["reliable"] = ("reliable",)
    if config.method == "spice" and config.stage3 != "none":
        names[config.stage3] = ("bn_groups", config.stage3)
    if config.method == "scan":
        names |= {"scan": ("seed", "clusters", "bn_groups", "scan"), "self_label": ("self_label",)}
    flat = flatten(config)
    depends: dict[str, Any] = {"images": images_of(source)}
    settings = {}
    for stage, own in names.items():
        if stage == "given_labels":
            depends["labels"] = _fingerprint(source.labels)
        depends |= {
            name: value
            for name, value in flat.items()
            if name.split(".")[0] in own and name not in HARMLESS and (name not in NEW or value != NEW[name])
        }
        settings[stage] = dict(depends)
        depends["weights"] = weights_fingerprint(config.backbone)  # of every stage but the first
    return settings


def check_settings(config: Config, images: Source | Ingested, data: str) -> None:
    """UserError for whatever would otherwise fail after hours of training."""
    num_images = images.clustered
    check_task(config)
    if config.clusters != AUTO and config.clusters > num_images:
        raise UserError(f"--clusters is {config.clusters}, more than the {num_images} images of {data}; ask for fewer")
    if config.pretext == "moco":
        moco.check(config, config.moco, images.training)
    if config.pretext == "byol":
        byol.check(config, config.byol, images.training)
    if config.pretext == "imc_swav":
        imc_swav.check(config, config.imc_swav, images.training, num_images)
    if config.method == "spice":
        if config.stage2 == "spice_graph":
            spice_graph.check(config, config.spice_graph, config.graph, num_images)
        else:
            spice_self.check(config, config.spice_self, num_images)
        reliable.check(config.reliable)
        if config.stage3 == "spice_semi":
            spice_semi.check(config, config.spice_semi)
        if config.stage3 == "spice_tune":
            spice_tune.check(config, config.spice_tune)
    if config.method == "scan":
        scan.check(config, config.scan, num_images)
        scan.check_self_label(config, config.self_label, num_images)
    if config.method in USING_LABELS:
        spice_semi.check(config, config.spice_semi)
        given_labels.check(config, config.given_labels, config.spice_semi)
        if isinstance(images, Source):
            given_labels.draw(config, config.given_labels, images.labels, num_images, images.held_out)


def _write_config(run: Run, command: list[str] | None, network: str) -> None:
    from importlib.metadata import version

    packages = ("torch", "torchvision", "timm", "ray", "numpy", "scikit-learn")
    about = {
        "version": 1,
        "command": command,
        "config": asdict(run.config),
        "network": network,
        "data": {"source": Path(run.source.name).name, "images": images_of(run.source)},
        "launch": {"workers": run.launch.workers, "threads": run.threads, "device": run.device.type},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    publish_json(run.folder / "config.json", about)
