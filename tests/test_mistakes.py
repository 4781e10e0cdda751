"""What users get wrong, in every sub-command: each is one line that says what to do, most before torch is loaded."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# the arguments, words of the line; {0} is a folder with the files that `folder` makes
BEFORE_TORCH = [
    ("predcit runs/a", "invalid choice: 'predcit'"),
    ("--version-number", "--help"),
    ("fit", "required: data; see spice-dist fit --help"),
    ("fit digits", "give --out"),
    ("fit digits --out", "expected one argument"),
    ("fit digits --from {0}/run --recipe digits --out {0}/new", "leave --recipe out"),
    ("fit {0}/nowhere --out {0}/new", "check the path"),
    ("fit {0}/empty --out {0}/new", "put images into it"),
    ("fit {0}/texts --out {0}/new", "found 1 .txt, looked for avif"),
    ("fit {0}/links --out {0}/new", "give the folder they point to"),
    ("fit {0}/one.png --out {0}/new", "give the folder it is in"),
    ("fit {0}/notes.pdf --out {0}/new", "give 'digits', a folder of images"),
    ("fit {0}/no-path.csv --out {0}/new", "it needs a column 'path', it has name, size"),
    ("fit {0}/empty.txt --out {0}/new", "names no image"),
    ("fit {0}/float.npy --out {0}/new", "convert with (x * 255).round().astype('uint8')"),
    ("fit {0}/first.npy --out {0}/new", "channels come last"),
    ("fit {0}/pickled.npy --out {0}/new", "without pickled objects"),
    ("fit {0}/foreign.beton --out {0}/new", "--trust-foreign-beton"),
    ("fit cifar10:{0}/nowhere --out {0}/new", "nowhere"),
    ("fit {0}/photos --labels array --out {0}/new", "for a folder give 'folder' or none"),
    ("fit {0}/photos --labels folder --out {0}/new", "move each into the sub-folder of its class"),
    ("fit {0}/photos --split split --out {0}/new", "for named data sets"),
    ("fit digits --clusters many --out {0}/new", "give auto, or a whole number of at least 2"),
    ("fit digits --workers 4:2 --out {0}/new", "is no range; give such as 2:8"),
    ("fit digits --max-bad 7 --out {0}/new", "it is 7; give a share of the images, from 0 to 1; for 7 % give 0.07"),
    ("pack {0}/photos {0}/new.beton --max-bad nan", "give a share of the images, from 0 to 1"),
    ("fit digits --workers two --out {0}/new", "give a number such as 4"),
    ("fit digits --seed x --out {0}/new", "invalid int value: 'x'"),
    ("fit digits --method kmeans --out {0}/new", "invalid choice: 'kmeans'"),
    ("fit digits --epochs 5 --out {0}/new", "unrecognized arguments: --epochs"),
    ("predict {0}/run", "required: data"),
    ("predict {0}/nowhere digits", "give the folder of a finished run"),
    ("predict {0}/photos digits", "holds no model"),
    ("predict {0}/run {0}/nowhere", "check the path"),
    ("predict {0}/run ''", "the value after {0}/run is empty"),
    ("fit digits --out=", "the value after --out is empty"),
    ("report '' --out {0}/new", "the value after report is empty"),
    ("predict {0}/run digits --out {0}/new.xlsx", "ends with .csv or .parquet"),
    ("report {0}/run --out {0}/new.pdf", "give a name that ends with .html"),
    ("predict {0}/run digits --out {0}/nowhere/new.csv", "a folder that exists"),
    ("predict {0}/run digits --out {0}/one.png/new.csv", "{0}/one.png is a file, no folder"),
    ("export {0}/run {0}/one.png/new.csv --to csv", "{0}/one.png is a file, no folder; make it, or give another"),
    ("export {0}/run {0}/nowhere/new.csv --to csv", "there is no folder {0}/nowhere"),
    ("predict {0}/run {0}/no-path.csv --out {0}/no-path.csv", "give another name"),
    ("predict {0}/run digits --unreadable ignore", "choose from"),
    ("predict {0}/run -", "give at least one path"),
    ("evaluate", "required: run"),
    ("evaluate {0}/run --probe svm", "choose from"),
    ("pack {0}/photos {0}/photos.zip", "photos.beton"),
    ("pack {0}/photos {0}/new.beton --size 1", "give 2 .. 4096"),
    ("pack {0}/photos {0}/new.beton --quality 0", "give 1 .. 100"),
    ("tune digits --out {0}/new", "required: --space"),
    ("completion fish", "choose from"),
    ("slurm --nodes 0 -- fit digits --out {0}/new", "argument --nodes: it is 0; give a whole number of at least 1"),
    ("slurm --gpus two -- fit digits --out {0}/new", "argument --gpus: it is two; give a whole number of at least 0"),
    ("slurm --nodes 2", "no command for the job; give one after --"),
    ("slurm -- fti digits", "invalid choice: 'fti'"),
    ("slurm -- fit s3://me:secret@bucket/a --out {0}/new", "give a place without a password or token"),
]
LATER = [
    ("settings mocoo", "did you mean moco"),
    ("settings --recipe cifar", "cifar10"),
    ("suggest-k {0}/nowhere", "check the path"),
    ("fit digits --set data.max_bad=7 --out {0}/new", "data.max_bad is 7.0; it must be between 0 and 1"),
    (
        "fit digits --config {0}/cut.json --out {0}/new",
        "Expecting ',' delimiter: line 2 column 1 (char 13)",
    ),
    ("fit digits --recipe digit --out {0}/new", "digits, photos"),
    ("fit digits --from {0}/photos --out {0}/new", "give --from the folder of a finished one"),
    ("fit digits --config {0}/nowhere.json --out {0}/new", "nowhere.json"),
    ("fit digits --set moco.lr --out {0}/new", "NAME=VALUE"),
    ("fit digits --set moco.temprature=1 --out {0}/new", 'did you mean "moco.temperature"'),
    ("fit digits --set moco.epochs=0 --out {0}/new", "must be above 0"),
    ("fit digits --set moco.epochs=few --out {0}/new", "moco.epochs"),
    ("fit digits --clusters 1 --out {0}/new", "at least 2"),
    ("fit {0}/photos --clusters 7 --out {0}/new", "more than the 6 images"),
    ("predict {0}/run digits", "holds no model"),
    ("evaluate {0}/photos", "start the same command again to finish it"),
    ("evaluate {0}/nowhere", "give the folder of a finished run"),
    ("report {0}/nowhere", "give the folder of a finished run"),
    ("tune digits --space hedas --out {0}/new", "hedas"),
]

# runs each line of the list that it reads, and prints what was said and whether torch was loaded by then
PROGRAM = """
import contextlib, io, json, sys
from spice_dist import cli

