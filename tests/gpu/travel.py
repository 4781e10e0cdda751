"""Packs what the check needs on a machine without a network into parts below 60 MiB, and unpacks them there.

    launch/gpu_check.sh pack [--cifar10 cifar10.npz] [--labels labels.npy] [--resume OUT] [--to runs/gpu_parts]
    launch/gpu_check.sh unpack runs/gpu_parts/part-1 ...

A part is a folder with pieces of files and `parts.json`, the SHA-256 of every piece and every whole file. Parts can be
unpacked one at a time, in any order. Wheels are for CPython 3.12 on x86-64; of them only those of packages that the
machine lacks are installed, in the folder of the check. Python's own library is enough to run this.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

FOLDER = Path(os.environ.get("GPU_CHECK_FOLDER", "runs/gpu_check"))
PARTS = Path("runs/gpu_parts")
PART_BYTES = 56 << 20
PACKAGES = (  # that a machine with PyTorch and torchvision may lack: what the program and its tests import
    *("timm", "huggingface-hub", "safetensors", "jaxtyping", "wadler-lindig", "beartype", "tensorboardX", "protobuf"),
    *("psutil", "tqdm", "pyyaml", "packaging", "pytest", "pluggy", "iniconfig", "pygments"),
    *("httpx2", "httpcore2", "h11", "anyio", "idna", "truststore", "hf-xet", "click", "filelock", "typing-extensions"),
    *("scikit-learn", "scipy", "joblib", "threadpoolctl", "numpy", "pillow", "jinja2", "markupsafe", "fsspec"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
INDEX = "parts.json"


class Unusable(Exception):
    """What is wrong, in one line."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("gpu_check.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("pack")
    verb.add_argument("--cifar10", type=Path, help="an .npz of train_images, train_labels, test_images, test_labels")
    verb.add_argument("--labels", type=Path, help="an .npy of reliable labels of its train images")
    verb.add_argument("--resume", type=Path, help="the --out of an earlier check, to go on with")
    verb.add_argument("--to", type=Path, default=PARTS)
    verb.add_argument("--without-wheels", action="store_true", help="the machine has all packages")
    verb = verbs.add_parser("unpack")
    verb.add_argument("parts", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "pack":
            for part in pack(options):
                print(part)
        else:
            for part in options.parts:
                unpack(part, FOLDER)
    except (Unusable, OSError, subprocess.CalledProcessError) as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    return 0


# ---------------------------------------------------------------- packing


def pack(options: argparse.Namespace) -> list[Path]:
    """Write the parts and return their folders, which were empty or did not exist."""
    if options.to.exists() and any(options.to.iterdir()):
        raise Unusable(f"{options.to} is not empty; remove it, or give another --to")
    with tempfile.TemporaryDirectory() as temporary:
        wheels = [] if options.without_wheels else download(Path(temporary) / "wheels")
        files = [(path, f"wheels/{path.name}") for path in wheels]  # first: nothing runs without them
        return divide([*files, *given(options, Path(temporary))], options.to, PART_BYTES)


def given(options: argparse.Namespace, temporary: Path) -> Iterator[tuple[Path, str]]:
    for path, name in ((options.cifar10, "data/cifar10.npz"), (options.labels, "data/labels.npy")):
        if path:
            yield compressed(path, temporary / Path(name).name) if path.suffix == ".npz" else path, name
    if options.resume:
        archive = temporary / "carry.tar"
        pieces = sorted(options.resume.glob("carry.tar.*"))
        if not pieces:
            raise Unusable(f"{options.resume} holds no carry.tar.*: nothing of an earlier check to go on with")
        archive.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        yield archive, "carry.tar"


def compressed(path: Path, to: Path) -> Path:
    """Write the arrays of an .npz, which is a ZIP file, anew with compression."""
    import zipfile

    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with old.open(name) as source, new.open(name, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return to


def download(folder: Path) -> list[Path]:
    """Fetch the wheels by pip, in the versions of this environment where it has them."""
    wanted = [f"{name}=={version}" if (version := installed(name)) else name for name in PACKAGES]
    platforms = [text for platform in PLATFORMS for text in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder), *wanted]
    subprocess.run(command, check=True)
    return sorted(folder.iterdir())


def installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def divide(files: Sequence[tuple[Path, str]], folder: Path, part_bytes: int) -> list[Path]:
    """Cut the files into pieces and fill one part after the other."""
    parts: list[Path] = []
    indices: list[dict[str, dict]] = []
    room = 0
    for path, name in files:
        whole = digest(path.read_bytes())
        left = path.stat().st_size
        with open(path, "rb") as file:
            number = 0
            while left or not number:
                if not room:
                    room = part_bytes
                    parts.append(folder / f"part-{len(parts) + 1}")
                    parts[-1].mkdir(parents=True)
                    indices.append({})
                piece = file.read(room)
                left, room = left - len(piece), room - len(piece)
                called = f"{name.replace('/', '__')}.{number}"
                (parts[-1] / called).write_bytes(piece)
                about = {"of": name, "number": number, "sha256": digest(piece), "whole": whole, "last": not left}
                indices[-1][called] = about
                number += 1
    for part, index in zip(parts, indices, strict=True):
        (part / INDEX).write_text(json.dumps(index, indent=1))
    return parts


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------- unpacking


def unpack(part: Path, folder: Path) -> None:
    """Check a part; put its files in place as soon as all their pieces have come."""
    try:
        index = json.loads((part / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise Unusable(f"{part} is no part that `gpu_check.sh pack` has written: {error}") from error
    pieces = folder / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    for name, about in index.items():
        content = (part / name).read_bytes()
        if digest(content) != about["sha256"]:
            raise Unusable(f"{part / name} is damaged: its SHA-256 is not that of {INDEX}; copy it again")
        (pieces / name).write_bytes(content)
        (pieces / f"{name}.json").write_text(json.dumps(about))
    for name in sorted({about["of"] for about in index.values()}):
        if join(pieces, name, folder / name):
            put_in_place(folder, name)


def join(pieces: Path, name: str, to: Path) -> bool:
    """Write the whole file if its pieces are all there."""
    of_file = sorted(
        (about["number"], about, path.with_suffix(""))
        for path in pieces.glob(f"{name.replace('/', '__')}.*.json")
        if (about := json.loads(path.read_text()))["of"] == name
    )
    if [number for number, *_ in of_file] != list(range(len(of_file))) or not of_file[-1][1]["last"]:
        return False
    content = b"".join(path.read_bytes() for *_, path in of_file)
    if digest(content) != of_file[-1][1]["whole"]:
        raise Unusable(f"the pieces of {name} are of two packings; remove {pieces} and unpack all parts again")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(content)
    for *_, path in of_file:
        path.unlink()
        path.with_name(f"{path.name}.json").unlink()
    return True


def put_in_place(folder: Path, name: str) -> None:
    """Install a wheel that the machine lacks; open the state of an earlier check unless there is a newer one."""
    path = folder / name
    if name.startswith("wheels/") and not installed(re.split(r"-\d", path.name)[0]):
        options = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(folder / "site")]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, str(path)], check=True)
    elif name == "carry.tar" and not (folder / "check.json").exists():
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
