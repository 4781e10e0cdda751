"""The command as a user types it: a run from images to report, and every mistake in one line."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spice_dist import cli, outer_stages, pipeline
from spice_dist.data.manifest import read_paths
from tests.folders import unrecorded

TINY = [
    *("--workers", "0", "--threads", "1"),
    *("--set", "moco.epochs=1", "--set", "moco.queue=256", "--set", "spice_self.epochs=1"),
    *("--set", "spice_self.heads=2", "--set", "spice_semi.steps=2", "--set", "data.loader=torch"),
]
DIGITS = [*TINY, "--set", "backbone.widths=(8,8,16,32)", "--set", "spice_semi.labelled=16"]
LONGER = [*DIGITS, "--set", "moco.epochs=8"]
PHOTO = [*TINY, "--set", "data.size=16", "--set", "moco.batch=16", "--set", "moco.queue=16"]
PHOTO += ["--set", "backbone.widths=(8,8,8,8)"]


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def photos(folder: Path, count: int = 24, side: int = 20) -> Path:
    """A nested folder of real pixels: crops of a photograph, half of them turned upside down in a second folder."""
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image("china.jpg")
    for i in range(count):
        crop = photograph[10 * i : 10 * i + side, 20 * i : 20 * i + side]
        place = folder / ("upright" if i % 2 else "turned")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop if i % 2 else crop[::-1]).save(place / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert run("fit", "digits", "--out", out, *DIGITS) == 0
    return out


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    photos(folder / "in")
    (folder / "in/upright/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    assert run("fit", folder / "in", "--clusters", "3", "--out", folder / "run", *PHOTO) == 0
    return folder / "run"


def test_metrics_hold_the_keys_that_others_rely_on(digits_run):
    metrics = json.loads((digits_run / "metrics.json").read_text())
    always = {"method", "uses_labels", "n", "k", "nonempty", "seconds", "select", "eval", "baselines", "heads"}
    assert set(metrics) == always | {"reliable", "verdict", "duplicates", "classes"}
    assert sum(metrics["classes"]["images"].values()) == 1797
    assert set(metrics["verdict"]) == {"level", "why", "remedy", "text"}
    scores = {"acc", "nmi", "nmi_geometric", "ami", "ari"}
    assert (metrics["n"], metrics["k"]) == (1797, 10)
    assert set(metrics["eval"]) == scores
    assert set(metrics["baselines"]) == {"kmeans_pixels", "kmeans_features", "spectral"}
    assert all(set(baseline) == scores for baseline in metrics["baselines"].values())
    assert all(set(head) == {"select_loss", "acc"} for head in metrics["heads"])
    assert set(metrics["reliable"]) == {"count", "fraction", "acc", "advice"}
    assert set(metrics["seconds"]) == {"data", "moco", "features", "spice_self", "reliable", "spice_semi"}


def test_imc_swav_as_stage_1_scores_as_it_does_alone(tmp_path):
    """The same seed and settings: what the report puts beside SPICE is the clustering of IMC-SwAV itself."""
    shorter = [*DIGITS, "--set", "imc_swav.epochs=1", "--set", "imc_swav.warmup=2"]
    assert run("fit", "digits", "--out", tmp_path / "alone", "--method", "imc_swav", *shorter) == 0
    assert run("fit", "digits", "--out", tmp_path / "stage 1", "--pretext", "imc_swav", *shorter) == 0
    alone = json.loads((tmp_path / "alone/metrics.json").read_text())["eval"]
    assert json.loads((tmp_path / "stage 1/imc_swav/eval.json").read_text()) == pytest.approx(alone)
    assert "IMC-SwAV, stage 1" in (tmp_path / "stage 1/report.html").read_text()


def test_several_runs_are_one_table_of_means_and_deviations(digits_run, tmp_path, capsys):
    other = unrecorded(Path(shutil.copytree(digits_run, tmp_path / "other")))
    metrics, scores = (json.loads((other / name).read_text()) for name in ("metrics.json", "spice_semi/eval.json"))
    acc, silhouette = scores["acc"], metrics["select"]["silhouette"]
    scores["acc"] += 0.2
    metrics["select"]["silhouette"] += 0.1
    (other / "metrics.json").write_text(json.dumps(metrics))
    (other / "spice_semi/eval.json").write_text(json.dumps(scores))
    assert run("evaluate", digits_run, other) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 runs")
    (spice,) = (line for line in lines if line.startswith("SPICE "))
    assert spice.split()[1:4] == [f"{acc + 0.1:.3f}", "±", "0.141"]  # 0.2 / sqrt(2)
    assert f"silhouette {silhouette + 0.05:.3f} ± 0.071" in " ".join(lines[-1].split())
    assert run("evaluate", digits_run, other, "--probe", "knn") == 1


def test_a_run_among_its_own_images_is_refused(tmp_path, capsys):
    folder = photos(tmp_path / "photos")
    before = sorted(folder.rglob("*"))
    for out in (folder, folder / "run"):
        assert run("fit", folder, "--out", out, "--backbone", "scratch", "--clusters", "2", *PHOTO) == 1
        assert "is inside the folder of the images; give a folder elsewhere" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_kmeans_on_pixels_scores_what_is_known_of_it(digits_run):
    metrics = json.loads((digits_run / "metrics.json").read_text())
    assert metrics["baselines"]["kmeans_pixels"]["acc"] == pytest.approx(0.792, abs=0.02)


def test_assignments_have_one_row_per_image_in_image_order(digits_run):
    with open(digits_run / "assignments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "path", "cluster", "confidence", "reliable"]
    assert [int(row["index"]) for row in rows] == list(range(1797))
    assert [row["path"] for row in rows] == read_paths(digits_run / "data")
    assert all(0 <= int(row["cluster"]) < 10 and 0 < float(row["confidence"]) <= 1 for row in rows)
    reliable = np.load(digits_run / "reliable/labels.npy") >= 0
    assert [row["reliable"] == "1" for row in rows] == reliable.tolist()


def test_nothing_in_the_run_folder_is_a_pickle(digits_run):
    suffixes = {path.suffix for path in digits_run.rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert suffixes <= {".json", ".jsonl", ".csv", ".npy", ".safetensors", ".html", ".beton", ".md"}


def test_the_model_folder_alone_predicts_what_the_run_assigned(digits_run, tmp_path):
    (digits_run / "model").rename(tmp_path / "model")
    try:
        assert run("predict", tmp_path / "model", "digits", "--out", tmp_path / "new.csv") == 0
    finally:
        (tmp_path / "model").rename(digits_run / "model")
    with open(tmp_path / "new.csv", newline="") as new, open(digits_run / "assignments.csv", newline="") as old:
        predicted, assigned = list(csv.DictReader(new)), list(csv.DictReader(old))
    assert [row["cluster"] for row in predicted] == [row["cluster"] for row in assigned]


def test_a_run_leaves_a_model_card(digits_run):
    card = (digits_run / "model/README.md").read_text()
    assert "# 10 groups of 1,797 images" in card
    assert "| this model's groups |" in card


def test_the_same_command_again_trains_nothing_and_changes_nothing(digits_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in digits_run.rglob("*.safetensors")}
    assignments = (digits_run / "assignments.csv").read_bytes()
    assert run("fit", "digits", "--out", digits_run, *DIGITS) == 0
    assert {path: path.stat().st_mtime_ns for path in digits_run.rglob("*.safetensors")} == before
    assert (digits_run / "assignments.csv").read_bytes() == assignments
    assert "moco        finished before" in capsys.readouterr().err


def test_the_table_names_the_four_methods_and_the_report(digits_run, capsys):
    assert run("evaluate", digits_run) == 0
    printed = capsys.readouterr().out
    for part in ("Pixels + k-means", "Features + k-means", "SPICE-Self", "SPICE ", "ACC", "NMI", "ARI", "report.html"):
        assert part in printed


def test_a_folder_with_a_corrupt_image_is_clustered_without_it(photo_run):
    with open(photo_run / "data/quarantine.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["upright/broken.jpg"]
    metrics = json.loads((photo_run / "metrics.json").read_text())
    assert metrics["n"] == 24
    assert metrics["eval"] is None
    assert metrics["baselines"] == {"kmeans_pixels": None, "kmeans_features": None, "spectral": None}
    report = (photo_run / "report.html").read_text()
    assert report.count("<script>") == 1  # the page's own
    assert "1 of 25 left out: 1 unreadable" in report


def test_folder_names_are_labels_only_when_asked(photo_run, tmp_path, capsys):
    folder = photo_run.parent / "in"
    assert run("fit", folder, "--clusters", "2", "--labels", "folder", "--out", tmp_path / "run", *PHOTO) == 0
    assert np.load(tmp_path / "run/data/labels.npy").tolist() == [0] * 12 + [1] * 12, "turned before upright"


def test_labels_given_later_score_without_training_again(photo_run, tmp_path, capsys):
    shutil.copytree(photo_run, tmp_path / "run")
    fit = ("fit", photo_run.parent / "in", "--clusters", "3", "--out", tmp_path / "run", *PHOTO)
    before = (tmp_path / "run/assignments.csv").read_bytes()
    for labels, scored in [(["--labels", "folder"], True), ([], False)]:
        assert run(*fit, *labels) == 0
        assert (json.loads((tmp_path / "run/metrics.json").read_text())["eval"] is not None) == scored
        assert "spice_semi  finished before" in capsys.readouterr().err
    assert (tmp_path / "run/assignments.csv").read_bytes() == before


def test_without_ffcv_or_scratch_the_run_goes_on_and_says_so_once_in_a_line(photo_run, tmp_path):
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv/__init__.py").write_text("raise ImportError('libturbojpeg.so.0: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    scratch = tmp_path / "ffcv/__init__.py/below-a-file"
    fit = ("fit", photo_run.parent / "in", "--clusters", "3", *PHOTO, "--set", "data.format=jpg", "--scratch", scratch)
    auto, ffcv = (
        [*map(str, fit), "--out", str(tmp_path / name), "--set", f"data.loader={name}"] for name in ("auto", "ffcv")
    )
    program = f"from spice_dist import cli; print(cli.main({auto}), cli.main({ffcv}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 1"
    assert done.stderr.count("libturbojpeg.so.0") == 2, "once by each"
    assert f"\nspice-dist: the images cannot be copied to {scratch} (Not a directory)" in "\n" + done.stderr
    assert "UserWarning" not in done.stderr
    assert json.loads((tmp_path / "auto/data/manifest.json").read_text())["format"] == "jpg"


def test_a_folder_is_packed_once_and_the_file_is_clustered_like_the_folder(photo_run, tmp_path, capsys):
    folder, packed = photo_run.parent / "in", tmp_path / "photos.beton"
    pack = ("pack", folder, packed, "--size", "16", "--labels", "folder")
    assert run(*pack) == 0
    assert "24 images" in capsys.readouterr().out
    before = packed.stat().st_mtime_ns
    assert run(*pack) == 0
    assert packed.stat().st_mtime_ns == before, "packed again"
    assert run("fit", packed, "--clusters", "3", "--out", tmp_path / "run", *PHOTO) == 0
    for name in ("assignments.csv", "data/paths.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (photo_run / name).read_bytes(), name
    assert json.loads((tmp_path / "run/metrics.json").read_text())["eval"] is not None
    assert run("predict", tmp_path / "run", packed, "--out", tmp_path / "new.csv") == 0
    assert len((tmp_path / "new.csv").read_text().splitlines()) == 25


def test_mistakes_in_packing_are_one_line(photo_run, tmp_path, capsys):
    folder = photo_run.parent / "in"
    assert "x.beton" in mistake(capsys, "pack", folder, tmp_path / "x")
    assert "give 2 .. 4096" in mistake(capsys, "pack", folder, tmp_path / "x.beton", "--size", "1")
    assert "1 .. 100" in mistake(capsys, "pack", folder, tmp_path / "x.beton", "--quality", "0")
    assert "--split" in mistake(capsys, "pack", folder, tmp_path / "x.beton", "--split", "split")
    (tmp_path / "foreign.beton").write_bytes(b"not ours")
    said = mistake(capsys, "fit", tmp_path / "foreign.beton", "--clusters", "2", "--out", tmp_path / "run")
    assert "--trust-foreign-beton" in said
    said = mistake(capsys, "pack", tmp_path / "foreign.beton", tmp_path / "y.beton", "--trust-foreign-beton")
    assert "8 bytes" in said


def mistake(capsys, *arguments: str | Path) -> str:
    """The one line that a mistake prints."""
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("spice-dist: ")
    assert "Traceback" not in printed.err + printed.out
    return lines[0]


def test_wrong_data_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("no image")
    for data, word in [("nowhere", "nowhere"), ("empty", "empty"), ("texts", "txt")]:
        line = mistake(capsys, "fit", tmp_path / data, "--clusters", "2", "--out", tmp_path / "run")
        assert word in line
    assert not (tmp_path / "run").exists()


def test_wrong_numbers_of_clusters_are_refused_in_one_line(tmp_path, capsys):
    folder = photos(tmp_path / "in", count=6)
    for clusters, word in [("7", "more than the 6 images"), ("1", "at least 2")]:
        assert word in mistake(capsys, "fit", folder, "--clusters", clusters, "--out", tmp_path / "run")
    for clusters in ("0", "many"):
        with pytest.raises(SystemExit, match="1"):
            run("fit", folder, "--clusters", clusters, "--out", tmp_path / "run")
        assert "give auto, or a whole number of at least 2" in capsys.readouterr().err
    assert "6 images are too few" in mistake(capsys, "fit", folder, "--out", tmp_path / "run")


def test_without_the_check_more_clusters_than_images_cost_stage_1_first(tmp_path, capsys, monkeypatch):
    """Why the numbers are looked at before anything is trained."""
    folder = photos(tmp_path / "in", count=18)
    fit = ("fit", folder, "--clusters", "30", "--out", tmp_path / "run", *PHOTO)
    assert "more than the 18 images" in mistake(capsys, *fit)
    assert not (tmp_path / "run/moco").exists()
    for module in (pipeline, outer_stages):
        monkeypatch.setattr(module, "check_settings", lambda *_: None)
    assert run(*fit) == 1
    assert "18 images are too few for 30 clusters" in capsys.readouterr().err
    assert (tmp_path / "run/moco/stage.json").exists()


def test_a_batch_of_more_images_than_there_are_is_refused_with_both_numbers(tmp_path, capsys):
    folder = photos(tmp_path / "in", count=12)
    line = mistake(capsys, "fit", folder, "--clusters", "2", "--out", tmp_path / "run", *PHOTO)
    assert "16" in line
    assert "12" in line


def test_a_class_of_one_image_is_scored_like_any_other(tmp_path):
    folder = photos(tmp_path / "in")
    (folder / "alone").mkdir()
    shutil.move(folder / "upright/01.png", folder / "alone/01.png")
    fit = ("fit", folder, "--labels", "folder", "--clusters", "3", "--out", tmp_path / "run", *PHOTO)
    assert run(*fit) == 0
    scores = json.loads((tmp_path / "run/metrics.json").read_text())["eval"]
    assert all(np.isfinite(list(scores.values())))


def test_no_name_of_a_file_reaches_the_terminal_as_a_command_to_it(photo_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # a pipe gets names as they are
    evil = "\x1b]0;pwned\x07\x1b[2J\x9b1m\u202e.png"
    folder = tmp_path / f"in{evil}"
    shutil.copytree(photo_run.parent / "in/turned", folder)
    shutil.copy(folder / "00.png", folder / evil)
    (folder / f"bad{evil}").write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text(f"../{evil}\n")
    shutil.copytree(photo_run, tmp_path / f"run{evil}")
    for arguments in [
        ("predict", photo_run, folder / evil), ("predict", photo_run, folder / f"bad{evil}"),
        ("predict", photo_run, folder, "--out", tmp_path / f"{evil}.csv"), ("predict", photo_run, folder),
        ("fit", f"nowhere{evil}", "--out", tmp_path / "x"),
        ("fit", tmp_path / "list.txt", "--out", tmp_path / "x"), ("fit", folder, "--unknown", evil),
        ("evaluate", tmp_path / f"run{evil}"), ("evaluate", tmp_path / f"run{evil}", photo_run),
    ]:  # fmt: skip
        with contextlib.suppress(SystemExit):
            run(*arguments)
        printed = capsys.readouterr()
        text = (printed.out + printed.err).replace("\n", "").replace("\r", "")
        assert text.isprintable(), (arguments, text)


def test_a_planted_secret_is_in_nothing_that_a_run_leaves_or_shows(tmp_path, capsys, monkeypatch):
    secret = "sesame-1234"
    folder = photos(tmp_path / f"in?token={secret}")
    (folder / "bad.png").write_bytes(b"nothing")
    for name in ("RAY_AUTH_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{secret}@127.0.0.1:1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit = ("fit", f"local://{folder}", "--clusters", "2", "--out", tmp_path / "run", *PHOTO)
    assert run(*fit, "--track", "wandb") == 0
    assert run(*fit, "--track", "mlflow") == 1, "nobody listens there"
    assert run(*fit, "--labels", "list") == 1
    printed = capsys.readouterr()
    assert "MLflow does not answer at http://127.0.0.1:1" in printed.err
    assert secret not in printed.out + printed.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_numbers_of_workers_that_are_none_are_refused_in_one_line(tmp_path, capsys):
    for workers, word in [("a", "give a number such as 4"), ("2:", "no range"), ("4:2", "no range"), ("-1", "range")]:
        with pytest.raises(SystemExit):
            run("fit", "digits", "--out", tmp_path / "run", f"--workers={workers}")
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert word in line
    assert "3:3; none of these divides the 2" in mistake(
        capsys, "fit", "digits", "--out", tmp_path / "run", "--workers", "3:3"
    )


def test_only_seeds_of_the_same_settings_are_averaged(digits_run, tmp_path, capsys):
    def changed(name, config, metrics):
        unrecorded(Path(shutil.copytree(digits_run, tmp_path / name)))
        for file, change in (("config.json", config), ("metrics.json", metrics)):
            content = json.loads((tmp_path / name / file).read_text())
            (tmp_path / name / file).write_text(json.dumps(change(content)))
        return tmp_path / name

    def same(content):
        return content

    scores = json.loads((digits_run / "metrics.json").read_text())["eval"]
    lower = {"eval": {**scores, "acc": scores["acc"] - 0.1}, "baselines": {"before": scores}}
    other_seed = changed("seed", lambda c: {**c, "config": {**c["config"], "seed": 9}}, same)
    alone = [
        changed("method", same, lambda m: {**m, "method": "supervised"}),
        changed("settings", lambda c: {**c, "config": {**c["config"], "clusters": 11}}, same),
        changed("corrected", lambda c: {**c, "applied": {}}, lambda m: m | lower | {"result": "corrected"}),
    ]
    assert run("evaluate", digits_run, other_seed) == 0
    assert capsys.readouterr().out.startswith("2 runs, mean ± standard deviation")
    assert run("evaluate", alone[2], other_seed, *alone[:2], digits_run) == 0
    table = capsys.readouterr().out
    assert table.count("2 runs, mean ± standard deviation") == 1
    assert table.endswith("Only runs that differ in the seed alone are averaged.\n")
    assert "nan" not in table.partition("2 runs")[0]
    assert f"{scores['acc'] - 0.1:.3f}  " in table.partition("2 runs")[0]
    assert all(f"{run}\n" in table for run in alone)


def test_the_mean_of_seeds_with_different_results_is_of_their_results(digits_run):
    from dataclasses import replace

    from spice_dist.report.reading import load
    from spice_dist.report.table import _rows

    good, bad = {"acc": 0.9}, {"acc": 0.3}
    one = replace(load(digits_run), scores={"A": bad, "B (result)": good})
    other = replace(one, scores={"B": bad, "A (result)": good})
    assert _rows([one, one]) == [one.scores, one.scores]
    assert _rows([one, other]) == [{"A": bad, "B": good, "Result": good}, {"A": good, "B": bad, "Result": good}]


def test_too_many_bad_images_are_refused_with_the_option_that_allows_them(tmp_path, capsys):
    folder = photos(tmp_path / "in", count=20)
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(b"nothing")
    fit = ("fit", folder, "--clusters", "2", "--out", tmp_path / "run", *PHOTO)
    assert run(*fit) == 1
    assert "--max-bad" in capsys.readouterr().err.strip().splitlines()[-1]
    assert run(*fit, "--max-bad", "0.5") == 0, "what the line says must work in the same folder"
    assert run("predict", tmp_path / "run", folder, "--out", tmp_path / "new.csv") == 0
    assert len((tmp_path / "new.csv").read_text().splitlines()) == 1 + 20
    assert "a.jpg" in (tmp_path / "new.csv.quarantine.csv").read_text()


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "give another --out" in mistake(capsys, "fit", "digits", "--out", tmp_path / "file/run", *TINY)


def test_another_configuration_is_refused_with_the_difference(digits_run, capsys):
    line = mistake(capsys, "fit", "digits", "--out", digits_run, *DIGITS, "--set", "moco.lr=0.5")
    assert "moco.lr was 0.06, now 0.5" in line


def test_other_pixels_under_the_same_names_are_refused(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), np.uint8)
    fit = ("fit", tmp_path / "x.npy", "--clusters", "2", "--out", tmp_path / "run", *PHOTO)
    np.save(tmp_path / "x.npy", images)
    assert run(*fit) == 0
    capsys.readouterr()
    np.save(tmp_path / "x.npy", images[::-1])
    assert "images was" in mistake(capsys, *fit)


def test_a_setting_that_was_refused_can_be_mended_in_the_same_folder(tmp_path, capsys):
    folder = photos(tmp_path / "in")
    fit = ("fit", folder, "--clusters", "2", "--out", tmp_path / "run", *PHOTO)
    assert "set it to 24 or less" in mistake(capsys, *fit, "--set", "moco.batch=64")
    assert "ask for 12 clusters or fewer" in mistake(capsys, *fit, "--clusters", "13")
    assert run(*fit) == 0


def test_set_reaches_what_has_an_option_of_its_own(tmp_path):
    folder = photos(tmp_path / "in")
    settings = ("--set", "clusters=2", "--set", "seed=7", "--out", tmp_path / "run")
    assert run("fit", folder, *settings, *PHOTO) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert (config["clusters"], config["seed"]) == (2, 7)


def test_a_method_of_one_end_says_so(tmp_path, capsys):
    ended = ("--method", "imc_swav", "--until", "imc_swav")
    assert run("fit", "digits", "--out", tmp_path / "run", *TINY, *ended) == 1
    assert capsys.readouterr().err.endswith("has one end only; leave --until out\n")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--seed", "-1"], "give 0 or more"),
        (["--set", "moco.batch=0"], "moco.batch is 0; it must be above 0"),
        (["--set", "moco.epochs=0"], "moco.epochs is 0"),
        (["--set", "bn_groups=0"], "bn_groups is 0"),
        (["--set", "spice_semi.init=warm"], 'can be "scratch" or "stage2"'),
        (["--threads", "-1"], "threads is -1"),
        (["--set", "backbone.name=convnext_atto", "--set", "backbone.stem=native"], "set data.size to"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_runs(tmp_path, capsys, arguments, word):
    assert word in mistake(capsys, "fit", "digits", "--out", tmp_path / "run", *TINY, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_damaged_model_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("{")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.json").write_text("{")
    for folder in ("file", "model", "nowhere"):
        assert "holds no model" in mistake(
            capsys, "predict", tmp_path / folder, "digits", "--out", tmp_path / "new.csv"
        )


def test_wrong_settings_are_refused_in_one_line(tmp_path, capsys):
    out = ("--out", tmp_path / "run")
    assert 'did you mean "moco.temperature"' in mistake(capsys, "fit", "digits", *out, "--set", "moco.temprature=1")
    assert "NAME=VALUE" in mistake(capsys, "fit", "digits", *out, "--set", "moco.lr")
    assert "digits, photos" in mistake(capsys, "fit", "digits", *out, "--recipe", "digit")
    assert "divisor of 2" in mistake(capsys, "fit", "digits", *out, "--workers", "3")
    assert "holds no model" in mistake(capsys, "predict", tmp_path, "digits")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "spice_dist.cli", *map(str, arguments)]


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_a_run_folder_in_use_is_refused_and_ctrl_c_saves_what_the_same_command_finishes(
    tmp_path, capsys, uninterrupted
):
    arguments = ["fit", "digits", "--out", tmp_path / "run", *LONGER]
    child = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    try:
        wait_for(tmp_path / "run/moco/metrics.jsonl")
        assert f"in use by process {child.pid}" in mistake(capsys, *arguments)
        child.send_signal(signal.SIGINT)
        _, printed = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "the same command goes on from there" in printed
    assert printed.startswith("1,797 images found"), "torch takes seconds to load, silence would worry"
    assert "Traceback" not in printed
    saved = [path.name for path in (tmp_path / "run/moco/checkpoints").iterdir()]
    assert len(saved) == 1
    assert 0 < int(saved[0]) < 8 * 7
    assert run(*arguments) == 0
    assert (tmp_path / "run/assignments.csv").read_bytes() == uninterrupted


@pytest.mark.parametrize("place", ["spice_dist.data.dataset.open_data", "spice_dist.report.write_report"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_before_and_after_training_ends_the_command_at_once(
    digits_run, tmp_path, capsys, monkeypatch, place, number, code
):
    shutil.copytree(digits_run, tmp_path / "run")
    monkeypatch.setattr(place, lambda *_, **__: signal.raise_signal(number))
    assert run("fit", "digits", "--out", tmp_path / "run", *DIGITS) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "spice-dist:" in line]
    assert "the same command goes on" in line
    assert not (tmp_path / "run/.owner.json").exists()


def test_sigterm_asks_to_be_run_again(tmp_path):
    arguments = ["fit", "digits", "--out", tmp_path / "run", *DIGITS, "--set", "moco.epochs=100"]
    child = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "run/moco/metrics.jsonl")
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 75
    finally:
        child.kill()
    assert not (tmp_path / "run/.owner.json").exists()


def test_trained_weights_go_straight_to_the_features_and_byol_takes_mocos_place(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    folder = photos(tmp_path / "in")
    few = ["--clusters", "2", *TINY, "--set", "data.size=32", "--set", "moco.batch=16", "--set", "byol.batch=16"]
    model = ["--backbone", "test_vit", "--weights", tmp_path / "vit.safetensors", *few, "--set", "spice_graph.steps=60"]
    assert run("fit", folder, "--out", tmp_path / "trained", *model) == 0
    assert not (tmp_path / "trained/moco").exists()
    metrics = json.loads((tmp_path / "trained/metrics.json").read_text())
    assert set(metrics["seconds"]) == {"data", "features", "graph", "suggest", "spice_graph", "reliable"}
    about = json.loads((tmp_path / "trained/model/model.json").read_text())["backbone"]
    assert (about["name"], about["mean"], about["weights"]) == ("test_vit", [0.5, 0.5, 0.5], "")
    assert run("fit", folder, "--out", tmp_path / "trained", *model, "--seed", "7") == 1  # another run
    (tmp_path / "vit.safetensors").unlink()
    assert run("predict", tmp_path / "trained", folder, "--out", tmp_path / "new.csv") == 0

    settings = ["--set", "byol.epochs=1", "--set", "byol.warmup=0", "--set", "byol.hidden=32"]
    assert run("fit", folder, "--out", tmp_path / "byol", "--pretext", "byol", *few, *settings) == 0
    assert (tmp_path / "byol/byol/checkpoints").is_dir()
    assert "BYOL" in (tmp_path / "byol/report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pretext", "none"], "no weights to go on with"),
        (["--pretext", "guess"], "invalid choice: 'guess'"),
        (["--backbone", "resnett18"], "did you mean resnet18"),
        (["--backbone", "test_vit", "--set", "data.size=30"], "patches of 16; set data.size to 16 or 32"),
        (["--recipe", "nope"], "cifar10_short"),
        (["--set", "precision=fp8"], "auto, bf16, fp32"),
        (["--track", "mlflow"], "MLFLOW_TRACKING_URI"),
    ],
)
def test_wrong_choices_of_stage_1_are_one_line(tmp_path, capsys, arguments, words):
    pytest.importorskip("mlflow")
    try:
        code = run("fit", "digits", "--out", tmp_path / "run", *TINY, *arguments)
    except SystemExit as exit:  # argparse's own mistakes
        code = exit.code
    assert code == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_published_data_set_is_pointed_to_its_recipe(tmp_path, capsys):
    images, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "cifar10.npz", allow_pickle=False, **arrays)
    assert run("fit", f"cifar10:{tmp_path}", "--out", tmp_path / "run") == 1
    assert "--recipe cifar10" in capsys.readouterr().err


def test_help_names_the_commands():
    environment = {**os.environ, "COLUMNS": "120"}
    shown = subprocess.run(command("--help"), capture_output=True, text=True, env=environment, check=True).stdout
    for name in ("fit", "pack", "predict", "report", "evaluate"):
        assert f"    {name} " in shown


def test_scripts_get_the_scores_that_the_table_shows_as_json(digits_run, capsys):
    assert run("evaluate", digits_run, "--json") == 0
    (numbers,) = json.loads(capsys.readouterr().out)["runs"]
    metrics = json.loads((digits_run / "metrics.json").read_text())
    assert numbers["scores"]["SPICE"] == pytest.approx(metrics["eval"])
    assert (numbers["images"], numbers["clusters"], numbers["method"]) == (1797, 10, "spice")
    assert numbers["without_labels"]["silhouette"] == metrics["select"]["silhouette"]
    assert run("evaluate", digits_run, digits_run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"] == [numbers, numbers]


def images_of_run(run_folder: Path) -> Path:
    return run_folder.parent / "in"


@pytest.fixture
def staged_anew(photo_run, tmp_path) -> tuple[Path, Path]:
    """A copy of a run, and one of its images with other times, as unpacked from an archive."""
    shutil.copytree(images_of_run(photo_run), tmp_path / "in", copy_function=shutil.copyfile)
    shutil.copytree(photo_run, tmp_path / "run")
    return tmp_path / "in", tmp_path / "run"


def test_a_run_goes_on_with_a_copy_of_its_images_and_with_no_others(staged_anew, capsys):
    folder, out = staged_anew
    before = (out / "assignments.csv").read_bytes()
    fit = ("fit", folder, "--clusters", "3", "--out", out, *PHOTO)
    assert run(*fit) == 0
    assert "spice_semi  finished before" in capsys.readouterr().err
    assert (out / "assignments.csv").read_bytes() == before
    image = next((folder / "turned").iterdir())
    Image.fromarray(np.asarray(Image.open(image))[::-1]).save(image)
    assert "images was" in mistake(capsys, *fit)


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_new_settings(staged_anew, capsys):
    folder, out = staged_anew
    unrecorded(out)
    for path in out.glob("*/stage.json"):
        record = json.loads(path.read_text())
        for name in ("data.grey_bits", "data.max_megapixels"):
            assert record["settings"].pop(name) is not None
        path.write_text(json.dumps(record))
    fit = ("fit", folder, "--clusters", "3", "--out", out, *PHOTO)
    assert run(*fit) == 0
    assert "spice_semi  finished before" in capsys.readouterr().err
    assert "data.grey_bits was 0, now 12" in mistake(capsys, *fit, "--set", "data.grey_bits=12")


def test_images_without_a_label_are_not_scored_and_classes_are_counted_by_name(staged_anew, tmp_path, capsys):
    from spice_dist import metrics

    folder, out = staged_anew
    names = read_paths(out / "data")
    labels = ["" if i % 3 == 0 else "None" if i % 3 == 1 else name.split("/")[0] for i, name in enumerate(names)]
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *zip(names, labels, strict=True)])
    fit = ("fit", folder / "list.csv", "--labels", "list", "--clusters", "3", "--out", tmp_path / "labelled", *PHOTO)
    assert run(*fit) == 0
    assert "2 classes: turned 4, upright 4; 16 images without a label are not scored" in capsys.readouterr().out
    with open(tmp_path / "labelled/assignments.csv", newline="") as file:
        clusters = np.array([int(row["cluster"]) for row in csv.DictReader(file)])
    known = np.array([label in ("turned", "upright") for label in labels])
    exact = metrics.accuracy(np.array(labels)[known], clusters[known])
    result = json.loads((tmp_path / "labelled/metrics.json").read_text())
    assert result["classes"] == {"images": {"turned": 4, "upright": 4}, "unlabelled": 16}
    assert result["eval"]["acc"] == pytest.approx(exact)


def test_runs_of_different_images_have_no_common_mean(digits_run, photo_run, capsys):
    assert run("evaluate", digits_run, photo_run) == 0
    said = capsys.readouterr().out
    assert "mean ± standard deviation" not in said
    assert str(digits_run) in said
    assert str(photo_run) in said


def test_two_images_are_told_to_be_too_few(tmp_path, capsys):
    folder = photos(tmp_path / "in", 2)
    assert "2 images of" in (line := mistake(capsys, "fit", folder, "--clusters", "2", "--out", tmp_path / "r", *PHOTO))
    assert "too few to group" in line
    assert "moco" not in line


def test_a_network_that_takes_another_size_names_that_size(tmp_path, capsys):
    arguments = ("fit", "digits", "--out", tmp_path / "run", *TINY, "--set", "backbone.stem=native")
    line = mistake(capsys, *arguments, "--set", "backbone.name=convnext_atto")
    assert line.endswith("cannot take images of 8 pixels; set data.size to 224, for which it is made")


def test_scikit_learns_warnings_are_not_printed(tmp_path):
    """Equal images are fewer distinct ones than clusters, of which scikit-learn warns with a name of its own."""
    (tmp_path / "in").mkdir()
    for i in range(30):
        Image.fromarray(np.full((16, 16, 3), 50 + i % 2, np.uint8)).save(tmp_path / "in" / f"{i}.png")
    fit = ("fit", tmp_path / "in", "--clusters", "3", "--out", tmp_path / "run", *PHOTO)
    done = subprocess.run(command(*fit), capture_output=True, text=True, timeout=200)
    assert "sklearn" not in done.stderr
    assert "Warning" not in done.stderr
    assert "nearly all images are alike" in done.stderr
