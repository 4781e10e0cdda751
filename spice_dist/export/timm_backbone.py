"""The backbone as a file that timm loads.

BatchNorm has other names in `models/`, so tensors get timm's names again. The file holds one network without what the
run adds to it: the features of a middle stage, further networks, the head.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spice_dist.data.files import commit, let_umask_decide
from spice_dist.errors import UserError
from spice_dist.export.trained import Trained, cropping, largest_difference, preprocessing, trained
from spice_dist.models.backbone import BackboneConfig
from spice_dist.models.split_batch_norm import split_batch_norm
from spice_dist.models.wide_resnet import SHAPES
from spice_dist.task import Task

TOLERANCE = 1e-4  # of the largest feature


def export(run: Path, out: Path) -> list[str]:
    """Write the backbone to `out` if timm computes the run's features from it; return lines that say how to load it.

    Raises:
        UserError: timm cannot build this network, the features differ, or `out` cannot be written.
    """
    with trained(run) as model:
        refuse_others(model.task.backbone)
        arguments, reference = build(model.task)
        tensors = with_timm_names(model.backbone.body, reference)
        difference = _write_checked(tensors, arguments, model, out)
        return [f"wrote {out}: {_about(model, difference)}", *_usage(model.task, arguments, out), *_left_out(model)]


def refuse_others(config: BackboneConfig) -> None:
    """Raise a UserError if the network is not one that `timm.create_model` builds."""
    instead = "export it with --to onnx, which holds the whole network"
    if config.others:
        names = " and ".join(name for name, _ in config.networks)
        raise UserError(
            f"the features are of several networks side by side, {names}, which timm does not build; {instead}"
        )
    if config.name in SHAPES:
        raise UserError(f"timm has no {config.name}; {instead}")
    if config.stem != "native":
        raise UserError(
            f'the first convolution of this {config.name} was replaced (backbone.stem="{config.stem}"), which timm '
            f"does not build; {instead}"
        )


def build(task: Task) -> tuple[dict[str, Any], nn.Module]:
    """Return the arguments of `timm.create_model` beside the name, and the network that it makes of them."""
    import timm

    config = task.backbone
    arguments: dict[str, Any] = {"num_classes": 0}
    if task.data.channels != 3:
        arguments["in_chans"] = task.data.channels
    arguments |= {"channels": config.widths} if config.widths else {}
    arguments |= {"layers": config.depths} if config.depths else {}
    try:
        sized = {**arguments, "img_size": task.data.size}
        return sized, timm.create_model(config.name, pretrained=False, **sized)
    except TypeError:  # most convolutional networks take images of any size
        return arguments, timm.create_model(config.name, pretrained=False, **arguments)


def with_timm_names(body: nn.Module, reference: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a backbone by the names of the same network as timm builds it; `reference` is changed."""
    names = list(reference.state_dict())
    split_batch_norm(reference)  # keeps the order of tensors
    renamed = dict(zip(reference.state_dict(), names, strict=True))
    return {renamed[name]: value.contiguous() for name, value in body.state_dict().items()}


def _write_checked(tensors: dict[str, Tensor], arguments: dict[str, Any], model: Trained, out: Path) -> float:
    """Write the file where it belongs once timm has loaded it; return how far its features are from the run's."""
    import timm
    from safetensors.torch import save_file

    name = model.task.backbone.name
    about = {"architecture": name, "arguments": arguments, **preprocessing(model.task)}
    try:
        with tempfile.TemporaryDirectory(prefix=".spice-", dir=out.parent) as folder:
            temporary = Path(folder) / "backbone.safetensors"  # timm knows the format by the suffix
            save_file(tensors, temporary, {"format": "pt", "spice_dist": json.dumps(about)})
            let_umask_decide(temporary)
            loaded = timm.create_model(name, pretrained=False, checkpoint_path=str(temporary), **arguments)
            features = model.outputs(model.backbone.body)
            difference = largest_difference("timm's features", model.outputs(loaded), features, TOLERANCE)
            commit(temporary, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return difference


def _about(model: Trained, difference: float) -> str:
    checked = f"timm's features are the run's within {difference:.0e} of the largest on {len(model.index)} images"
    return f"the backbone {model.task.backbone.name}; {checked}"


def _usage(task: Task, arguments: dict[str, Any], out: Path) -> list[str]:
    given = "".join(f", {name}={value!r}" for name, value in arguments.items())
    call = f'timm.create_model("{task.backbone.name}", pretrained=False{given}, checkpoint_path={str(out)!r}).eval()'
    about = preprocessing(task)
    normalised = f"then / 255, minus {about['mean']}, divided by {about['std']}"
    return [f"load it: model = {call}", f"{cropping(task)}, {normalised}"]


def _left_out(model: Trained) -> list[str]:
    mixture = model.backbone.mixture
    if mixture is None or not float(mixture.weight):
        return []
    share = f"weight {float(mixture.weight):.1f} beside 1"
    return [f"not in it: the features of a middle stage ({share}) and the head; --to onnx holds the whole network"]
