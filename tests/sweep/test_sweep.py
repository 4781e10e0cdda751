"""What a sweep makes of trials, one at a time in this process; test_tune.py has the same on real Ray."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from spice_dist import cli
from spice_dist.config import Config, flatten, override, read_config
from spice_dist.data import augment
from spice_dist.data.sources import Source, open_source
from spice_dist.distributed import ray_train
from spice_dist.errors import DamagedFile, UserError
from spice_dist.evaluate import clustering_accuracy
from spice_dist.launching import Launch
from spice_dist.methods import spice_self
from spice_dist.pipeline import fit_until
from spice_dist.recipes import photos, trained
from spice_dist.sweep import ray_tune, run
from spice_dist.sweep.ray_tune import Round, Search
from spice_dist.sweep.records import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    Plan,
    complete_record,
    read_record,
    trial_folder,
    write_record,
)
from spice_dist.sweep.report import correlations
from spice_dist.sweep.results import best_first, rows, write_results
from spice_dist.sweep.run import Place, Sweep, objectives_of
from spice_dist.sweep.spaces import Space, Start, read_space, sample, space_file, start_of
from spice_dist.sweep.trials import RUNGS, run_trial
from tests.folders import unrecorded
from tests.methods.conftest import SMALL

SPACES = ("heads", "thresholds", "augmentations", "pretrain")
CONFIG = override(
    SMALL, {"data.loader": "torch", "moco.epochs": 1, "spice_self.epochs": 3, "spice_self.view_epochs": 2}
)
SETTINGS = {"spice_self.lr": 0.004, "spice_self.layers": 1}
FEW_NEIGHBORS = {"reliable.max_neighbors": 2, "reliable.floor_fraction": 0.0}


HERE = Launch(workers=0, threads=1)


def few_digits() -> Source:
    source = open_source("digits")
    assert source.labels is not None
    return replace(source, paths=source.paths[:200], labels=source.labels[:200])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A sweep's folder whose base run holds 200 digits, stage 1, heads, and the views of two epochs."""
    import torch

    from spice_dist.distributed.worker import LocalWorker

    folder = tmp_path_factory.mktemp("sweep")
    fit_until("spice_self", CONFIG, few_digits(), folder / "base", HERE)
    spice_self.store_views(CONFIG, CONFIG.spice_self, LocalWorker(folder / "base", "views", torch.device("cpu")))
    return folder


def plan_of(folder: Path, start: Start = Start.HEADS, reliable: bool = False) -> Plan:
    return Plan(folder, CONFIG, start, reliable)


@pytest.fixture
def heads(base, tmp_path) -> Plan:
    """A plan of trials of heads, in a sweep of its own."""
    (tmp_path / "base").symlink_to(base / "base")
    return plan_of(tmp_path)


def thresholds_of(heads: Plan) -> Plan:
    return replace(heads, start=Start.THRESHOLDS, reliable=True)


def ignore(rung: int, scores: dict) -> None:
    pass


@pytest.mark.parametrize("name", SPACES)
def test_every_range_of_our_spaces_names_a_setting_and_draws_values_of_its_type(name):
    space = read_space(space_file(name))
    for seed in range(20):
        override(Config(), sample(space.ranges, seed))
    searches_labels = any(setting.startswith("reliable.") for setting in space.ranges)
    plan = Plan(Path(), CONFIG, start_of(space.ranges), searches_labels)
    assert space.name == name
    assert space.metric in (*objectives_of(plan), "combined")
    assert {"pretrain": "pretrain", "thresholds": "thresholds"}.get(name, "heads") == plan.start


@pytest.mark.parametrize("name", SPACES)
def test_the_published_value_lies_within_every_range_that_has_numbers(name):
    space = read_space(space_file(name))
    published = flatten(Config())
    outside = {"spice_self.strong.brightness", "spice_self.strong.contrast"}  # published off: no jitter
    automatic = {"spice_self.entropy_weight"}  # published by the number of clusters: below 0 in the settings
    for setting, domain in space.ranges.items():
        value = published[setting]
        if hasattr(domain, "lower"):
            assert setting in outside or domain.lower <= value <= domain.upper, setting
        else:
            assert setting in automatic or value in domain.categories or str(value) in domain.categories, setting


