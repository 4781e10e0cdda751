"""Which images train what: clustered ones everything, extra ones stages 1 and 3, held-out ones nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spice_dist.data.sources import Source, open_source
from spice_dist.distributed import checkpoint
from spice_dist.launching import Launch
from spice_dist.pipeline import fit
from spice_dist.pseudo_labels import UNRELIABLE
from tests.methods.conftest import SMALL, override

CONFIG = override(SMALL, {"data.loader": "torch", "moco.epochs": 1})
N, EXTRA, HELD_OUT = 200, 40, 30


def parts(changed: slice = slice(0, 0)) -> Source:
    """200 digits, the last 30 held out, 40 before them extra; `changed` ones are other images."""
    source = open_source("digits")
    assert source.labels is not None
    pixels = np.stack([source.read(i) for i in range(N)])
    pixels[changed] = 255 - pixels[changed]
    labels = source.labels[:N].copy()
    labels[N - EXTRA - HELD_OUT : N - HELD_OUT] = -1
    return replace(
        source, paths=source.paths[:N], read=pixels.__getitem__, labels=labels, extra=EXTRA, held_out=HELD_OUT
    )


def run(folder: Path, source: Source) -> dict[str, dict]:
    """The weights that each stage left."""
    fit(CONFIG, source, folder, Launch(workers=0))
    names = {"moco": "backbone", "spice_self": "select", "spice_semi": "ema"}
    found = {}
    for stage, name in names.items():
        saved = checkpoint.newest(folder / stage / "checkpoints")
        assert saved is not None
        found[stage] = saved.tensors(name)
    return found


def differing(one: dict[str, dict], other: dict[str, dict]) -> list[str]:
    return [stage for stage in one if any(not one[stage][name].equal(other[stage][name]) for name in one[stage])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("base")
    return folder, run(folder, parts())


def test_held_out_images_train_nothing(base, tmp_path):
    assert differing(base[1], run(tmp_path / "other", parts(slice(N - HELD_OUT, N)))) == []


def test_extra_images_train_stages_1_and_3(base, tmp_path):
    changed = run(tmp_path / "other", parts(slice(N - HELD_OUT - EXTRA, N - HELD_OUT)))
    assert "moco" in differing(base[1], changed)


def test_only_the_clustered_can_be_reliable_and_only_the_held_out_score(base):
    folder = base[0]
    clustered = N - EXTRA - HELD_OUT
    reliable = np.load(folder / "reliable/labels.npy")
    assert (reliable[clustered:] == UNRELIABLE).all()
    assert (reliable[:clustered] != UNRELIABLE).any()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["n"] == N
    rows = (folder / "assignments.csv").read_text().splitlines()[1:]
    assert len(rows) == N
    predicted = np.array([int(row.split(",")[2]) for row in rows])
    from spice_dist.metrics import scores

    y_true = np.load(folder / "data/labels.npy")
    assert metrics["eval"] == scores(y_true[-HELD_OUT:], predicted[-HELD_OUT:])
