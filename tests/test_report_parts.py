"""The parts of the report: evidence for groups, sheets of thumbnails, the map, the words, two runs side by side."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image

from spice_dist import artifacts
from spice_dist.errors import UserError
from spice_dist.report import (
    compare,
    confusion,
    evidence,
    gallery,
    layout,
    payload,
    previews,
    sprites,
    words,
    write_comparison,
    write_report,
)
from spice_dist.report.evidence import Evidence
from spice_dist.report.reading import load
from tests.test_report import K, N, pixels, read_pixels, write_run


def arrays(page):
    """The arrays of a page's data, decoded, and the data."""
    data = json.loads(re.findall(r'id="run-data">(.*?)</script>', page, re.DOTALL)[0])
    types = {"i2": "<i2", "i4": "<i4", "f4": "<f4", "u2": "<u2"}
    decoded = {
        name: np.frombuffer(base64.b64decode(array["data"]), types[array["type"]])
        for name, array in data["arrays"].items()
    }
    return data, decoded


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    truth = write_run(folder)
    page = write_report(folder, images=read_pixels).read_text(encoding="utf-8")
    return folder, page, truth


# ---------------------------------------------------------------- evidence


def test_stability_is_the_best_jaccard_index():
    rng = np.random.default_rng(0)
    labels, other = rng.integers(0, 4, 60), rng.integers(0, 5, 60)
    sets = [[set(np.flatnonzero(values == k)) for k in range(count)] for values, count in ((labels, 4), (other, 5))]
    expected = [max(len(a & b) / len(a | b) for b in sets[1]) for a in sets[0]]
    np.testing.assert_allclose(evidence.best_overlap(labels, other, 4), expected)


def test_crossing_counts_known_neighbours_only():
    labels, neighbors = np.array([0, 0, 1]), np.array([[1, 2], [0, -1], [0, 1]])
    np.testing.assert_allclose(evidence.crossing(labels, neighbors, 3), [[2 / 3, 1 / 3, 0], [1, 0, 0], [0, 0, 0]])


def test_of_too_many_images_the_wanted_ones_are_on_the_page_by_cluster(monkeypatch):
    monkeypatch.setattr(evidence, "MAX_IMAGES", 50)
    rng = np.random.default_rng(0)
    labels, typical, wanted = rng.integers(0, 3, 400), rng.random(400), np.array([7, 3, 399, 7])
    shown = evidence.choose(labels, typical, wanted)
    assert len(shown) == len(set(shown.tolist())) == 50
    assert set(wanted.tolist()) <= set(shown.tolist())
    assert (np.diff(labels[shown]) >= 0).all()
    for k in range(3):
        assert (np.diff(typical[shown[labels[shown] == k]]) <= 0).all()


def test_neighbours_and_second_choices_of_the_page_are_those_of_the_features(written):
    folder, page, (labels, _, _) = written
    data, found = arrays(page)
    features = np.load(folder / "features/features.npy").astype(np.float64)[found["index"]]
    likeness = features @ features.T
    np.fill_diagonal(likeness, -1)
    np.testing.assert_array_equal(
        found["neighbors"].reshape(N, data["reach"]), np.argsort(-likeness, axis=1)[:, : data["reach"]]
    )
    centers = np.stack([features[labels[found["index"]] == k].sum(axis=0) for k in range(K)])
    centers /= np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-9)
    best = np.sort((features @ centers.T).clip(0), axis=1)[:, ::-1]
    np.testing.assert_allclose(found["weights"].reshape(N, data["top"]), best, atol=1e-3)