def test_stored_views_give_the_clusters_that_encoding_gives(heads, tmp_path):
    with_views = run_trial(heads, SETTINGS, ignore)
    first = np.load(trial_folder(heads, SETTINGS) / "clusters.npy")
    other = tmp_path / "other"
    (other / "base").mkdir(parents=True)
    for stage in ("data", "moco", "features"):
        (other / "base" / stage).symlink_to(heads.base / stage)
    without = replace(heads, folder=other)
    assert run_trial(without, SETTINGS, ignore) == with_views
    assert np.array_equal(np.load(trial_folder(without, SETTINGS) / "clusters.npy"), first)


def test_a_trial_of_heads_reads_no_image_and_encodes_nothing(heads, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a view was encoded")

    monkeypatch.setattr(augment, "view_batches", refuse)
    run_trial(heads, SETTINGS, ignore)
    with pytest.raises(AssertionError, match="encoded"):
        run_trial(heads, {**SETTINGS, "spice_self.strong.noise": 0.2}, ignore)  # this view is not stored


@pytest.mark.parametrize("start", ["heads", "thresholds"])
def test_no_true_label_changes_a_trial(start, heads, base, tmp_path):
    plan, settings = (heads, SETTINGS) if start == "heads" else (thresholds_of(heads), FEW_NEIGHBORS)
    scores = run_trial(plan, settings, ignore)
    blind = tmp_path / "blind"
    unrecorded(Path(shutil.copytree(base / "base", blind / "base")))
    (blind / "base/data/labels.npy").unlink()
    assert run_trial(replace(plan, folder=blind), settings, ignore) == scores


def test_the_rungs_come_in_order_and_the_last_has_the_result(heads):
    rungs = []
    scores = run_trial(heads, SETTINGS, lambda rung, so_far: rungs.append((rung, so_far)))
    assert [rung for rung, _ in rungs] == [rung for rung in RUNGS if CONFIG.spice_self.epochs * rung // 27 or rung == 3]
    assert rungs[-1][1] == scores
    assert set(scores) == {"generalization", "agreement", "silhouette", "select_loss", "nonempty", "size_entropy"}


def test_a_finished_trial_is_not_run_again_and_its_folder_goes_with_its_settings(heads):
    scores = run_trial(heads, SETTINGS, ignore)
    folder = trial_folder(heads, dict(reversed(SETTINGS.items())))
    assert json.loads((folder / "trial.json").read_text())["state"] == FINISHED
    (heads.folder / "base").unlink()  # nothing could be run now
    assert run_trial(heads, SETTINGS, ignore) == scores
    assert not (folder / "spice_self/checkpoints").exists()
    assert (folder / "clusters.npy").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"spice_self.lr": -1.0}, "spice_self.lr is -1.0; it must be above 0"),
        ({"spice_self.loss": "hinge"}, "it can be double_softmax"),
        ({"spice_self.lr": 1e30}, "not finite"),
    ],
)
def test_a_bad_value_is_a_row_with_its_reason(heads, settings, reason):
    with pytest.raises(UserError, match=reason):
        run_trial(heads, settings, ignore)
    (row,) = rows(heads.folder)
    assert row["state"] == FAILED
    assert reason in row["reason"]
    assert row["settings"] == settings


def test_thresholds_start_from_the_heads_of_the_base_and_choose_by_labels_that_teach(heads):
    plan = thresholds_of(heads)
    scores = run_trial(plan, FEW_NEIGHBORS, ignore)
    assert scores["reliable"] == np.mean(np.load(trial_folder(plan, FEW_NEIGHBORS) / "reliable/labels.npy") >= 0)
    assert (trial_folder(plan, FEW_NEIGHBORS) / "spice_self").is_symlink()
    assert "select_loss" not in scores
    none = {"reliable.rule": "official", "reliable.ratio": 1.0, "reliable.min_confidence": 1.0}
    with pytest.raises(UserError, match="no label is reliable"):
        run_trial(plan, none, ignore)


def test_pretraining_trials_train_stage_one_and_are_judged_in_the_base_s_space(heads):
    plan = replace(heads, start=Start.PRETRAIN)
    rungs = []
    run_trial(plan, {"moco.temperature": 0.3}, lambda rung, scores: rungs.append((rung, scores)))
    folder = trial_folder(plan, {"moco.temperature": 0.3})
    assert not (folder / "features").is_symlink()
    assert {rung for rung, _ in rungs} >= {RUNGS[-1]}
    assert "select_loss" not in rungs[-1][1]
    ours, theirs = (np.load(where / "features/features.npy") for where in (folder, heads.base))
    assert not np.array_equal(ours, theirs)


