"""Copies of pictures are grouped with their originals; pictures that are merely alike, flat or mirrored are not."""

import csv
import io
import json
import zlib
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from spice_dist import artifacts, duplicates, inspection
from spice_dist.data import beton
from spice_dist.data.ingest import ingest
from spice_dist.data.sources import open_source
from spice_dist.report.table import format_scores
from spice_dist.task import Task
from tests.test_report import write_run

SIZE = 64


def scenes(count: int, seed: int = 0) -> list[Image.Image]:
    """Overlapping parts of two photographs, some of them much alike."""
    rng, found = np.random.default_rng(seed), []
    for place in range(count):
        photo = load_sample_image(("flower.jpg", "china.jpg")[place % 2])
        top, left = rng.integers(photo.shape[0] - 200), rng.integers(photo.shape[1] - 200)
        found.append(Image.fromarray(photo[top : top + 200, left : left + 200]))
    return found


def squares(images: list[Image.Image]) -> torch.Tensor:
    arrays = [np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def groups_of(images: list[Image.Image]) -> list[list[int]]:
    small = duplicates.pictures(squares(images))
    found = duplicates.find_copies(np.arange(len(images)), small)
    return [group.tolist() for group in duplicates.groups(found.picture)]


def test_copies_are_grouped_with_their_originals_and_nothing_else_is():
    images = scenes(60)
    edits = [
        as_jpeg(images[3], 40),
        images[8].resize((90, 90)),
        images[8].point(lambda value: value * 0.9),
        images[20].crop((1, 2, 199, 200)),
        images[31].transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        Image.new("RGB", (200, 200), (250, 250, 250)),
        Image.new("RGB", (200, 200), (251, 251, 251)),
    ]
    assert groups_of(images + edits) == [[3, 60], [8, 61, 62], [20, 63]]


def test_handwritten_digits_that_are_much_alike_are_no_copies():
    drawings = (load_digits().images * (255 / 16)).astype(np.uint8)[:600]  # pyright: ignore
    small = duplicates.pictures(torch.from_numpy(drawings)[:, None])
    low = duplicates.low_frequencies(small)
    alike = low @ low.T - 2 * np.eye(len(low))
    assert (alike.max(1) > 0.96).mean() > 0.2, "a bound on the correlation alone would group them"
    assert duplicates.groups(duplicates.find_copies(np.arange(600), small).picture) == []


def test_features_decide_where_pictures_leave_it_open():
    """The same pairs of pictures with near and with far features."""
    pairs = duplicates.Pairs(*(np.array([i]) for i in (0, 1)), *(np.array([v]) for v in (0.97, 0.08, 0.2)))
    assert pairs.within(duplicates.COPY).all()
    assert not replace(pairs, feature_ratio=np.array([0.5])).within(duplicates.COPY).any()
    assert not replace(pairs, correlation=np.array([0.95])).within(duplicates.COPY).any()
    assert replace(pairs, correlation=np.array([0.95])).within(duplicates.SERIES).all()


def test_a_moved_picture_is_explained_as_least_squares_in_float64_says():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 12, 12)).astype(np.float32) * 255
    y, x = np.mgrid[:12, :12] / 11 - 0.5
    for one, other, value in zip(a, b, duplicates.explained(a, b), strict=True):
        one_y, one_x = np.gradient(one.astype(np.float64))
        columns = [np.ones((12, 12)), one, one_x, one_y, x * one_x + y * one_y, x * one_y - y * one_x]
        basis = np.stack([column[1:-1, 1:-1].ravel() for column in columns], 1)
        target = other[1:-1, 1:-1].ravel().astype(np.float64)
        solution, *_ = np.linalg.lstsq(basis, target, rcond=None)
        share = 1 - np.square(target - basis @ solution).sum() / np.square(target - target.mean()).sum()
        assert value == pytest.approx(np.sqrt(share) if solution[1] > 0 else 0, abs=1e-3)