def test_what_the_run_kept_goes_before_what_can_be_computed(tmp_path):
    labels, *_ = write_run(tmp_path)
    (tmp_path / "graph").mkdir()
    (tmp_path / "spice_graph").mkdir()
    kept = (np.arange(N)[:, None] + np.arange(1, 6)) % N
    np.save(tmp_path / "graph/neighbors.npy", kept.astype(np.int32))
    posterior = np.full((N, K), 0.1)
    posterior[np.arange(N), labels] = 0.7
    np.save(tmp_path / "spice_graph/posterior.npy", posterior.astype(np.float16))
    np.save(tmp_path / "spice_graph/start.npy", np.stack([labels, labels * 0]).astype(np.int32))
    data, found = arrays(write_report(tmp_path, images=read_pixels).read_text(encoding="utf-8"))
    np.testing.assert_array_equal(found["index"][found["neighbors"].reshape(N, 5)], kept[found["index"]])
    assert data["weights_are"] == "Probabilities"
    np.testing.assert_allclose(found["weights"].reshape(N, K)[:, 0], 0.7, atol=1e-3)
    sizes = np.bincount(labels, minlength=K)
    stability = evidence.stability(load(tmp_path))
    assert stability is not None
    np.testing.assert_allclose(stability, np.where(sizes > 0, (1 + sizes / N) / 2, 0))
    posterior[np.arange(N), labels] = 0  # of another grouping than the result
    np.save(tmp_path / "spice_graph/posterior.npy", posterior.astype(np.float16))
    assert "cosine" in arrays(write_report(tmp_path, images=read_pixels).read_text(encoding="utf-8"))[0]["weights_are"]


@pytest.mark.parametrize("content", ["", "index,distance\nx,1\n-1,2\n999999,3\n", "a,b\n1,2\n", "\x00"])
def test_a_damaged_list_of_outliers_or_copies_is_left_out(tmp_path, content):
    write_run(tmp_path)
    artifacts.outliers_file(tmp_path).write_text(content)
    artifacts.duplicates_file(tmp_path).write_text(content)
    page = write_report(tmp_path, images=read_pixels).read_text(encoding="utf-8")
    assert "Least like the center of their group" in page
    assert "there more than once" not in page


# ---------------------------------------------------------------- words


def facts(**given):
    usual = {"shown": np.arange(4), "candidates": np.zeros((4, 1), np.int64), "weights": np.ones((4, 1))}
    usual |= {"weights_are": "", "neighbors": None, "crossing": None, "stability": None, "outliers": []}
    return Evidence(**(usual | {"outliers_measured": False, "copies": []} | given))


def test_the_words_name_the_groups_that_need_a_look(written):
    run = load(written[0])  # clusters 0, 1 and 3 have images
    crossing = np.array([[0.95, 0.05, 0, 0], [0.3, 0.65, 0, 0.05], [0, 0, 0, 0], [0, 0, 0, 1.0]])
    found = facts(stability=np.array([0.9, 0.9, 0.0, 0.4]), crossing=crossing, outliers=[(3, 1.5)])
    told = words.findings(run, found, {3: "<b>"})
    assert [finding.links for finding in told] == [
        [("cluster-3", "3 · <b>")],
        [("cluster-1", "Cluster 1")],
        [("cluster-1", "Cluster 1"), ("cluster-0", "Cluster 0")],
        [("outliers", "look at them")],
    ]
    assert "30 % of the nearest neighbours" in told[2].rest
    assert words.how_sure(run, found) == "1 of 3 groups hold together; 2 are worth a closer look."
    assert words.how_sure(run, facts()) == "All 3 groups hold together."
    assert "No group and no image stands out" in words.findings(run, facts(), {})[0].text


# ---------------------------------------------------------------- sheets


def test_tiles_are_a_permutation_with_the_typical_images_of_all_clusters_first():
    labels = np.repeat([0, 2, 3], [200, 10, 90])
    place = sprites.places(labels)
    assert sorted(place.tolist()) == list(range(300))
    first = [labels[i] for i in np.argsort(place)[: 64 + 10 + 64]]
    assert first == [0] * 64 + [2] * 10 + [3] * 64