def test_the_settings_of_a_space_say_where_its_trials_start():
    assert start_of({"reliable.ratio": 0}) == "thresholds"
    assert start_of({"reliable.ratio": 0, "spice_self.lr": 0}) == "heads"
    assert start_of({"spice_self.lr": 0, "moco.lr": 0}) == "pretrain"
    for name in ("clusters", "data.size", "seed", "spice_semi.lr"):
        with pytest.raises(UserError, match=f"cannot search {name}: "):
            start_of({name: 0})


def test_the_table_the_best_configuration_and_the_page_say_the_same(heads):
    for lr in (0.001, 0.004, 0.01):
        run_trial(heads, {"spice_self.lr": lr}, ignore)
    with pytest.raises(UserError):
        run_trial(heads, {"spice_self.lr": 0.0}, ignore)
    about = {"space": "<b>heads", "ranges": {"spice_self.lr": ""}, "images": "200 images, 0"}
    about |= {"config": {"spice_self": {}}, "start": "heads", "reliable": False, "command": None}
    about["config"] = json.loads(json.dumps(asdict(CONFIG)))
    (heads.folder / "sweep.json").write_text(json.dumps(about))
    ordered = write_results(heads.folder, "generalization")
    best = max(ordered[:3], key=lambda row: row["generalization"])
    assert ordered[0] == best
    assert ordered[3]["state"] == FAILED
    assert read_config(heads.folder / "best.json") == override(CONFIG, best["settings"])
    table = pyarrow.parquet.read_table(heads.folder / "trials.parquet").to_pylist()
    assert [row["state"] for row in table].count(FINISHED) == 3
    lines = (heads.folder / "trials.csv").read_text().splitlines()
    assert lines[0].split(",")[:6] == ["number", "trial", "state", "reason", "seconds", "spice_self.lr"]
    assert len(lines) == 5
    for row in ordered[:3]:
        clusters = np.load(heads.folder / "trials" / row["trial"] / "clusters.npy")
        assert row["acc"] == clustering_accuracy(heads.base, clusters)
    page = (heads.folder / "report.html").read_text()
    assert "&lt;b&gt;heads" in page
    assert "<b>heads" not in page
    assert "must be above 0" in page
    assert "<script" not in page


def test_the_order_is_that_of_the_objective_and_what_has_not_finished_is_last():
    found = [
        {"state": FINISHED, "generalization": 0.5, "select_loss": 1.0, "consensus": 0.2, "acc": 0.1},
        {"state": FAILED},
        {"state": FINISHED, "generalization": 0.9, "select_loss": 3.0, "consensus": 0.1, "acc": 0.3},
        {"state": FINISHED, "generalization": 0.7, "select_loss": 2.0, "consensus": 0.3, "acc": 0.2},
    ]

    def order(objective: str) -> list[int]:
        return [found.index(row) for row in best_first(found, objective)]

    assert order("generalization") == [2, 3, 0, 1]
    assert order("select_loss") == [0, 3, 2, 1]
    assert order("combined") == [3, 2, 0, 1]  # mean places 1.5, 2 and 2.5
    finished = [row for row in found if row["state"] == FINISHED]
    table = {name: (rho, place) for name, rho, place in correlations(finished)}
    assert table["generalization"] == (pytest.approx(1), 1)
    assert table["select_loss"] == (pytest.approx(-1), 3)
    assert table["consensus"] == (pytest.approx(-0.5), 2)


def test_a_search_that_goes_on_knows_what_was_found_and_takes_unfinished_settings_first():
    ray_train.prepare(None)
    from ray import tune

    space = {"spice_self.lr": tune.loguniform(1e-4, 1e-2), "spice_self.loss": tune.choice(["a", "b"])}
    failed = {"spice_self.lr": 5e-3, "spice_self.loss": "b"}
    known = [({"spice_self.lr": 1e-3, "spice_self.loss": "a"}, 0.7), (failed, None)]
    unfinished = {"spice_self.lr": 2e-3, "spice_self.loss": "b"}
    this_round = Round(space, 5, known, [unfinished])
    search = ray_tune._search_algorithm(Search(5), this_round, CONFIG.seed)
    added = [(trial.params, trial.value) for trial in search._ot_study.trials if trial.state.is_finished()]
    assert added == known
    assert search.suggest("first") == unfinished
    assert search.suggest("second") not in (unfinished, known[0][0], failed)


