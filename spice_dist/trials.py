"""One trial of a sweep: the stages that its settings touch, on what all trials share, then scores without labels.

A sweep's base run holds what no trial changes. A trial is a run folder of its own whose unchanged parts are links to
it; it begins at the first stage that the searched settings touch:

pretrain    stage 1, its features, then the heads
heads       the heads, on the base's features; views that are not searched are read from where the base stored them
thresholds  the reliable labels of the base's heads, and students that learn from these on the features

The clustering that is scored is that of the head with the lowest loss, or the students' vote. True labels are never
read here.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spice_dist import inference, metrics
from spice_dist.config import Config, override
from spice_dist.data.files import publish, publish_json
from spice_dist.data.ingest import read_manifest
from spice_dist.distributed.checkpoint import Tensors
from spice_dist.distributed.worker import NO_PROBES, LocalWorker, Probes, Stage
from spice_dist.errors import UserError
from spice_dist.losses import double_softmax_cross_entropy
from spice_dist.methods import reliable, spice_self
from spice_dist.methods.plumbing import open_dataset
from spice_dist.methods.spice_self import load_heads, outputs
from spice_dist.models.heads import ClusterHeads
from spice_dist.objectives import generalization
from spice_dist.pipeline import check_settings, pretext_stages
from spice_dist.pseudo_labels import UNRELIABLE, quotas, selection_loss
from spice_dist.run_folder import owned

STARTS = ("pretrain", "heads", "thresholds")  # where a trial can begin, in order
RUNGS = (3, 9, 27)  # 27ths of a trial's training after which it is scored, and may be stopped by the scheduler
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
STUDENTS = 4  # that learn from halves of the reliable labels, two from each
STUDENT_STEPS = 200
Scores = dict[str, float]
Told = Callable[[int, Scores], None]
"""Called at every rung with the 27ths that are done and the scores so far."""


@dataclass(frozen=True)
class Plan:
    """What the trials of a sweep share."""

    folder: Path  # the sweep's: `base` is the run that they share, `trials` holds theirs
    config: Config  # what a trial changes
    start: str  # of STARTS
    reliable: bool  # whether a trial goes on to the reliable labels
    threads: int = 1
    workers: int = 0  # training processes of stage 1; 0: the trial's own

    @property
    def base(self) -> Path:
        return self.folder / "base"


def start_of(names: Mapping[str, Any]) -> str:
    """The stage at which trials begin that change these settings.

    Raises:
        UserError: trials that differ in one of them cannot be compared, or take another program.
    """
    groups = {name.split(".")[0]: name for name in names}
    for group, why in NOT_SEARCHED.items():
        if group in groups:
            raise UserError(f"a sweep cannot search {groups[group]}: {why}")
    if set(groups) - {"spice_self", "reliable"}:
        return "pretrain"
    return "heads" if "spice_self" in groups else "thresholds"


NOT_SEARCHED = {
    "data": "all trials must cluster the same images",
    "clusters": "scores of different numbers of clusters cannot be compared",
    "seed": "a seed is chance, not a setting",
    "method": "trials share the stages of SPICE",
    "pretext": "compare two pretexts by two sweeps",
    "spice_semi": "stage 3 takes minutes to hours a trial; search the stages before it",
}


def trial_folder(plan: Plan, changes: Mapping[str, Any]) -> Path:
    """The same settings have the same folder, where an unfinished trial goes on."""
    from hashlib import sha256

    text = json.dumps(changes, sort_keys=True, default=str)
    return plan.folder / "trials" / sha256(text.encode()).hexdigest()[:12]


def run_trial(plan: Plan, changes: Mapping[str, Any], told: Told) -> Scores:
    """Leaves `trial.json`, its record, and `clusters.npy`, (N,), in the trial's folder; returns the scores.

    Raises:
        Exception: what stopped the trial, such as a UserError; the record says why too.
    """
    folder = trial_folder(plan, changes)
    record = read_record(folder)
    if record and record["state"] == FINISHED:
        told(RUNGS[-1], record["scores"])
        return record["scores"]
    with owned(folder):
        began = time.time()
        spent = record["seconds"] if record else 0.0
        first = record["started"] if record else began
        write = partial(write_record, folder, changes, first)
        write(RUNNING, spent)
        try:
            config = override(plan.config, changes)
            check_settings(config, read_manifest(plan.base / "data"), "the data set")
            link_base(plan, folder)
            scores = _run_stages(plan, config, folder, told)
        except Exception as error:  # whatever it is: a row with its reason, and the sweep goes on
            write(FAILED, spent + time.time() - began, reason=reason_of(error))
            raise
        write(FINISHED, spent + time.time() - began, scores)
        for stage in ("spice_self", plan.config.pretext):  # the clustering is kept, the weights are large
            if not (folder / stage).is_symlink():
                shutil.rmtree(folder / stage / "checkpoints", ignore_errors=True)
    told(RUNGS[-1], scores)
    return scores


def reason_of(error: BaseException) -> str:
    """One line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in first:  # torch's on a CPU
        return f"out of memory: {first}"
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def write_record(
    folder: Path, changes: Mapping[str, Any], started: float, state: str, seconds: float, scores: Scores | None = None,
    reason: str = "",
) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "state": state,
        "reason": reason,
        "started": started,
        "seconds": round(seconds, 3),
        "settings": dict(changes),
        "scores": scores or {},
    }
    publish_json(folder / "trial.json", record)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What is known of the trial in this folder; None if it has not begun or its record is lost: it is run again."""
    try:
        record = json.loads((folder / "trial.json").read_bytes())
        return {name: record[name] for name in ("state", "reason", "started", "seconds", "settings", "scores")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def link_base(plan: Plan, folder: Path) -> None:
    """Make the trial's folder a run folder: what it does not make itself is a relative link to the base."""
    shared = ["data"]
    if plan.start != "pretrain":
        shared += [plan.config.pretext, "features", "views"]
    if plan.start == "thresholds":
        shared += ["spice_self"]
    for name in shared:
        if (plan.base / name).exists() and not (folder / name).is_symlink():
            (folder / name).symlink_to(os.path.relpath(plan.base / name, folder))


