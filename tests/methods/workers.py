"""Processes that train a stage together, by gloo; kept from one test to the next, since they start in seconds."""

import functools
import multiprocessing
import socket
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spice_dist import baselines, outer_stages
from spice_dist.data import images
from spice_dist.data.sources import open_source
from spice_dist.distributed import pace
from spice_dist.distributed.worker import LocalWorker
from spice_dist.methods import features, reliable
from spice_dist.stages import stages_of
from tests.methods.conftest import CPU, TRAIN


def on_workers(world: int, config: Any, run: Path, stage: str) -> None:
    """Do a stage of the run on so many workers, of one thread each; that of packing gets (folder, options)."""
    try:
        _group(world).train(config, run, stage)
    except BaseException:  # some may still wait for one that failed
        _group(world).kill()
        _group.cache_clear()
        raise


class GlooWorker(LocalWorker):
    """A worker of a gloo process group."""

    def __init__(self, run: Path, stage: str):
        super().__init__(run, stage, CPU)

    def wrap(self, module: nn.Module) -> nn.Module:
        wrapped = nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
        pace.time_averaging(wrapped)
        return wrapped


class Group:
    def __init__(self, world: int):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        pipes = [context.Pipe() for _ in range(world)]
        self.ours = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def train(self, config: Any, run: Path, stage: str) -> None:
        for pipe in self.ours:
            pipe.send((config, run, stage))
        for pipe in self.ours:
            assert pipe.poll(120), "a worker did not end"
            error = pipe.recv()
            assert not error, error

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


_group = functools.cache(Group)


def _serve(rank: int, world: int, port: int, requests: Connection) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    while True:
        config, run, stage = requests.recv()
        try:
            worker = GlooWorker(run, stage)
            if stage == "features":
                features.embed(config, None, worker)
            elif stage == "reliable":
                reliable.select(config, config.reliable, worker)
            elif stage == "data":
                folder, options = config
                outer_stages.packing(None, open_source(folder), options).run(worker, 1)
            elif stage == "evaluate":
                images.CHUNK = baselines.CHUNK = 80  # three parts of 200 images
                outer_stages.evaluation(config, stages_of(config)[-1].name).run(worker, 1)
            else:
                TRAIN[stage](config, worker)
            torch.distributed.barrier()  # the first may still be writing what the stage leaves
        except Exception:
            requests.send(traceback.format_exc())
        else:
            requests.send("")