def test_a_shift_costs_less_than_a_plain_correlation_says():
    small = duplicates.pictures(squares(scenes(20))).astype(np.float32)
    shifted = small[:, :, 1:]
    whole, moved = small[:, :-1, :-1], shifted[:, :-1]
    plain = np.array([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(whole, moved, strict=True)])
    assert ((1 - duplicates.explained(whole, moved)) < 0.6 * (1 - plain)).all()
    np.testing.assert_allclose(duplicates.explained(whole, whole * 0.5 + 20), 1, atol=1e-3)
    assert (duplicates.explained(whole, 255 - whole) < 0.9).all()


def test_the_low_frequencies_are_those_of_the_cosine_transform():
    small = duplicates.pictures(squares(scenes(4)))
    places = np.arange(duplicates.SIDE)
    waves = np.cos(np.pi * np.outer(np.arange(duplicates.FREQUENCIES), 2 * places + 1) / (2 * duplicates.SIDE))
    waves[0] *= np.sqrt(0.5)
    for image, row in zip(small.astype(np.float64), duplicates.low_frequencies(small), strict=True):
        expected = (waves @ image @ waves.T).ravel()[1:]
        np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=1e-4)


def test_every_image_beside_an_equal_hash_is_a_candidate():
    small = duplicates.pictures(squares(scenes(40)))
    low = duplicates.low_frequencies(np.concatenate([small, small]))
    beside = duplicates.hash_neighbors(low)
    assert all(i + 40 in beside[i] or i in beside[i + 40] for i in range(40))


def test_groups_are_the_connected_parts_by_brute_force():
    rng = np.random.default_rng(1)
    ends = rng.integers(0, 30, (2, 20))
    pairs = duplicates.Pairs(ends[0], ends[1], *(np.zeros(20),) * 3)
    chosen = rng.random(20) < 0.7
    labels = duplicates.components(30, pairs, chosen)
    reach = np.eye(30, dtype=bool)
    reach[ends[0][chosen], ends[1][chosen]] = True
    for _ in range(30):
        reach = (reach | reach.T).astype(int) @ (reach | reach.T).astype(int) > 0
    assert (np.equal.outer(labels, labels) == reach).all()
    listed = duplicates.groups(labels)
    assert {pair for group in listed for pair in combinations(group.tolist(), 2)} == {
        (i, j) for i, j in combinations(range(30), 2) if reach[i, j]
    }


# ---------------------------------------------------------------- of a run