def _run_stages(plan: Plan, config: Config, folder: Path, told: Told) -> Scores:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge = Judge(plan, config, device)
    if plan.start == "pretrain":
        for name, train, own in pretext_stages(config):
            if plan.workers:
                _train_on_workers(plan, config, folder, name, train, own)
            else:
                _train(plan, config, folder, name, train, own, device, partial(judge.backbone, folder), told)
        _train(plan, config, folder, "features", inference.embed, None, device)
    if plan.start in ("pretrain", "heads"):
        rungs = judge.heads if plan.start == "heads" else None
        _train(plan, config, folder, "spice_self", spice_self.train, config.spice_self, device, rungs, told)
    features = np.load(folder / "features/features.npy", mmap_mode="r")[: judge.num_images]
    heads, loss = load_heads(folder)
    clusters, scores = judge.of_heads(heads, loss, features)
    if plan.reliable:
        _train(plan, config, folder, "reliable", reliable.select, config.reliable, device)
        labels = np.load(folder / "reliable/labels.npy")[: judge.num_images]
        clusters, scores = judge.of_labels(labels, features)
    with publish(folder / "clusters.npy") as file:
        np.save(file, clusters)
    return scores


def _train(
    plan: Plan, config: Config, folder: Path, stage: str, train: Callable, own: Any, device: torch.device,
    score: Callable[[Tensors], Scores] | None = None, told: Told = lambda part, scores: None,
) -> None:  # fmt: skip
    Stage(stage, train, config, own).run(TrialWorker(folder, stage, device, score, told), plan.threads)


def _train_on_workers(plan: Plan, config: Config, folder: Path, stage: str, train: Callable, own: Any) -> None:
    from spice_dist.distributed import ray_train

    stages = (Stage(stage, train, config, own),)

    def message(line: str) -> None:
        print(line, file=sys.stderr)

    job = ray_train.Job(stages, folder, plan.threads, lambda: False, lambda _progress: None, message)
    ray_train.train_on_workers(job, plan.workers)


