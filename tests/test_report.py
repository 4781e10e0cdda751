"""The report says what the run folder says, shows the right images, and nothing in a run folder can take it over."""

import base64
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from spice_dist.data.ingest import ingest
from spice_dist.data.sources import open_source
from spice_dist.errors import DamagedFile, UserError
from spice_dist.report import charts, gallery, read_images, write_report
from spice_dist.report.reading import Curve, load, read_curves
from spice_dist.report.text import printable

HOSTILE = [
    '"><img src=x onerror=alert(1)>.png',
    "</script><script>alert(2)</script>.png",
    "' onmouseover='alert(3).png",
    "javascript:alert(4).png",
    "line\nbreak\r\ttab.png",
    "ünïcödé 图像 🐈.png",
    "</title></style><svg onload=alert(5)>.png",
    "reversed\u202egnp.exe",
    "broken\udcffbytes.png",
    "{{ 7 * 7 }}{% raw %}.png",
    "&lt;b&gt;&amp;.png",
    '"; @import url(http://evil.example/x.css); ".png',
]
K, N, SIZE = 4, 120, 12  # cluster 2 stays empty


def pixels(index):
    """A flat colour that tells the index, so that a thumbnail can be traced back."""
    return np.broadcast_to(np.array([index % 256, index // 256, 200], np.uint8), (SIZE, SIZE, 3))


def read_pixels(run, indices, edge):
    return np.stack([pixels(int(i)) for i in indices])


def index_of(img):
    kind, data = img["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    red, green, _ = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))[0, 0].tolist()
    return red + 256 * green


def write_run(folder, with_labels=True):
    rng = np.random.default_rng(0)
    for name in ("moco", "spice_self", "spice_semi", "features", "data"):
        (folder / name).mkdir(parents=True)
    labels = np.array([0, 1, 3])[rng.integers(0, 3, N)]
    features = np.eye(K, 16)[labels] + 0.2 * rng.normal(size=(N, 16))
    np.save(folder / "features/features.npy", (features / np.linalg.norm(features, axis=1, keepdims=True)).astype("f2"))
    confidence = rng.uniform(0.3, 1.0, N).round(4)
    paths = [HOSTILE[i] if i < len(HOSTILE) else f"photo {i}.png" for i in range(N)]
    with (folder / "assignments.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["index", "path", "cluster", "confidence", "reliable"])
        rows.writerows([i, paths[i], labels[i], confidence[i], int(confidence[i] > 0.6)] for i in range(N))

    def scores(acc):
        if not with_labels:
            return None
        return {"acc": acc, "nmi": acc - 0.011, "ari": acc - 0.022, "nmi_geometric": acc - 0.005, "ami": acc - 0.033}

    metrics = {
        "n": N,
        "k": K,
        "nonempty": 3,
        "seconds": {"moco": 61.0, "spice_self": 12.25, "spice_semi": 3600.0},
        "select": {"loss": 1.234, "silhouette": 0.4321, HOSTILE[0]: 0.5, "broken": math.nan},
        "eval": scores(0.9012),
        "baselines": {"kmeans_pixels": scores(0.5123), "kmeans_features": None},
        "heads": [{"select_loss": loss, "acc": 0.8 if with_labels else None} for loss in (1.3, 1.1, 1.2)],
        "reliable": {"count": 66, "fraction": 0.55, "acc": 0.987 if with_labels else None},
    }
    config = {
        "command": ["spice-dist", "fit", HOSTILE[1], "--out", "it's here"],
        "versions": {"torch": "2.11", HOSTILE[0]: HOSTILE[6]},
        "config": {"moco": {"lr": 0.06, "note": HOSTILE[0]}, "url": "https://example.org/x"},
        "data": {"source": HOSTILE[6]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "spice_self/eval.json").write_text(json.dumps(scores(0.8034)))
    for stage in ("moco", "spice_self", "spice_semi"):
        lines = [{"step": s, "loss": 5 / (s + 1), "lr": 0.1, HOSTILE[0]: s} for s in range(500)]
        text = "\n".join(map(json.dumps, lines)) + '\n{"step": 500, "lo'
        (folder / stage / "metrics.jsonl").write_text(text)
    if with_labels:
        lines = [{"step": e, "selected": 0.5 + e / 100, "best": 0.6 + e / 100} for e in range(1, 21)]
        (folder / "spice_self/head_selection.jsonl").write_text("\n".join(map(json.dumps, lines)))
    manifest = {"n": N, "size": SIZE, "source": HOSTILE[6], "bad": 60, "duplicates": 1}
    (folder / "data/manifest.json").write_text(json.dumps(manifest))
    with (folder / "data/quarantine.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "reason"])
        rows.writerows([(HOSTILE[i % 12], HOSTILE[(i + 1) % 12]) for i in range(59)] + [("'=1+1.png", "last")])
    return labels, confidence, paths


class Page(HTMLParser):
    """Every element with its attributes, and the text inside elements with an id."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text, self.rows = [], [], "", []
        self.inside = {}  # id -> {"text", "imgs"}
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        identity = attributes.get("id")
        if identity:
            self.inside[identity] = {"text": "", "imgs": []}
        if tag == "img":
            for _, other in self.open:
                if other:
                    self.inside[other]["imgs"].append(attributes)
        if tag not in self.VOID:
            self.open.append((tag, identity))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag in ("style", "script") for tag, _ in self.open):
            return
        self.text += data
        for _, identity in self.open:
            if identity:
                self.inside[identity]["text"] += data
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[-1][-1] += data

    def row(self, name):
        return [cell.strip() for row in self.rows for cell in row if row[0].strip() == name]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    truth = write_run(folder)
    return folder, Page(write_report(folder, images=read_pixels).read_text(encoding="utf-8")), truth


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabelled")
    write_run(folder, with_labels=False)
    return folder, Page(write_report(folder, images=read_pixels).read_text(encoding="utf-8"))


def test_the_page_runs_one_script_and_loads_nothing(labelled):
    _, parsed, _ = labelled
    tags = {tag for tag, _ in parsed.elements}
    kinds = [attributes.get("type") for tag, attributes in parsed.elements if tag == "script"]
    assert kinds == ["text/plain", "application/json", None]  # two that are data, and the page's own
    assert not tags & {"iframe", "object", "embed", "link", "base", "form", "foreignobject", "use", "image"}
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "xlink:href", "action", "srcset", "data", "background", "poster"):
            value = attributes.get(name)
            assert value is None or re.fullmatch(r"#[\w-]+|data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", value), value
        assert "url(" not in attributes.get("style", "")
        assert tag != "svg" or "onload" not in attributes
    policies = [a["content"] for t, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0].startswith(
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    assert policies[0].count("'") == 6


def test_the_style_sheet_refers_to_nothing(labelled):
    folder, _, _ = labelled
    style = re.findall(r"<style>(.*?)</style>", (folder / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]


def test_hostile_names_are_only_text(labelled):
    _, parsed, _ = labelled
    titles = " ".join(a["title"] for t, a in parsed.elements if t == "img")
    for name in HOSTILE:
        shown = printable(name)
        assert isinstance(shown, str)
        assert shown in parsed.text or shown in titles
    assert "49" not in "".join(cell for row in parsed.rows for cell in row if "raw" in cell)
    assert "line\\nbreak\\r\\ttab.png" in parsed.text
    assert "reversed\\u202egnp.exe" in parsed.text
    assert "broken\\udcffbytes.png" in parsed.text
    assert "ünïcödé 图像 🐈.png" in parsed.text
    assert re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e]", parsed.text) is None


def test_every_cluster_has_a_section_with_its_numbers(labelled):
    _, parsed, (labels, confidence, _) = labelled
    for cluster in range(K):
        text = parsed.inside[f"cluster-{cluster}"]["text"]
        mine = labels == cluster
        if mine.any():
            assert f"{mine.sum()} images" in text
            assert f"{100 * confidence[mine].mean():.1f} % mean confidence" in text
            assert f"{100 * (confidence[mine] > 0.6).mean():.1f} % reliable" in text
        else:
            assert "Empty" in text
            assert parsed.inside[f"cluster-{cluster}"]["imgs"] == []


def test_galleries_start_with_the_nearest_to_the_center_and_end_with_the_least_certain(labelled):
    folder, parsed, (labels, confidence, paths) = labelled
    features = np.load(folder / "features/features.npy").astype(np.float64)
    for cluster in (0, 1, 3):
        members = np.flatnonzero(labels == cluster)
        center = features[members].mean(axis=0)
        similarity = features[members] @ (center / np.linalg.norm(center))
        imgs = parsed.inside[f"cluster-{cluster}"]["imgs"]
        assert [index_of(img) for img in imgs[:24]] == members[np.argsort(-similarity, kind="stable")][:24].tolist()
        assert [index_of(img) for img in imgs[24:]] == members[np.argsort(confidence[members], kind="stable")][
            :12
        ].tolist()
        first = index_of(imgs[0])
        assert imgs[0]["alt"] == printable(paths[first])
        assert imgs[0]["title"] == f"{printable(paths[first])} · confidence {confidence[first]:.3f}"
        assert imgs[0]["class"] == "px"


def test_the_score_table_holds_the_numbers_of_the_run(labelled):
    _, parsed, _ = labelled
    assert parsed.row("Method") == ["Method", "ACC", "NMI", "ARI", "NMI geom.", "AMI"]
    assert parsed.row("Pixels + k-means") == ["Pixels + k-means", "51.2", "50.1", "49.0", "50.7", "47.9"]
    assert parsed.row("Features + k-means") == ["Features + k-means", "–", "–", "–", "–", "–"]
    assert parsed.row("SPICE-Self") == ["SPICE-Self", "80.3", "79.2", "78.1", "79.8", "77.0"]
    assert parsed.row("SPICE") == ["SPICE", "90.1", "89.0", "87.9", "89.6", "86.8"]
    assert parsed.row("1used") == ["1used", "1.1000", "80.0"]
    assert parsed.row("silhouette")[1] == "0.4321"
    assert parsed.row("broken")[1] == "–"
    assert parsed.row("reliable images")[1] == "66"
    assert "120 images were sorted into 3 groups (of 4 asked for) in 1\u00a0h\u00a001\u00a0min" in parsed.text
    assert "90.1\u00a0% of them are in the group that matches their class" in parsed.text
    assert "98.7 % are correct" in parsed.text


def test_without_labels_no_score_that_needs_them_is_shown(unlabelled):
    _, parsed = unlabelled
    assert "ACC" not in parsed.text
    assert "NMI" not in parsed.text
    assert "SPICE-Self" in parsed.text  # the stage, not a row of scores
    assert parsed.row("SPICE-Self") == []
    assert "there are no true labels" in parsed.text
    assert parsed.row("1used") == ["1used", "1.1000"]


def test_the_last_stage_owns_the_final_scores(tmp_path):
    write_run(tmp_path)
    (tmp_path / "spice_semi/eval.json").write_text(json.dumps({"acc": 0.7}))
    assert load(tmp_path).scores["SPICE"] == {"acc": 0.7}
    (tmp_path / "spice_semi/eval.json").write_text("null")
    assert load(tmp_path).scores["SPICE"] == {"acc": 0.9012, "nmi": 0.8902, "ari": 0.8792, "nmi_geometric": 0.8962} | {
        "ami": pytest.approx(0.8682)
    }
    (tmp_path / "imc_swav").mkdir()
    (tmp_path / "imc_swav/eval.json").write_text(json.dumps({"acc": 0.6}))
    scores = load(tmp_path).scores
    assert list(scores)[2:] == ["IMC-SwAV, stage 1", "SPICE-Self", "SPICE"], "IMC-SwAV was the pretext"
    assert scores["IMC-SwAV, stage 1"] == {"acc": 0.6}
    (tmp_path / "imc_swav/eval.json").unlink()
    for stage in ("spice_self", "spice_semi"):
        shutil.rmtree(tmp_path / stage)
    assert list(load(tmp_path).scores) == ["Pixels + k-means", "Features + k-means", "IMC-SwAV"]


def test_charts_and_settings_are_there(labelled):
    _, parsed, _ = labelled
    labels = [attributes.get("aria-label", "") for tag, attributes in parsed.elements if tag == "svg"]
    assert sum(label.startswith("loss over 500 records up to step 499") for label in labels) == 3
    assert sum(label.startswith("Sizes of 4 clusters, from 0 to") for label in labels) == 1
    assert sum(label.startswith("Map of 120 images") for label in labels) == 1
    assert parsed.row("moco.lr") == ["moco.lr", "0.06"]
    assert parsed.row("torch") == ["torch", "2.11"]
    assert "The first 50 of 60" in parsed.text
    assert "'it'\"'\"'s here'" in parsed.text


def test_every_image_has_a_text_and_every_link_a_target(labelled):
    _, parsed, _ = labelled
    identities = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert all(a.get("alt") for t, a in parsed.elements if t == "img")
    assert all(a["href"][1:] in identities for t, a in parsed.elements if t == "a")
    assert all("scope" in a for t, a in parsed.elements if t == "th")
    assert all("aria-label" in a or a.get("aria-hidden") == "true" for t, a in parsed.elements if t == "svg")


def test_a_poor_run_still_gets_a_page(tmp_path):
    (tmp_path / "metrics.json").write_text('{"k": 1}')
    (tmp_path / "assignments.csv").write_text("index,path,cluster,confidence,reliable\n0,a.png,0,0.5,False\n")
    out = write_report(tmp_path, tmp_path / "page.html", images=read_pixels)
    parsed = Page(out.read_text(encoding="utf-8"))
    assert out == tmp_path / "page.html"
    assert "1 images were sorted into 1 group" not in parsed.text
    assert "1 image was sorted into 1 group" in parsed.text
    assert len(parsed.inside["cluster-0"]["imgs"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assignments.csv", "metrics.json", "page.html"]


def test_images_that_cannot_be_read_are_named_not_hidden(tmp_path):
    write_run(tmp_path)

    def gone(run, indices, edge):
        raise DamagedFile("images.npy <b>is gone</b>")

    parsed = Page(write_report(tmp_path, images=gone).read_text(encoding="utf-8"))
    assert "could not be read, so no thumbnails are shown: images.npy <b>is gone</b>" in parsed.text
    assert not [tag for tag, _ in parsed.elements if tag == "img"]


def test_many_clusters_fit_the_page(tmp_path):
    k, rng = 300, np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features/features.npy", rng.normal(size=(k * 10, 4)).astype("f2"))
    (tmp_path / "metrics.json").write_text(json.dumps({"k": k}))
    rows = [f"{i},{'long' * 50}{i}.png,{i % k},0.5,1" for i in range(k * 10)]
    (tmp_path / "assignments.csv").write_text("\n".join(["index,path,cluster,confidence,reliable", *rows]))
    noise = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)  # 40 px: kept as PNG, and it does not compress
    out = write_report(tmp_path, images=lambda run, indices, edge: np.broadcast_to(noise, (len(indices), 40, 40, 3)))
    text = out.read_text(encoding="utf-8")
    shown = text.count('id="cluster-299"'), re.search(r"at most (\d+) of its most typical images and (\d+)", text)
    assert shown[0] == 1
    assert shown[1] is not None
    assert int(shown[1][1]) < 6
    assert len(text.encode()) < 15_000_000


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("metrics.json", "{", DamagedFile, "not JSON"),
        ("metrics.json", '{"k": 2}', DamagedFile, r"clusters 0\.\.3, but metrics.json says k = 2"),
        ("metrics.json", '{"k": "4"}', DamagedFile, "k must be a positive integer"),
        ("metrics.json", None, UserError, "not finished"),
        ("assignments.csv", None, UserError, "not finished"),
        ("assignments.csv", "index,path,cluster,confidence,reliable\n1,a,0,1,1\n", DamagedFile, "row 2: index '1'"),
        ("assignments.csv", "index,path,cluster,confidence,reliable\n0,a,0,nan,1\n", DamagedFile, "confidence 'nan'"),
        ("assignments.csv", "index,path,cluster,confidence,reliable\n0,a,0\n", DamagedFile, "row 2"),
        ("assignments.csv", "index,path,cluster,confidence,reliable\n", DamagedFile, "no images"),
        ("features/features.npy", "not an array", DamagedFile, r"features\.npy"),
    ],
)
def test_damage_is_named(tmp_path, name, content, error, message):
    write_run(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        write_report(tmp_path, images=read_pixels)
    assert not (tmp_path / "report.html").exists()


def test_an_old_page_survives_a_failure(tmp_path):
    write_run(tmp_path)
    (tmp_path / "report.html").write_text("old")

    def fails(run, indices, edge):
        raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError, match="broke"):
        write_report(tmp_path, images=fails)
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_page_that_cannot_be_placed_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "nowhere", images=read_pixels)
    write_run(tmp_path / "run")
    with pytest.raises(UserError, match="is no folder"):
        write_report(tmp_path / "run", tmp_path / "missing" / "page.html", images=read_pixels)
    table = tmp_path / "run/assignments.csv"
    before = table.read_bytes()
    with pytest.raises(UserError, match="is no page; give another --out"):
        write_report(tmp_path / "run", table, images=read_pixels)
    assert table.read_bytes() == before
    for megabytes in (float("nan"), float("inf"), -1.0):
        with pytest.raises(UserError, match="must be from 0 to a million"):
            write_report(tmp_path / "run", images=read_pixels, page_mb=megabytes)
    with pytest.raises(UserError, match="is a folder"):
        write_report(tmp_path / "run", tmp_path, images=read_pixels)


def test_a_step_written_again_after_a_restart_replaces_the_old_one(tmp_path):
    records = [{"step": s, "loss": s, "text": "x", "flag": True} for s in (0, 1, 2, 3)]
    records += [
        {"step": 2, "loss": 20},
        {"step": 3, "loss": math.nan},
        {"step": 4, "loss": 40},
        {"loss": 1},
        [1],
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 5, "los')
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert list(curves) == ["loss"]
    assert curves["loss"].steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(curves["loss"].values, [0, 1, 20, np.nan, 40])


def test_a_gap_splits_a_curve():
    steps, values = np.arange(6.0), np.array([1, 2, np.nan, 3, np.nan, np.inf])
    chart = charts.line_chart(Curve(steps, values), "<loss>", 500, 200)
    assert chart.count('class="line"') == 1
    assert chart.count('class="dot"') == 1
    assert "&lt;loss&gt;" in chart
    assert "nan" not in chart
    assert "no finite values" in charts.line_chart(Curve(steps, values * np.nan), "loss", 500, 200)


@settings(deadline=None, max_examples=200)
@example({0.0: 5e-324, 1.0: 0.0})
@example({0.0: 1e308, 1.0: -1e308})
@example({0.0: 1e16, 5e-324: 1e16 + 2})
@given(st.dictionaries(st.floats(-1e308, 1e308), st.floats(), min_size=1, max_size=300))
def test_any_numbers_make_a_chart(records):
    steps = np.array(sorted(records))
    chart = charts.line_chart(Curve(steps, np.array([records[step] for step in steps])), "loss", 270, 132)
    assert not re.search(r"\b(nan|inf)\b", chart)
    assert len(re.findall("class=.grid", chart)) in range(13)


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 10.0, ["0", "2", "4", "6", "8", "10"]),
        (0.0, 12_000.0, ["0", "5k", "10k"]),
        (-0.11, 0.32, ["−0.1", "0", "0.1", "0.2", "0.3"]),
        (2.0, 2.04, ["2.00", "2.01", "2.02", "2.03", "2.04"]),
        (0.0, 2e6, ["0", "0.5M", "1.0M", "1.5M", "2.0M"]),
        (0.0, 4e-5, ["0", "1e-05", "2e-05", "3e-05", "4e-05"]),
    ],
)
def test_ticks_are_round_and_short(low, high, texts):
    assert charts.tick_texts(charts.ticks(low, high, 5)) == texts


def test_principal_axes_are_those_of_the_covariance(monkeypatch):
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(200, 5)) * [5, 3, 1, 1, 1]).astype(np.float32)
    indices, points, share = gallery.principal_axes(features)
    variances = np.sort(np.linalg.eigvalsh(np.cov(features.T)))[::-1]
    assert indices.tolist() == list(range(200))
    np.testing.assert_allclose(points.var(axis=0, ddof=1), variances[:2], rtol=1e-3)
    np.testing.assert_allclose(share, variances[:2] / variances.sum(), rtol=1e-3)
    monkeypatch.setattr(gallery, "MAP_IMAGES", 50)
    sampled, points, _ = gallery.principal_axes(features)
    assert len(np.unique(sampled)) == 50 == len(points)


def test_center_similarity_in_blocks_equals_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(100, 6)), rng.integers(0, 5, 100)
    whole = gallery.cluster_centers(features, labels, 6)
    np.testing.assert_allclose(
        whole[2] @ features[labels == 2].mean(axis=0), np.linalg.norm(features[labels == 2].mean(axis=0))
    )
    similarity = gallery.center_similarity(features, labels, whole)
    monkeypatch.setattr(gallery, "CHUNK", 7)
    np.testing.assert_allclose(gallery.cluster_centers(features, labels, 6), whole)
    np.testing.assert_allclose(gallery.center_similarity(features, labels, whole), similarity)


def test_large_images_become_small_jpegs():
    uri, pixelated = gallery.encode(np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8), 96)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert (picture.format, picture.size, pixelated) == ("JPEG", (64, 96), False)


def test_images_are_read_from_the_packed_data(tmp_path):
    stack = np.stack([pixels(i) for i in range(20)])
    np.save(tmp_path / "stack.npy", stack)
    ingest(open_source(str(tmp_path / "stack.npy")), tmp_path / "run" / "data", size=SIZE)
    found = read_images(tmp_path / "run", np.array([7, 3, 19]), 96)
    assert [image[0, 0].tolist() for image in found] == [[7, 0, 200], [3, 0, 200], [19, 0, 200]]


def test_importing_the_report_imports_no_torch():
    code = (
        "import sys, spice_dist.report; print([m for m in ('torch', 'PIL', 'jinja2', 'sklearn') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_selected_head_is_drawn_beside_the_best_one_where_there_are_labels(tmp_path):
    for with_labels in (True, False):
        run = tmp_path / str(with_labels)
        write_run(run, with_labels)
        text = write_report(run, images=read_pixels).read_text()
        assert ("accuracy of the selected head over 20 records up to step 20; last value 0.7" in text) == with_labels
        if with_labels:
            figure = text[text.index("Accuracy by epoch") :]
            assert figure.index('class="reference"') < figure.index("</figure>")
            assert figure.index('class="line"') < figure.index("</figure>")