def test_every_image_is_on_its_tile_in_the_page_or_beside_it(tmp_path):
    write_run(tmp_path)
    for page_mb in (20, 0):
        page = write_report(tmp_path, images=read_pixels, page_mb=page_mb).read_text(encoding="utf-8")
        data, found = arrays(page)
        inside = re.findall(r'id="sheet-0">(.*?)</script>', page)
        assert len(inside) == data["sheets"]["inside"] == (page_mb > 0)
        beside = tmp_path / "report/sheet-0.png"
        assert beside.exists() == (page_mb == 0)
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(inside[0]) if inside else beside.read_bytes())))
        edge = data["sheets"]["tile"]
        for index, place in zip(found["index"].tolist(), found["place"].tolist(), strict=True):
            row, column = divmod(place, sprites.COLUMNS)
            tile = sheet[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
            np.testing.assert_array_equal(tile, pixels(index))
        assert ("the others lie in the folder report/ beside it" in page) == (page_mb == 0)
        assert ("img-src data: blob: 'self';" in page) == (page_mb == 0)
    write_report(tmp_path, images=read_pixels)
    assert not beside.exists(), "sheets of an earlier page are removed"


def large_pixels(run, indices, edge):
    """As the pixels of a run that keeps squares of 240 px."""
    return np.stack([np.broadcast_to(pixels(int(i))[0, 0], (min(edge, 240),) * 2 + (3,)) for i in indices])


def test_images_of_the_galleries_have_a_sharper_picture(tmp_path):
    write_run(tmp_path)
    page = write_report(tmp_path, images=large_pixels).read_text(encoding="utf-8")
    found = dict(re.findall(r'id="preview-(\d+)">(.*?)</script>', page))
    assert set(found) == set(re.findall(r'<img data-index="(\d+)"', page))
    for index, text in found.items():
        picture = Image.open(io.BytesIO(base64.b64decode(text)))
        assert (picture.format, picture.size) == ("WEBP", (224, 224))
        np.testing.assert_allclose(np.asarray(picture)[100, 100], pixels(int(index))[0, 0], atol=4)
    for page in (write_report(tmp_path, page_mb=0, images=large_pixels), write_report(tmp_path, images=read_pixels)):
        assert 'id="preview-' not in page.read_text(encoding="utf-8")


def test_sharper_pictures_stay_within_the_budget_and_every_group_has_some(tmp_path):
    def row(*indices):
        return [gallery.Thumbnail(i, "", "", 1.0, False) for i in indices]

    shown = [
        gallery.Gallery(0, 8, None, None, row(0, 1, 2), row(3, 1)),
        gallery.Gallery(1, 8, None, None, row(4, 5, 6), row(7, 8)),
    ]
    assert previews.in_turn(shown) == [0, 3, 4, 7, 1, 5, 8, 2, 6]
    whole = previews.make(tmp_path, shown, large_pixels, 1e6)
    few = previews.make(tmp_path, shown, large_pixels, sum(map(len, whole.values())) / 2)
    assert list(whole) == previews.in_turn(shown)
    assert list(few) == list(whole)[: len(few)]
    assert 3 < len(few) < 6


def test_a_page_of_a_thousand_photos_stays_small_and_a_photo_keeps_its_look(tmp_path):
    rng = np.random.default_rng(0)

    def photo(index):  # smooth, with some grain, as photos are
        small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize(
            (96, 96), Image.Resampling.BICUBIC
        )
        return (np.asarray(small) + rng.normal(0, 3, (96, 96, 3))).clip(0, 255).astype(np.uint8)

    labels = np.zeros(1000, np.int64)
    seen = {}

    def read(run, indices, edge):
        return np.stack([seen.setdefault(int(i), photo(i)) for i in indices])

    sheets = sprites.make(tmp_path, np.arange(1000), sprites.places(labels), read, 20_000_000)
    assert (sheets.count, len(sheets.outside)) == (4, 0)
    assert sum(map(len, sheets.inside)) * 4 / 3 < 4e6
    decoded = np.asarray(Image.open(io.BytesIO(sheets.inside[0]))).astype(float)
    edge = sheets.tile
    for place in (0, 17, 255):
        row, column = divmod(place, sprites.COLUMNS)
        tile = decoded[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
        true = np.asarray(Image.fromarray(seen[place]).resize((edge, edge), Image.Resampling.BOX)).astype(float)
        assert np.abs(tile - true).mean() < 8


# ---------------------------------------------------------------- the data of the page


@given(st.dictionaries(st.text(), st.text()))
def test_no_text_ends_the_element_that_holds_the_data(content):
    content["x"] = "</script><!--<script>&lt;"
    text = payload.embed(content)
    assert isinstance(text, Markup)
    assert not set("<>&") & set(text)
    assert json.loads(text) == content


def test_the_policy_allows_the_one_script_by_its_hash(written):
    _, page, _ = written
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = re.findall(r'Content-Security-Policy" content="(.*?)"', page)
    assert policy == [
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    ]


def test_images_that_a_path_does_not_name_are_named_by_index():
    assert payload.unnamed(["a.png", "b.png", "a.png", "=1.png", "line\n.png", "c\\d.png"]) == [0, 2, 4]


def test_points_keep_their_shape():
    x, y = payload.quantised(np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 5.0]])).astype(int)
    assert x.tolist() == [0, 65535, 0]
    assert abs((y[2] - y[0]) - 65535 / 2) <= 1
    assert abs((y[0] + y[2]) / 2 - 65535 / 2) <= 1


