"""The record of a stage, `STAGE/stage.json`: whether it is done, with which settings, and the SHA-256 of its files."""

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from spice_dist import artifacts
from spice_dist.config import Config, flatten
from spice_dist.data import beton
from spice_dist.data.checksums import OF_RUN, differing, publish_sealed, read_sealed, sha256
from spice_dist.data.ingest import damaged_files
from spice_dist.data.sources import Source, content_of
from spice_dist.distributed import checkpoint, setbacks
from spice_dist.distributed.checkpoint import Checkpoint
from spice_dist.errors import DamagedFile, UserError
from spice_dist.stages import images_of

TOLD = 10_000  # images; comparing more takes so long that it is told

OUTPUT = (".npy", ".json", ".csv")  # what a stage writes beside its checkpoints and logs
NO_OUTPUT = ("stage.json", "setbacks.json", "eval.json")  # of the pipeline and of evaluation


def stage_record(run: Path, stage: str) -> dict[str, Any] | None:
    """Read {"settings", "done", "seconds", "sha256"} of a stage; None if it never began.

    "sha256" holds the digests of the outputs of a finished stage, by name; it is empty in folders of earlier versions.
    """
    path = run / stage / "stage.json"
    try:
        record = read_sealed(path)
        about = {"settings": dict(record["settings"]), "done": record["done"], "seconds": record["seconds"]}
        return {**about, "sha256": dict(record.get("sha256", {}))}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged; remove {path.parent} to do this stage again") from error


def write_stage_record(run: Path, stage: str, settings: dict[str, Any], done: bool, seconds: float) -> None:
    """Write the record of a stage; if it is done, with the digests of its outputs."""
    folder = run / stage
    folder.mkdir(parents=True, exist_ok=True)
    sums = _outputs(folder) if done else {}
    record = {"settings": settings, "done": done, "seconds": round(seconds, 2), "sha256": sums}
    publish_sealed(folder / "stage.json", record)


def _outputs(folder: Path) -> dict[str, str]:
    """Return the digests of what a finished stage has left; those of weights and packed images are known already."""
    sidecar = beton.sidecar_path(folder / "dataset.beton")
    if sidecar.exists():  # the digests of the lists are in the manifest
        return {"dataset.beton": json.loads(sidecar.read_bytes())["sha256"]}
    files = [file for file in sorted(folder.glob("[!.]*")) if file.suffix in OUTPUT and file.name not in NO_OUTPUT]
    sums = {file.name: sha256(file) for file in files if ".partial." not in file.name}
    return sums | _weights(folder, checkpoint.newest(folder / "checkpoints"))


def _weights(folder: Path, last: Checkpoint | None) -> dict[str, str]:
    """Return the digests of the weights in a stage's last checkpoint, by paths below its folder."""
    sums = {last.path / name: digest for name, digest in last.sha256.items()} if last else {}
    return {f"{path.relative_to(folder)}": sums[path] for path in sums if path.suffix == ".safetensors"}


def damaged_outputs(run: Path, stage: str) -> list[str]:
    """Return which files of a finished stage are missing or altered, by their names in its folder."""
    folder, record = run / stage, stage_record(run, stage)
    if stage == "data":
        return damaged_files(folder)
    last = checkpoint.newest(folder / "checkpoints")
    if record is None or not record["sha256"]:  # a folder of an earlier version
        return [] if last is None or last.step == last.state["total"] else ["checkpoints"]
    weights = {name: digest for name, digest in record["sha256"].items() if name.startswith("checkpoints/")}
    others = {name: digest for name, digest in record["sha256"].items() if name not in weights}
    return differing(folder, others) + list(weights)[:1] * (weights != _weights(folder, last))


