"""The whole network as an ONNX file: bytes of images in, probabilities of the clusters and features out."""

import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from spice_dist import artifacts
from spice_dist.data.files import commit
from spice_dist.errors import UserError
from spice_dist.export.trained import Trained, cropping, largest_difference, preprocessing, trained
from spice_dist.group_names import labels_of
from spice_dist.models.backbone import unit
from spice_dist.models.heads import Network
from spice_dist.task import Task

OPSET = 20
TOLERANCE = 1e-3  # of the largest probability and the largest entry of a feature
INSTALL = "pip install 'spice_dist[export]'"
OUTPUTS = ("probabilities", "features")


class Deployed(nn.Module):
    """Maps images (B, H, W, C), uint8, to probabilities (B, K) and unit-norm features (B, D): it normalises first."""

    def __init__(self, net: Network, task: Task):
        super().__init__()
        self.net = net
        about = preprocessing(task)
        mean, std = (torch.tensor(about[name], dtype=torch.float64)[:, None, None] for name in ("mean", "std"))
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (mean / std).float())

    def forward(self, images: UInt8[Tensor, "B H W C"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B D"]]:
        features = self.net.backbone(images.permute(0, 3, 1, 2).float() * self.scale - self.shift)
        return self.net.logits(features).softmax(1), unit(features)


def export(run: Path, out: Path) -> list[str]:
    """Write the network to `out` if onnxruntime computes what torch does; return lines that say how to use it.

    Raises:
        UserError: a library is missing, an operation of the network is not in ONNX, the outputs differ, or `out` cannot
            be written.
    """
    with trained(run) as model:
        content = converted(Deployed(model.net, model.task).eval(), model.task)
        difference = _write_checked(content, _about(run, model.task), model, out)
        return [
            f"wrote {out}: ONNX opset {OPSET}; probabilities and features are torch's within {difference:.0e} of the "
            f"largest on {len(model.index)} images",
            f"input: images, uint8 (any number, {model.task.data.size}, {model.task.data.size}, "
            f"{model.task.data.channels}); outputs: {' and '.join(OUTPUTS)}; normalisation is inside",
            cropping(model.task),
        ]


def converted(net: Deployed, task: Task) -> Any:
    """Convert to an ONNX model (protobuf); UserError if a library is missing or an operation is not in ONNX."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs another library, {error.name}: {INSTALL}") from error
    size, channels = task.data.size, task.data.channels
    example = torch.zeros((2, size, size, channels), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                net,
                (example,),
                input_names=["images"],
                output_names=list(OUTPUTS),
                opset_version=OPSET,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as error:  # torch.export, the converter and its graph passes each raise errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"torch cannot convert {task.backbone.name} to ONNX ({reason}); try --to timm") from error
    assert program is not None, "the exporter by torch.export returns a program"
    return program.model_proto


def _about(run: Path, task: Task) -> dict[str, str]:
    """Return the metadata of the file: JSON texts by name."""
    return {
        "clusters": json.dumps(labels_of(artifacts.model(run), task.clusters)),
        "preprocessing": json.dumps({**preprocessing(task), "layout": "NHWC, uint8", "normalisation": "inside"}),
    }


def _write_checked(content: Any, about: dict[str, str], model: Trained, out: Path) -> float:
    """Write the file where it belongs once onnxruntime has run it; return how far its outputs are from torch's."""
    import onnx

    onnx.helper.set_model_props(content, about)
    try:
        with tempfile.TemporaryDirectory(prefix=".spice-", dir=out.parent) as folder:
            temporary = Path(folder) / "network.onnx"
            try:
                onnx.save(content, temporary)
            except ValueError as error:  # protobuf's limit of 2 GiB
                raise UserError(f"the network is too large for one ONNX file of 2 GiB ({error})") from error
            difference = _compare(temporary, model)
            commit(temporary, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return difference


def _compare(path: Path, model: Trained) -> float:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"the check of an ONNX file needs onnxruntime: {INSTALL}") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = model.pixels().permute(0, 2, 3, 1).contiguous().numpy()
    results = [torch.as_tensor(result) for result in session.run(list(OUTPUTS), {"images": pixels})]
    expected = (model.outputs(model.net).softmax(1), unit(model.outputs(model.backbone)))
    triples = zip(OUTPUTS, results, expected, strict=True)
    return max(largest_difference(f"the {name}", one, other, TOLERANCE) for name, one, other in triples)