def test_classes_are_named_after_their_folders_where_these_are_their_own():
    truth = np.array([0, 0, 1, 2, 2, -1])
    paths = ["cat/1.png", "cat/2.png", "dog/1.png", "x/1.png", "y/1.png", "cat/3.png"]
    assert payload.class_names(truth, paths) == ["cat", "dog", "2"]
    assert payload.class_names(np.array([0, 1]), ["all/1.png", "all/2.png"]) == ["0", "1"]


def test_the_matched_pairs_are_on_the_diagonal():
    labels, truth = np.array([0, 0, 0, 1, 1, 2, 2, 2]), np.array([1, 1, 0, 0, 0, 1, -1, 2])
    table = confusion.table(labels, truth, 3, ["a", "b", "c"])
    assert table is not None
    cells = {(k, name): cell[0] for k, row in table.rows for name, cell in zip(table.classes, row, strict=True)}
    assert {pair: count for pair, count in cells.items() if count} == {
        **{(0, "b"): 2, (0, "a"): 1, (1, "a"): 2},
        **{(2, "b"): 1, (2, "c"): 1},
    }
    assert sum(row[place][0] for place, (_, row) in enumerate(table.rows)) == 5
    assert confusion.table(labels, truth, 101, ["a", "b", "c"]) is None


def test_the_papers_numbers_stand_beside_those_of_its_data_sets(tmp_path):
    write_run(tmp_path)
    manifest = tmp_path / "data/manifest.json"
    assert "published" not in write_report(tmp_path, images=read_pixels).read_text(encoding="utf-8")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source": "cifar10"}))
    page = write_report(tmp_path, images=read_pixels).read_text(encoding="utf-8")
    row = re.findall(r">SPICE, published</th>(.*?)</tr>", page, re.DOTALL)[0]
    assert re.findall(r"[\d.]+(?=<span)|–", row) == ["92.6", "–", "85.2", "86.5", "–"]


# ---------------------------------------------------------------- the map


def test_a_map_by_umap_is_kept_and_found_again_for_the_same_features(tmp_path, monkeypatch):
    features = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float16)
    shown = np.random.default_rng(1).permutation(300)
    calls = []
    # a stand-in for umap-learn, which takes a minute to begin
    monkeypatch.setattr(layout, "_umap", lambda main: calls.append(len(main)) or main[:, :2] + 100)
    assert layout.place_images(tmp_path, features, shown, False)[1] == "pca"
    first, method = layout.place_images(tmp_path, features, shown, True)
    assert (method, calls) == ("umap", [300])
    again, method = layout.place_images(tmp_path, features, shown[::-1], False)
    np.testing.assert_array_equal(again[::-1], first)
    assert (method, calls) == ("umap", [300])
    changed = features.copy()
    changed[0, 0] += 1
    assert layout.place_images(tmp_path, changed, shown, False)[1] == "pca"
    artifacts.map_file(tmp_path).write_bytes(b"PK damaged")
    assert layout.place_images(tmp_path, features, shown, False)[1] == "pca"