class TrialWorker(LocalWorker):
    """The worker of a trial: after the rungs' shares of its training it tells how good the trial is so far."""

    def __init__(
        self, run: Path, stage: str, device: torch.device, score: Callable[[Tensors], Scores] | None, told: Told
    ):
        super().__init__(run, stage, device)
        self.score, self.told = score, told

    def report(
        self,
        step: int,
        total: int,
        metrics: dict[str, Tensor],
        save: Callable[[], Tensors],
        probes: Probes = NO_PROBES,
        every: int = 10,
    ) -> None:
        super().report(step, total, metrics, save, probes, every)
        for part in RUNGS[:-1]:  # the end is told by the trial, which has more to do
            if self.score and step == max(1, total * part // RUNGS[-1]):
                self.told(part, self.score(save()))


class Judge:
    """Scores clusterings of the sweep's images in the one space that all trials share: the base's features."""

    def __init__(self, plan: Plan, config: Config, device: torch.device):
        self.config, self.device, self.seed = config, device, plan.config.seed
        self.same_space = plan.start != "pretrain"  # as the reference's
        self.center_fraction = plan.config.spice_self.center_fraction
        self.prior = plan.config.spice_self.prior
        self.num_images = read_manifest(plan.base / "data").clustered
        self.reference = np.load(plan.base / "features/features.npy", mmap_mode="r")[: self.num_images]

    def of_heads(
        self, heads: ClusterHeads, loss: Float[Tensor, " H"], features: Float[np.ndarray, "N D"]
    ) -> tuple[Int[np.ndarray, " N"], Scores]:
        """The clusters by the head of the lowest loss, and their scores.

        `select_loss` is by the same loss and share of a center for all trials, whatever they learned by; losses on
        features of their own cannot be compared and are left out.
        """
        x = torch.from_numpy(features.astype(np.float32)).to(self.device)
        heads = heads.to(self.device)
        with torch.no_grad():
            by_head = torch.cat([heads(part).argmax(2) for part in x.split(inference.CHUNK)], 1).cpu().numpy()
        chosen = int(loss.argmin())
        scores = self._of_clusters(by_head[chosen])
        if len(by_head) > 1:
            scores["agreement"] = metrics.agreement(by_head)
        if self.same_space:
            wanted = quotas(self.num_images, self.config.clusters, self.prior)
            head, share = heads.select(chosen), self.center_fraction
            with torch.no_grad():
                fair = selection_loss(x, outputs(head, x), wanted, share, double_softmax_cross_entropy)
            scores["select_loss"] = float(fair)
        return by_head[chosen], scores

    def heads(self, state: Tensors) -> Scores:
        """Of stage 2 at a rung."""
        best = {
            name.removeprefix("best."): value for name, value in state["select"].items() if name.startswith("best.")
        }
        return self.of_heads(ClusterHeads.holding(best), state["select"]["loss"], self.reference)[1]

    def backbone(self, folder: Path, state: Tensors) -> Scores:
        """Of stage 1 at a rung: k-means on its features, which is no more than a sign of what the heads will find."""
        from sklearn.cluster import KMeans

        config = self.config
        images, _ = open_dataset(config, folder, self.device)
        with closing(images):
            features = inference.backbone_features(config, state["backbone"], images, self.device)[: self.num_images]
        model = KMeans(config.clusters, n_init=4, random_state=self.seed)  # pyright: ignore[reportArgumentType]
        return self._of_clusters(model.fit_predict(features))

    def of_labels(
        self, labels: Int[np.ndarray, " N"], features: Float[np.ndarray, "N D"]
    ) -> tuple[Int[np.ndarray, " N"], Scores]:
        """What students make of reliable labels, (N,), -100 where there is none: stage 3 in small.

        Each learns one half of the labels, by linear maps of the frozen features; the clusters are their mean
        prediction of every image. Labels that are few or wrong leave students that disagree.
        """
        x = torch.from_numpy(features.astype(np.float32)).to(self.device)
        logits = students(x, torch.from_numpy(labels).to(self.device), self.config.clusters, self.seed)
        clusters = logits.softmax(2).mean(0).argmax(1).cpu().numpy()
        agreement = metrics.agreement(logits.argmax(2).cpu().numpy())
        taught = float(np.mean(labels != UNRELIABLE))
        return clusters, self._of_clusters(clusters) | {"agreement": agreement, "reliable": taught}

    def _of_clusters(self, clusters: Int[np.ndarray, " N"]) -> Scores:
        sizes = metrics.cluster_sizes(clusters, self.config.clusters)
        return {
            "generalization": generalization(self.reference, clusters, self.config.clusters, self.seed),
            "silhouette": metrics.silhouette(self.reference, clusters, seed=self.seed),
            "nonempty": float((sizes > 0).sum()),
            "size_entropy": metrics.size_entropy(clusters, self.config.clusters),
        }


def students(
    features: Float[Tensor, "N D"], labels: Int[Tensor, " N"], clusters: int, seed: int
) -> Float[Tensor, "S N K"]:
    """Logits of STUDENTS linear heads for all images, each trained on its half of the images that have a label."""
    known = (labels != UNRELIABLE).nonzero()[:, 0].cpu()
    torch.manual_seed(seed)
    heads = ClusterHeads(STUDENTS, features.shape[1], clusters, layers=1).to(features.device)
    halves = [known[torch.randperm(len(known))] for _ in range(STUDENTS // 2)]
    size = max(1, len(known) // 2)
    mine = torch.stack([part for half in halves for part in (half[:size], half[-size:])]).to(features.device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.05)
    batch = min(size, 256)
    for _ in range(STUDENT_STEPS):
        rows = mine[:, torch.randint(size, (batch,))]
        logits = heads(features[rows])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return torch.cat([heads(part) for part in features.split(inference.CHUNK)], 1)