def told(arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
    return code, said.getvalue(), "torch" in sys.modules

lists = json.load(sys.stdin)
sys.stdin = io.TextIOWrapper(io.BytesIO())
print(json.dumps([told(arguments) for arguments in lists]))
"""


def make(folder: Path) -> None:
    for name in ("empty", "texts", "links", "photos", "run/model"):
        (folder / name).mkdir(parents=True)
    for name in ("texts/a.txt", "notes.pdf", "empty.txt"):
        (folder / name).touch()
    (folder / "no-path.csv").write_text("name,size\na,1\n")
    (folder / "cut.json").write_text('{"config": 1\n')
    (folder / "foreign.beton").write_bytes(b"not ours")
    (folder / "run/model/model.json").write_text("{")
    (folder / "links/a.png").symlink_to(folder / "one.png")
    images = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"photos/{i}.png")
    Image.fromarray(images[0]).save(folder / "one.png")
    np.save(folder / "float.npy", images / 255)
    np.save(folder / "first.npy", images.transpose(0, 3, 1, 2))
    np.save(folder / "pickled.npy", np.array([{}], object), allow_pickle=True)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, bool]]:
    """What each mistake prints, with its exit code."""
    folder = tmp_path_factory.mktemp("mistakes")
    make(folder)
    lines = [line for line, _ in [*BEFORE_TORCH, *LATER]]
    arguments = json.dumps([shlex.split(line.format(folder)) for line in lines])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=arguments, capture_output=True, text=True, timeout=200, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "new").exists(), "a mistake leaves nothing behind"
    said = [(code, text.replace(str(folder), "{0}"), torch) for code, text, torch in json.loads(done.stdout)]
    return dict(zip(lines, said, strict=True))


@pytest.mark.parametrize(("line", "words"), [*BEFORE_TORCH, *LATER])
def test_a_mistake_is_one_line_with_its_remedy(told, line, words):
    code, said, _ = told[line]
    assert code == 1
    said = said.removeprefix("1,797 images found; loading torch\n").removeprefix("6 images found; loading torch\n")
    assert said.count("\n") == 1, said
    assert said.startswith("spice-dist: ")
    assert words in said


def test_most_mistakes_are_told_before_torch_is_loaded(told):
    assert [line for line, _ in BEFORE_TORCH if told[line][2]] == []
    assert len(BEFORE_TORCH) >= 40