def test_the_best_of_a_sweep_is_a_configuration_for_fit(tmp_path, capsys):
    config = override(photos(100), {"clusters": 10, "spice_self.lr": 0.003, "data.size": 8, "data.channels": 1})
    (tmp_path / "best.json").write_text(json.dumps({"version": 1, "config": asdict(config)}))
    assert read_config(tmp_path / "best.json") == config
    (tmp_path / "wrong.json").write_text('{"config": {"spice_self": {"lrr": 1}}}')
    for arguments, line in (
        (["--config", tmp_path / "wrong.json"], 'there is no setting "spice_self.lrr"'),
        (["--config", tmp_path / "none.json"], "cannot read"),
        (["--config", tmp_path / "best.json", "--recipe", "photos"], "leave --recipe"),
    ):
        assert cli.main(["fit", "digits", "--dry-run", *map(str, arguments)]) == 1
        assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--space", "nothing"], "no search space nothing"),
        (["--space", "heads", "--objective", "acc"], '--objective is "acc"'),
        (["--space", "thresholds", "--objective", "select_loss"], '--objective is "select_loss"'),
        (["--space", "heads", "--objective", "silhouette"], "it can be generalization, consensus, agreement, combined"),
        (["--space", "heads", "--trials", "0"], "--trials is 0"),
        (["--space", "heads", "--threads", "-1"], "--threads is -1; give 1 or more"),
        (["--space", "heads", "--threads", "0"], "--threads is 0; give 1 or more"),
        (["--space", "heads", "--time-budget", "-1"], "--time-budget is -1; give seconds above 0"),
        (["--space", "thresholds", "--scheduler", "asha"], "trials of thresholds have none"),
        (["--space", "heads", "--method", "imc_swav"], "leave --method out"),
        (["--space", "pretrain", "--pretext", "byol"], 'stage 1 is "byol": give another --space, or --pretext moco'),
        (["--space", "heads", "--base", "nowhere"], "--base nowhere has no features yet"),
        (["--space", "heads", "--set", "moco.batch=1280"], "moco.queue is 1024"),
        (["--space", "augmentations", "--objective", "agreement", "--set", "spice_self.heads=1"], "heads is 1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(arguments, line, tmp_path, capsys):
    assert cli.main(["tune", "digits", "--out", str(tmp_path / "sweep"), *arguments]) == 1
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("SPACE = 3", "has no SPACE"),
        ("import nothing_of_this_name", "cannot be run: ModuleNotFoundError"),
        ("from ray import tune\nSPACE = {'spice_self.lrr': tune.uniform(0, 1)}", "there is no setting"),
        ("from ray import tune\nSPACE = {'clusters': tune.randint(2, 9)}", "cannot search clusters"),
    ],
)
def test_a_space_of_the_user_s_own_that_cannot_be_used_is_one_line(text, line, tmp_path, capsys):
    (tmp_path / "own.py").write_text(text)
    arguments = ["tune", "digits", "--space", str(tmp_path / "own.py"), "--out", str(tmp_path / "sweep")]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1


def test_a_damaged_record_is_told_and_not_replaced(heads):
    scores = run_trial(heads, SETTINGS, ignore)
    folder = trial_folder(heads, SETTINGS)
    whole = (folder / "trial.json").read_text()
    for damaged in ("{", "", "[]", '{"state": "finished"}', whole.replace("finished", "stopped"), whole[:-9]):
        (folder / "trial.json").write_text(damaged)
        for read in (lambda: rows(heads.folder), lambda: run_trial(heads, SETTINGS, ignore)):
            with pytest.raises(DamagedFile, match=f"trial.json is damaged .*; remove {folder} to run this trial again"):
                read()
        assert (folder / "trial.json").read_text() == damaged
    shutil.rmtree(folder)
    assert run_trial(heads, SETTINGS, ignore) == scores
    assert [row["state"] for row in rows(heads.folder)] == [FINISHED]


def test_a_changed_clustering_of_a_trial_is_told(heads):
    run_trial(heads, SETTINGS, ignore)
    path = trial_folder(heads, SETTINGS) / "clusters.npy"
    clusters = np.load(path)
    clusters[0] += 1
    np.save(path, clusters)
    with pytest.raises(DamagedFile, match="clusters.npy is damaged"):
        write_results(heads.folder, "silhouette")


