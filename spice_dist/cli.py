"""The command `spice-dist`: parse, call, print. Imports nothing heavy before it knows what to do."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from spice_dist import catalog

if TYPE_CHECKING:
    from spice_dist.config import Config
    from spice_dist.data.sources import Source
    from spice_dist.launching import Launch

OK, MISTAKE, REQUEUE, INTERRUPTED = 0, 1, 75, 130


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done; 1 a mistake, told in one line; 75 state saved, run me again; 130 the same after Ctrl-C."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    from spice_dist.errors import Interrupted, UserError, warn_in_one_line

    warn_in_one_line()
    try:
        options.call(options, given)
    except UserError as error:
        print(f"spice-dist: {error}", file=sys.stderr)
        return MISTAKE
    except Interrupted as signal:
        print("spice-dist: stopped, the state is saved; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED if str(signal) in ("", "SIGINT") else REQUEUE
    except KeyboardInterrupt:
        print("spice-dist: stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        os._exit(INTERRUPTED)  # threads of loaders and workers must not hold the process
    return OK


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"spice-dist: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="spice-dist", description="Cluster images without labels, on one machine or many (SPICE).")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    fit = commands.add_parser("fit", help="cluster images: the whole pipeline into a run folder, resumable")
    fit.set_defaults(call=_fit)
    fit.add_argument("data", help="'digits' (built in), a folder, a list file, an array, NAME:DIR, a URL or a .beton")
    fit.add_argument("--out", type=Path, help="the run folder; the same command resumes a run in it")
    fit.add_argument("--dry-run", action="store_true", help="only tell what the run would cost: hours and memory")
    fit.add_argument(
        "--until",
        metavar="STAGE",
        help="the last stage to run, such as spice_self or spice_graph; assignments, model and report are of it",
    )
    _add_task_options(fit)
    fit.add_argument(
        "--track",
        action="append",
        default=[],
        choices=("mlflow", "wandb"),
        help="send the metrics of training there too; MLflow is found by MLFLOW_TRACKING_URI",
    )
    _add_ingest_options(fit)
    _add_launch_options(fit)
    fit.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="time between two checkpoints, which is what a lost node or worker can cost (60)",
    )

    tune = commands.add_parser("tune", help="search settings without labels: many trials on one base run, resumable")
    tune.set_defaults(call=_tune)
    tune.add_argument("data", help="as for fit")
    tune.add_argument("--out", type=Path, required=True, help="the folder of the sweep")
    tune.add_argument(
        "--space",
        required=True,
        help="what is searched: heads, thresholds, augmentations, pretrain, or your own .py file with SPACE and METRIC",
    )
    tune.add_argument("--trials", type=int, default=20, help="how many, those before --resume included (20)")
    tune.add_argument("--resume", action="store_true", help="go on with the sweep in --out; finished trials stay")
    tune.add_argument("--objective", help="the label-free score that chooses (default: METRIC of the space)")
    tune.add_argument("--search", choices=("optuna", "random"), default="optuna", help="TPE (default) or chance")
    tune.add_argument(
        "--scheduler", choices=("none", "asha"), default="none", help="asha: stop trials that promise little"
    )
    tune.add_argument("--max-concurrent", type=int, help="trials at a time (default: as many as there is room for)")
    tune.add_argument("--time-budget", type=float, metavar="SECONDS", help="start no trial and stop all after this")
    tune.add_argument("--base", type=Path, metavar="RUN", help="take data, stage 1 and features from this run folder")
    _add_task_options(tune)
    _add_ingest_options(tune)
    tune.add_argument(
        "--workers", type=int, default=0, help="training processes of stage 1; 0 (default): the trial's own process"
    )
    tune.add_argument("--threads", type=int, default=1, help="CPU threads of a trial, or of each of its workers (1)")
    _add_cluster_options(tune)

    doctor = commands.add_parser(
        "doctor", help="check this machine, a cluster and a run that is meant, before it starts"
    )
    doctor.set_defaults(call=_doctor, checkpoint_seconds=60.0)  # it saves nothing
    doctor.add_argument("data", nargs="?", help="as for fit; its images and the cost of the recipe are looked at")
    doctor.add_argument("--out", type=Path, help="the run folder that is meant: is it writable, from every node?")
    _add_task_options(doctor)
    _add_ingest_options(doctor)
    _add_launch_options(doctor)

    suggest = commands.add_parser("suggest-k", help="how many groups the images form: a curve, a range, three levels")
    suggest.set_defaults(call=_suggest, out=None, recipe=None, method="spice", clusters=None, config=None, pretext=None)
    suggest.add_argument("data", help="as for fit, or the folder of a run whose features are there")
    suggest.add_argument("--backbone", action="append", default=[], metavar="NAME", help="as for fit (default: auto)")
    suggest.add_argument("--weights", metavar="timm|FILE", help="as for fit")
    suggest.add_argument("--seed", type=int, help="of the subsamples (default 0)")
    suggest.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as for fit")
    _add_ingest_options(suggest)

    pack = commands.add_parser("pack", help="check images and pack them into one .beton file, resumable")
    pack.set_defaults(call=_pack)
    pack.add_argument("data", help="as for fit")
    pack.add_argument("out", type=Path, help="a new .beton file; OUT.json and lists are written beside it")
    pack.add_argument("--size", type=int, default=256, help="shorter side in pixels (256)")
    pack.add_argument(
        "--format", choices=("auto", "jpg", "raw"), default="auto", help="raw squares or whole JPEG images"
    )
    pack.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 100 (90)")
    pack.add_argument("--processes", type=int, help="decoding processes (default: as many as cores)")
    _add_ingest_options(pack)

    predict = commands.add_parser("predict", help="assign new images with the model of a finished run")
    predict.set_defaults(call=_predict)
    predict.add_argument("run", type=Path, help="a run folder, or a copy of its model folder")
    predict.add_argument("data", help="as for fit")
    predict.add_argument("--out", type=Path, required=True, help="a CSV file: index, path, cluster, confidence")

    report = commands.add_parser("report", help="write report.html of a finished run again")
    report.set_defaults(call=_report)
    report.add_argument("run", type=Path)
    report.add_argument("--out", type=Path, help="default: report.html in the run folder")

    evaluate = commands.add_parser("evaluate", help="print the scores of finished runs, or probe a run's features")
    evaluate.set_defaults(call=_evaluate)
    evaluate.add_argument(
        "run", type=Path, nargs="+", help="of several, such as seeds, mean and standard deviation are printed"
    )
    evaluate.add_argument(
        "--probe",
        action="append",
        choices=("knn", "kmeans", "linear"),
        help="instead: accuracy of the features of each kept checkpoint of stage 1, also of a run that is not finished",
    )
    return parser


def _add_task_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--clusters",
        type=_clusters,
        metavar="K|auto",
        help="number of clusters; auto, the default with a trained network: as many as the features suggest",
    )
    command.add_argument(
        "--recipe",
        help="digits, photos, cifar10, ...: whole settings, see recipes.py; default: digits for them, else photos",
    )
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="instead of a recipe: best.json of a sweep, config.json of a run"
    )
    command.add_argument(
        "--backbone",
        metavar="NAME",
        action="append",
        default=[],
        help="a timm model, resnet50 or such; several, as NAME or NAME=WEIGHTS: their features side by side; auto (of "
        "photos): the best trained one that can be had; scratch: train the recipe's own",
    )
    command.add_argument(
        "--weights",
        metavar="timm|FILE",
        help="the backbone's trained weights, timm's own or a file's; images are sized as timm says for the model",
    )
    command.add_argument(
        "--pretext",
        choices=catalog.PRETEXTS,
        help="how the backbone learns first; none: not at all (default: moco, or none with --weights)",
    )
    command.add_argument(
        "--method",
        choices=catalog.METHODS,
        default="spice",
        help="imc_swav: learn features and clusters in one stage, from crops of two sizes; scan: cluster by nearest "
        "neighbours and self-labelling after stage 1; fixmatch, supervised: baselines that USE TRUE LABELS, "
        "given_labels.per_class of each class, with and without the other images (default: spice)",
    )
    command.add_argument("--seed", type=int, help="another seed, another run (default 0)")
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting: moco.epochs=50"
    )


def _add_launch_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=_workers,
        metavar="N|MIN:MAX",
        help="training processes, a divisor of bn_groups; 2:8 takes what a cluster has at the time, after a loss fewer "
        "and then more again; 0: no Ray (default: as many as GPUs, or 2 on a CPU)",
    )
    command.add_argument("--threads", type=int, help="CPU threads of each worker (default: cores / bn_groups)")
    command.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="a folder on each node's own disk: the packed images are copied there once and read from there",
    )
    _add_cluster_options(command)


def _add_cluster_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address", help="a running Ray cluster to join, host:port or 'auto'; all its nodes must see --out"
    )
    command.add_argument(
        "--insecure", action="store_true", help="join a Ray cluster that asks for no token: anybody runs code on it"
    )


def _clusters(text: str) -> int:
    """K, or AUTO for "auto"."""
    from spice_dist.task import AUTO

    if text == "auto":
        return AUTO
    try:
        number = int(text)
    except ValueError:
        number = AUTO
    if number == AUTO:
        raise argparse.ArgumentTypeError(f"it is {text}; give auto, or a whole number of at least 2")
    return number


def _workers(text: str) -> int | tuple[int, int]:
    """N, or MIN:MAX for an elastic run."""
    least, colon, most = text.partition(":")
    if not all(part.isdecimal() for part in (least, most or "0")):
        raise argparse.ArgumentTypeError(f"it is {text}; give a number such as 4, or a range such as 2:8")
    if not colon:
        return int(text)
    if not (most and 0 < int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text} is no range; give such as 2:8")
    return int(least), int(most)


def _add_ingest_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-bad", type=float, help="largest share of unreadable images to go on with (0.05)")
    command.add_argument(
        "--drop-duplicates", action="store_true", help="leave out exact copies of earlier images, and list them"
    )
    command.add_argument(
        "--labels",
        choices=("folder", "array", "list"),
        help="where true labels are, for scores only (and for --method fixmatch and supervised): sub-folder names, an "
        "array of the .npz, a column of the list",
    )
    command.add_argument(
        "--split",
        choices=("whole", "split"),
        default="whole",
        help="named data sets: cluster all images, or train on the train part and score the test part",
    )
    command.add_argument(
        "--trust-foreign-beton",
        action="store_true",
        help="read a .beton that another program wrote, after checking and decoding all of it",
    )


def _open(options: argparse.Namespace) -> "Source":
    from spice_dist.data.dataset import open_data

    return open_data(options.data, options.labels, options.split, options.trust_foreign_beton)


def _pack(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.data.ingest import pack
    from spice_dist.terminal import Bar, StopSignal

    source = _open(options)
    with StopSignal() as stop, Bar("pack", stop) as bar:
        manifest = pack(
            source,
            options.out,
            size=options.size,
            jpeg_side=options.size,
            format=options.format,
            quality=options.quality,
            max_bad=0.05 if options.max_bad is None else options.max_bad,
            drop_duplicates=options.drop_duplicates,
            workers=options.processes,
            progress=bar.show,
        )
    print(
        f"wrote {manifest.n} images to {options.out}; {manifest.bad} could not be used, "
        f"{manifest.duplicates} are copies of others"
    )


def _fit(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.errors import UserError

    out: Path | None = options.out
    if out is None and not options.dry_run:
        raise UserError("where to? give --out, a folder for the run")
    source = _open(options)
    if "torch" not in sys.modules:  # which takes seconds
        print(f"{len(source.paths):,} images found; loading torch", file=sys.stderr)
    config, network = _config(options, source)

    from spice_dist.distributed import trackers
    from spice_dist.launching import dry_run
    from spice_dist.pipeline import fit

    trackers.request(options.track)
    if options.dry_run or out is None:
        if network:
            print(f"network: {network}")
        print(dry_run(config, source, _launch(options)))
        return
    fit(config, source, out, _launch(options), ["spice-dist", *given], options.until, network)
    _print_scores(out)


def _suggest(options: argparse.Namespace, given: list[str]) -> None:
    import tempfile

    from spice_dist.launching import Launch
    from spice_dist.methods.suggested import read_suggestion
    from spice_dist.pipeline import fit_until
    from spice_dist.suggest import describe

    suggestion = read_suggestion(Path(options.data))
    if suggestion is None:
        source = _open(options)
        config, network = _config(options, source)
        with tempfile.TemporaryDirectory(prefix="spice-") as folder:
            fit_until("suggest", config, source, Path(folder), Launch(0), network=network)
            suggestion = read_suggestion(Path(folder))
    assert suggestion is not None, "the stage leaves one"
    print(describe(suggestion))


def _tune(options: argparse.Namespace, given: list[str]) -> None:
    source = _open(options)
    config, _ = _config(options, source)

    from spice_dist.launching import Launch
    from spice_dist.sweep.ray_tune import Search
    from spice_dist.sweep.report import format_sweep
    from spice_dist.sweep.run import Place, tune

    search = Search(
        options.trials,
        options.objective or "",
        options.search,
        options.scheduler,
        options.max_concurrent,
        options.time_budget,
    )
    place = Place(options.out, options.resume, options.base)
    launch = Launch(options.workers, options.threads, options.address, options.insecure, labels=options.labels)
    rows = tune(config, source, options.space, place, search, launch, ["spice-dist", *given])
    print(format_sweep(options.out, rows))


def _doctor(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.doctor import BAD, IntendedRun, findings
    from spice_dist.errors import UserError

    def prepare() -> "tuple[Source, Config]":
        source = _open(options)
        return source, _config(options, source)[0]

    run = IntendedRun(prepare if options.data else None, options.out, _launch(options))
    failed = 0
    for finding in findings(run):
        print(finding, flush=True)
        failed += finding.state == BAD
    if failed:
        raise UserError(f"{failed} of these would make a run fail")


def _launch(options: argparse.Namespace) -> "Launch":
    from spice_dist.distributed.worker import Storage
    from spice_dist.launching import Launch

    storage = Storage(options.checkpoint_seconds, options.scratch)
    return Launch(options.workers, options.threads, options.address, options.insecure, storage, options.labels)


def _config(options: argparse.Namespace, source: "Source") -> "tuple[Config, str]":
    """The configuration for these images with the changes that were asked for, and the network that was chosen."""
    from spice_dist.errors import UserError

    changes: dict[str, Any] = {}
    for item in options.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f'--set takes NAME=VALUE, such as moco.epochs=50, not "{item}"')
        changes[name] = value
    given_as_options = {
        "clusters": options.clusters,
        "data.max_bad": options.max_bad,
        "data.drop_duplicates": options.drop_duplicates or None,
        "seed": options.seed,
        "pretext": options.pretext,
    }
    changes |= {name: value for name, value in given_as_options.items() if value is not None}

    from spice_dist.recipes import RECIPES
    from spice_dist.resolve import Wish, named_networks, resolve

    name, colon, _ = options.data.partition(":")
    published = name.replace("-", "_")
    if colon and published in RECIPES and not (options.recipe or options.config or "clusters" in changes):
        raise UserError(
            f"{name} has published settings: give --recipe {published}, or --recipe photos for a trained network"
        )
    backbones = tuple(options.backbone)
    if options.config is not None:
        from spice_dist.config import override, read_config

        if options.recipe or options.method != "spice":
            raise UserError("--config is a whole configuration: leave --recipe and --method out")
        return override(read_config(options.config), {**named_networks(backbones, options.weights), **changes}), ""
    from spice_dist.terminal import Bar, StopSignal

    wish = Wish(options.recipe, options.method, backbones, options.weights, changes)
    with StopSignal() as stop, Bar("download", stop) as bar:
        found = resolve(source, wish, options.out, bar.show)
    return found.config, found.network


def _predict(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.model_folder import predict

    predict(options.run, options.data, options.out)
    print(f"wrote {options.out}")


def _report(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.report import write_report

    print(f"wrote {write_report(options.run, options.out)}")


def _evaluate(options: argparse.Namespace, given: list[str]) -> None:
    first, *others = options.run
    if options.probe is None:
        if others:
            from spice_dist.report.table import format_seeds

            print(format_seeds(options.run))
        else:
            _print_scores(first)
        return
    import torch

    from spice_dist.errors import UserError
    from spice_dist.probes import format_rows, probe_checkpoints
    from spice_dist.terminal import Bar, StopSignal

    if others:
        raise UserError("--probe takes one run at a time")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with StopSignal() as stop, Bar("probe", stop) as bar:
        rows = probe_checkpoints(first, options.probe, device, bar.show)
    print(format_rows(rows))


def _print_scores(run: Path) -> None:
    from spice_dist.report.table import format_scores

    print(format_scores(run))


if __name__ == "__main__":
    sys.exit(main())