def test_images_outside_of_the_sample_lie_beside_their_nearest_ones(monkeypatch):
    monkeypatch.setattr(layout, "MOST_FOR_UMAP", 100)
    monkeypatch.setattr(layout, "_umap", lambda main: main[:, :2])
    rng = np.random.default_rng(0)
    middles = np.array([[0, 0, 0], [50, 0, 0], [0, 50, 0]])
    kind = rng.integers(0, 3, 400)
    places = layout.umap((middles[kind] + rng.normal(size=(400, 3))).astype(np.float32))
    for k in range(3):
        assert np.linalg.norm(places[kind == k] - places[kind == k].mean(axis=0), axis=1).max() < 6
    assert places.shape == (400, 2)


@pytest.mark.slow
def test_umap_parts_what_is_apart_and_gives_the_same_twice():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 300)
    rows = (30 * np.eye(3, 20)[kind] + rng.normal(size=(300, 20))).astype(np.float32)
    places = layout.umap(rows)
    np.testing.assert_array_equal(layout.umap(rows), places)
    middles = np.stack([places[kind == k].mean(axis=0) for k in range(3)])
    nearest = np.linalg.norm(places[:, None] - middles, axis=2).argmin(axis=1)
    assert (nearest == kind).all()


# ---------------------------------------------------------------- two runs


def write_pair(folder, permutation, moved):
    labels, confidence, _ = write_run(folder / "a")
    write_run(folder / "b")
    table = (folder / "b/assignments.csv").read_bytes().decode("utf-8", "surrogateescape")
    others = np.array(permutation)[labels]
    others[moved] = (others[moved] + 1) % K
    lines = re.sub(r",(\d),(0\.\d+|1\.0),([01])\r\n", lambda match: f",{{}},{match[2]},{match[3]}\r\n", table)
    assert lines.count(",{},") == N
    head, *rest = lines.split(",{},")
    text = head + "".join(f",{label},{part}" for label, part in zip(others.tolist(), rest, strict=True))
    (folder / "b/assignments.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    return labels, others


def test_two_runs_meet_in_a_table_and_what_moved_is_shown(tmp_path):
    from sklearn.metrics import adjusted_rand_score

    moved = [3, 50, 90]
    labels, others = write_pair(tmp_path, [2, 0, 1, 3], moved)
    page = write_comparison(tmp_path / "a", tmp_path / "b", tmp_path / "page.html", read_pixels).read_text("utf-8")
    assert f"<dd>{adjusted_rand_score(labels, others):.3f}</dd>" in page
    assert "3 images (2.5 %) are in another group" in page
    assert page.count("<img") == 3
    assert "<script" not in page
    counts = compare.overlap(load(tmp_path / "a"), load(tmp_path / "b"))
    assert counts.sum() == N
    assert counts[0, 2] == ((labels == 0) & (others == 2)).sum()


def test_a_run_beside_itself_has_moved_nothing(tmp_path):
    write_run(tmp_path / "a")
    page = write_comparison(tmp_path / "a", tmp_path / "a", tmp_path / "page.html", read_pixels).read_text("utf-8")
    assert "<dd>1.000</dd>" in page
    assert "Every image is in the group that matches its own." in page


def test_runs_of_different_images_are_refused_in_one_line(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name)
    path = tmp_path / "b/assignments.csv"
    path.write_bytes(path.read_bytes().replace(b"photo 50.png", b"photo 51b.png"))
    with pytest.raises(UserError, match=r"^[^\n]* are not of the same images; [^\n]*$"):
        write_comparison(tmp_path / "a", tmp_path / "b", tmp_path / "page.html", read_pixels)
    assert not (tmp_path / "page.html").exists()


def test_the_command_takes_one_run_or_two(tmp_path, capsys):
    from spice_dist import cli

    write_pair(tmp_path, [0, 1, 2, 3], [5])
    assert cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "name it by --out page.html" in capsys.readouterr().err
    assert cli.main(["report", *["x"] * 3]) == 1
    assert "one run, or two" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "a"), "--page-mb", "-1"]) == 1
    assert "must be from 0 to a million" in capsys.readouterr().err
    assert not (tmp_path / "a/report.html").exists()
