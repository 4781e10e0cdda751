"""Adapt Ray's TorchTrainer: use the network of the Ray node, and start no needless processes."""

import os
import socket
from dataclasses import dataclass

import psutil
import ray.util
from ray.train.torch import TorchTrainer
from ray.train.torch.config import TorchConfig, _TorchBackend

# Of Ray 2.60. A version that has others is looked at before it is used: a callback can be a process more, or decide
# what follows a loss.
NEEDLESS = {"DatasetsCallback"}  # hands out Ray's data sets; there are none
CLEANER = "PlacementGroupCleanerCallback"  # gives back what a lost controller has reserved
KNOWN = {
    *NEEDLESS,
    CLEANER,
    "AcceleratorSetupCallback",  # shows each worker the GPUs of its node
    "BackendSetupCallback",  # starts the process group: `OnNodeAddress`
    "WorkingDirectorySetupCallback",
    "UserCallbackHandler",  # calls those of the user; there are none
    "NCCLRASCallback",  # finds collectives that do not end; with GPUs: ray_train.NCCL_SETTINGS
    # off by ray_train.RAY_SETTINGS, or by default
    "ControllerMetricsCallback",
    "WorkerMetricsCallback",
    "PreemptionCallback",  # ray_pulse.Watch looks for nodes that leave
    "StateManagerCallback",
    # parts of Ray's controller
    "CheckpointManager",
    "ReportCallbackHandler",
    "ValidationManager",
    "ElasticScalingPolicy",
    "FixedScalingPolicy",
    "ScalingPolicy",
}


class Trainer(TorchTrainer):
    """Starts fewer processes beside the workers: each imports for seconds and then wakes 100 times a second."""

    cleans_up = True  # after a lost controller; needless on a cluster that ends with it

    # Ray's own method; where a version has renamed it, the processes start again
    def _create_default_callbacks(self) -> list:
        needless = NEEDLESS if self.cleans_up else {*NEEDLESS, CLEANER}
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in needless]


@dataclass
class OnNodeAddress(TorchConfig):
    """Ray's TorchConfig, which also names the interface that carries the Ray node's address.

    gloo and NCCL would choose among a host's interfaces themselves.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group, backend_config: TorchConfig) -> None:
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Set the variables in which gloo and NCCL read their interface, unless the user has."""
    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """Return the interface that has this IPv4 or IPv6 address."""
    kinds = (socket.AF_INET, socket.AF_INET6)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family in kinds and entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None