def run_of(folder: Path, files: dict[str, bytes]) -> Path:
    """A run folder with these files packed, and random unit features."""
    images = folder / "images"
    for name, content in files.items():
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    ingest(open_source(str(images)), folder / "run/data", size=SIZE)
    count = artifacts.manifest(folder / "run").n
    rows = np.random.default_rng(0).normal(size=(count, 16))
    artifacts.features_file(folder / "run").parent.mkdir()
    features = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(artifacts.features_file(folder / "run"), features.astype(np.float16))
    return folder / "run"


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def inspected(run: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    task = Task()
    task = replace(task, data=replace(task.data, size=SIZE, loader="torch"))
    counts = inspection.inspect(task, run, torch.device("cpu"))
    with artifacts.duplicates_file(run).open(newline="") as file:
        return counts, list(csv.DictReader(file))


def test_a_run_lists_copies_and_marks_the_largest_original(tmp_path):
    images = scenes(30)
    files = {f"{i:02d}.png": png(image) for i, image in enumerate(images)}
    files |= {"=cmd().png": files["05.png"], "a,\n\u202e.png": files["05.png"]}
    files |= {"large.png": png(images[9].resize((400, 400), Image.Resampling.BICUBIC))}
    counts, rows = inspected(run_of(tmp_path, files))
    shown = [(row["group"], row["path"], row["kind"], row["best"]) for row in rows]
    assert shown == [
        ("0", "05.png", "bytes", "1"),
        ("0", "./=cmd().png", "bytes", "0"),
        ("0", "a,\n\u202e.png", "bytes", "0"),
        ("1", "large.png", "picture", "1"),
        ("1", "09.png", "picture", "0"),
    ]
    assert all(float(row["similarity"]) == 1 for row in rows[:4])
    assert 0.96 < float(rows[4]["similarity"]) <= 1
    assert counts == {"copies": 5, "groups": 2, "series_images": 0, "series": 0}


def test_without_the_originals_the_first_name_is_best(tmp_path):
    files = {f"{i:02d}.png": png(image) for i, image in enumerate(scenes(20))}
    files["large.png"] = png(scenes(20)[9].resize((400, 400), Image.Resampling.BICUBIC))
    run = run_of(tmp_path, files)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert [row["path"] for row in inspected(run)[1] if row["best"] == "1"] == ["09.png"]


@pytest.mark.parametrize("count", [1, 2, 12])
def test_runs_of_one_image_or_of_equal_ones_are_inspected(tmp_path, count):
    run = run_of(tmp_path, {f"{i}.png": png(scenes(1)[0]) for i in range(count)})
    features = np.load(artifacts.features_file(run))
    np.save(artifacts.features_file(run), np.full_like(features, np.nan))
    counts, rows = inspected(run)
    assert counts["copies"] == len(rows) == (count if count > 1 else 0)
    assert sum(row["best"] == "1" for row in rows) == (count > 1)


def test_the_neighbour_graph_gives_the_outliers_that_a_search_finds(tmp_path):
    run = run_of(tmp_path, {f"{i:02d}.png": png(image) for i, image in enumerate(scenes(120))})
    inspected(run)
    searched = artifacts.outliers_file(run).read_bytes()
    products = (rows := artifacts.features(run)) @ rows.T
    np.fill_diagonal(products, -np.inf)
    artifacts.neighbors_file(run).parent.mkdir()
    np.save(artifacts.neighbors_file(run), np.argsort(-products, axis=1)[:, :30].astype(np.int32))
    inspected(run)
    assert artifacts.outliers_file(run).read_bytes() == searched
    assert len(searched.splitlines()) == 3


def test_equal_checksums_of_other_bytes_are_no_equal_content(tmp_path):
    run = run_of(tmp_path, {f"{i}.png": png(image) for i, image in enumerate([*scenes(3), scenes(1)[0]])})
    info = beton.verify(artifacts.data(run) / "dataset.beton")
    assert inspection.same_content(info).tolist()[0] == inspection.same_content(info).tolist()[3]
    assert len(set(inspection.same_content(info).tolist())) == 3
    clash = replace(info, crc32=None if info.crc32 is None else np.full(4, zlib.crc32(b"x"), np.uint32))
    samples_of = beton.Samples
    with pytest.MonkeyPatch.context() as patch:  # the file is read with its true checksums
        patch.setattr(beton, "Samples", lambda _: samples_of(info))
        content = inspection.same_content(clash)
    assert content[0] == content[3]
    assert len(set(content.tolist())) == 3


def test_a_series_is_of_the_best_copies_and_a_copy_stands_in_both():
    small = duplicates.pictures(squares(scenes(6)))
    copies = duplicates.Copies(
        content=np.array([0, 1, 0, 2, 3, 4]), picture=np.array([0, 0, 0, 1, 2, 3]), scene=np.array([0, 0, 0, 1, 0, 2])
    )
    rows = inspection.members(copies, small, rank=np.array([1, 0, 2, 3, 4, 5]))
    assert [(m.group, m.index, m.kind, m.best) for m in rows] == [
        (0, 1, "picture", True),
        (0, 0, "bytes", False),
        (0, 2, "bytes", False),
        (1, 1, "series", True),
        (1, 4, "series", False),
    ]
    assert [m.similarity for m in rows if m.best] == [pytest.approx(1, abs=1e-6)] * 2


def test_the_terminal_names_copies_and_is_silent_without(tmp_path):
    write_run(tmp_path)
    assert "groups of copies" not in format_scores(tmp_path)
    metrics = artifacts.metrics(tmp_path) | {
        "duplicates": {"copies": 37, "groups": 15, "series_images": 0, "series": 0}
    }
    artifacts.metrics_file(tmp_path).write_text(json.dumps(metrics))
    assert f"37 images in 15 groups of copies: {artifacts.duplicates_file(tmp_path)}" in format_scores(tmp_path)