def test_a_trial_whose_process_wrote_no_end_gets_one_unless_it_was_cut_off(tmp_path):
    folder = tmp_path / "trial"
    assert complete_record(folder, SETTINGS, RUNNING, "", {}) is None
    assert not folder.exists()
    died = complete_record(folder, SETTINGS, FAILED, "its process was killed", {})
    assert died == read_record(folder)
    assert died is not None
    assert (died.state, died.reason, died.settings) == (FAILED, "its process was killed", SETTINGS)
    assert complete_record(folder, SETTINGS, STOPPED, "stopped early by the scheduler", {"silhouette": 1.0}) == died
    write_record(folder, replace(died, state=RUNNING, started=5.0))
    cut_off = complete_record(folder, SETTINGS, RUNNING, "", {"silhouette": 0.5})
    assert cut_off is not None
    assert (cut_off.state, cut_off.scores) == (RUNNING, {})
    stopped = complete_record(folder, SETTINGS, STOPPED, "stopped early by the scheduler", {"silhouette": 0.5})
    assert stopped is not None
    assert (stopped.state, stopped.started, stopped.scores) == (STOPPED, 5.0, {"silhouette": 0.5})


def one_line(out: Path, *arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `tune` prints of a mistake."""
    assert cli.main(["tune", "digits", "--space", "heads", "--out", str(out), *map(str, arguments)]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_base_without_a_finished_stage_of_features_is_refused_and_left_as_it_is(tmp_path, capsys):
    other = tmp_path / "fixmatch"
    (other / "features").mkdir(parents=True)
    (other / "features/features.npy").write_bytes(b"features of another method, which no stage made")
    before = files(tmp_path)
    assert "has no features yet" in one_line(tmp_path / "sweep", "--base", other, capsys=capsys)
    assert files(tmp_path) == before


def test_a_base_of_other_settings_is_refused_before_anything_is_made(base, tmp_path):
    space = tmp_path / "own.py"
    space.write_text("from ray import tune\nSPACE = {'spice_self.lr': tune.uniform(1e-3, 1e-2)}")
    for config, source, line in (
        (
            override(CONFIG, {"moco.epochs": 2}),
            few_digits(),
            "moco.epochs was 1, now 2; .* --config .*/config.json",
        ),
        (CONFIG, open_source("digits"), "stage data: images was"),
    ):
        with pytest.raises(UserError, match=line):
            run.tune(config, source, str(space), Place(tmp_path / "sweep", base=base / "base"), Search(1), HERE)
        assert not (tmp_path / "sweep").exists()


def test_a_run_and_a_sweep_do_not_share_a_folder(tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, name in ((run, "config.json"), (other, "sweep.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    before = files(tmp_path)
    assert f"holds a run; give another --out, or --base {run}" in one_line(run, capsys=capsys)
    assert cli.main(["fit", "digits", "--out", str(other), "--workers", "0"]) == 1
    assert capsys.readouterr().err.endswith("other holds a sweep; give another --out\n")
    assert files(tmp_path) == before


def test_a_sweep_without_a_trial_takes_the_settings_of_a_corrected_command_and_one_with_a_trial_does_not(tmp_path):
    def sweep_of(plan: Plan) -> Sweep:
        return Sweep(plan, few_digits(), Space("heads", {}, "combined"), Search(1), HERE, None)

    right_plan = replace(plan_of(tmp_path), config=override(CONFIG, {"moco.lr": 0.01}))
    wrong, right = sweep_of(plan_of(tmp_path)), sweep_of(right_plan)
    run._begin(wrong, resume=False)
    for resume in (False, True):
        run._begin(right, resume)
        assert read_config(tmp_path / "sweep.json") == right_plan.config
    (tmp_path / "trials").mkdir()
    with pytest.raises(UserError, match="holds a sweep; go on with it by --resume"):
        run._begin(right, resume=False)
    with pytest.raises(UserError, match="other settings: moco.lr was 0.01"):
        run._begin(wrong, resume=True)
    assert read_config(tmp_path / "sweep.json") == right_plan.config


def test_photos_on_the_neighbour_graph_are_searched_with_the_published_stages():
    config = run.with_published_stages(replace(trained(photos(100), 100, None), clusters=3))
    assert (config.stage2, config.stage3) == ("spice_self", "spice_semi")
    without = replace(CONFIG, stage3="none")
    assert run.with_published_stages(without) == without


def test_a_score_that_no_trial_has_chooses_none(heads):
    space = heads.folder / "own.py"
    space.write_text("from ray import tune\nSPACE = {'spice_self.heads': tune.choice([1, 2])}")
    run_trial(heads, {"spice_self.heads": 1}, ignore)

    def go_on(objective: str) -> list[dict]:
        return run.tune(CONFIG, few_digits(), str(space), Place(heads.folder, resume=True), Search(1, objective), HERE)

    (row,) = go_on("generalization")
    assert json.loads((heads.folder / "best.json").read_text())["trial"] == row["trial"]
    with pytest.raises(UserError, match="no finished trial has the score agreement"):
        go_on("agreement")
    assert not (heads.folder / "best.json").exists()