def reopen(run: Path, stage: str, damaged: list[str]) -> None:
    """Let a stage be done again whose files are damaged: from its newest whole checkpoint, or the one before.

    A stage that left other files than weights may write them before its last checkpoint, which is removed then.
    """
    record = stage_record(run, stage)
    assert record is not None
    write_stage_record(run, stage, record["settings"], False, record["seconds"])
    if stage == "data":  # `ingest` sees itself what it can use
        return
    others = [name for name in damaged if not name.startswith("checkpoints")]
    for name in others:
        (run / stage / name).unlink(missing_ok=True)
    if others:
        checkpoint.drop_last(run / stage / "checkpoints")


def images_of_run(run: Path, source: Source) -> str:
    """Return `images_of` the source, or what the run's record has for them if the images are the same.

    They are the same if names and contents are. Times of files change with every copy; while they have not changed,
    nothing is read.
    """
    now, record = images_of(source), stage_record(run, "data")
    if record is None or not record["done"]:
        return now
    then = record["settings"].get("images", now)
    if then == now or then.split(" ")[0] != str(len(source.paths)):
        return now
    content = artifacts.manifest(run).content
    if content and len(source.paths) > TOLD:
        print("the images' files have other times than those of the run: their contents are compared", file=sys.stderr)
    return then if content and content == content_of(source) else now


def refuse_changes(
    run: Path, stage: str, settings: dict[str, Any], remedy: str = "give another --out or the same settings"
) -> None:
    """Raise UserError, with the difference, if the stage has files that were made with other settings.

    A setting that the record lacks, since it is newer than the run, counts as its default.
    A stage that did not stay finite is removed instead if only its own settings differ: other ones are its remedy.
    """
    record = stage_record(run, stage)
    trained = any((run / stage).glob("checkpoints/*"))
    if record is None:
        if trained:
            raise UserError(
                f"{run / stage} has checkpoints but no stage.json, which says what they were made with; "
                f"remove {run / stage} to do this stage again"
            )
        return
    if not record["done"] and not trained:
        return
    now = json.loads(json.dumps(settings))
    then = _with_defaults(record["settings"], now)
    changed = _differences(then, now)
    if changed and setbacks.gave_up(run / stage) and all(name.startswith(f"{stage}.") for name in changed):
        print(f"{stage} did not stay finite with its earlier settings: it begins anew", file=sys.stderr)
        shutil.rmtree(run / stage)
    elif changed:
        shown = ", ".join(f"{name} was {_short(then, name)}, now {_short(now, name)}" for name in changed[:3])
        more = f" and {len(changed) - 3} more" * (len(changed) > 3)
        raise UserError(f"{run} was made with another configuration, stage {stage}: {shown}{more}; {remedy}")


def forget_other_clusters(run: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Remove what was made for another number of clusters, or other settings of stage 2 on the neighbour graph.

    The features and neighbours stay, from which it is made again in seconds; one line is printed.
    """
    names = list(settings)
    record = stage_record(run, "spice_graph") if "spice_graph" in names else None
    if record is None:
        return
    now = json.loads(json.dumps(settings["spice_graph"]))
    then = _with_defaults(record["settings"], now)
    changed = _differences(then, now)
    if not changed or any(not name.startswith(("clusters", "spice_graph.")) for name in changed):
        return
    was = then.get("clusters") or "suggested"
    print(f"the groups in {run} (clusters: {was}) are made anew; features and neighbours stay", file=sys.stderr)
    for name in (*names[names.index("spice_graph") :], "spice_tune", "model"):
        shutil.rmtree(run / name, ignore_errors=True)
    # they would describe other groups
    for name in ("assignments.csv", "levels.csv", "metrics.json", "report.html", OF_RUN):
        (run / name).unlink(missing_ok=True)


def _with_defaults(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a record; one that it lacks, since it is newer than the run, has its default."""
    return {name: value for name, value in _defaults().items() if name in now} | then


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*then, *now}) if name not in then or name not in now or then[name] != now[name]]


@cache
def _defaults() -> dict[str, Any]:
    return json.loads(json.dumps(flatten(Config())))


def _short(settings: dict[str, Any], name: str) -> str:
    if name not in settings:
        return "absent"
    text = json.dumps(settings[name])
    return text if len(text) <= 60 else text[:57] + "..."
