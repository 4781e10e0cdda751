"""How many workers run when: the choice of a size, what a loss and a returning node do. Real clusters: tests/slurm."""

import importlib
import inspect
import json
import pkgutil
import socket
from pathlib import Path

import pytest
import ray.train.v2
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.nccl_ras import NCCLRASCallback
from ray.train.v2._internal.execution import callback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.exceptions import NCCLHangError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from spice_dist.cli import parser
from spice_dist.config import override
from spice_dist.distributed import ray_channel, ray_elastic, ray_nodes, ray_train, ray_trainer
from spice_dist.distributed.ray_train import Job, WorkersLost
from spice_dist.distributed.worker import StageCall
from spice_dist.errors import Interrupted, UserError
from spice_dist.launching import Launch, plan
from spice_dist.recipes import digits
from spice_dist.task import Task

SIZES = (1, 2, 4)


class Cluster:
    """In place of Ray: `free` seats, and groups that end as told; `ran` are their sizes."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.free, self.ran, self.ends = 4, [], []
        self.stop = False
        stages = tuple(StageCall(name, lambda *_: None, Task(), None) for name in ("moco", "features", "spice_semi"))
        self.said: list[str] = []
        self.job = Job(stages, tmp_path, 1, lambda: self.stop, print, self.said.append)
        for folder in ("moco/checkpoints", "spice_semi/checkpoints", ".ray"):
            (tmp_path / folder).mkdir(parents=True)
        monkeypatch.setattr(ray_nodes, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(ray_nodes, "kind_of_seat", lambda: "CPU")
        monkeypatch.setattr(ray_nodes, "room_in_words", lambda: "each needs 1 CPU")
        monkeypatch.setattr(ray_nodes, "free_seats", lambda: self.free)
        monkeypatch.setattr(ray_nodes, "seats", lambda: 4)
        monkeypatch.setattr(ray_elastic, "run_group", self.run_group)

    def run_group(self, job: Job, workers: int, leave) -> bool:
        self.ran.append(workers)
        return self.ends.pop(0)(leave)

    def reaches(self, stage: str, loss: float | None = 1.0) -> None:
        (self.job.run / ray_channel.PROGRESS).write_text(json.dumps([stage, 3, 7, loss]))

    def loses(self, free: int, step: int | None, stage: str = "moco"):
        """A group that ends when only `free` seats are left, after saving `step`."""

        def end(leave) -> bool:
            self.free = free
            if step is not None:
                (self.job.run / f"{stage}/checkpoints/{step:09d}").mkdir()
            raise WorkersLost("killed")

        return end


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def test_after_losses_the_largest_size_with_room_goes_on(cluster):
    cluster.ends = [cluster.loses(3, 10), cluster.loses(1, 20), lambda leave: True]
    ray_elastic.train(cluster.job, SIZES)
    assert cluster.ran == [4, 2, 1]


def test_losses_without_a_new_checkpoint_end_the_run(cluster):
    cluster.ends = [cluster.loses(4, 10), *(cluster.loses(4, None) for _ in range(9))]
    with pytest.raises(WorkersLost, match="killed"):
        ray_elastic.train(cluster.job, SIZES)
    assert len(cluster.ran) == 1 + ray_elastic.ATTEMPTS


def test_a_checkpoint_of_a_later_stage_counts_as_progress(cluster):
    once = [cluster.loses(4, None), cluster.loses(4, None)]
    cluster.ends = [*once, cluster.loses(4, 10), *once, cluster.loses(4, 5, "spice_semi"), *once, lambda leave: True]
    ray_elastic.train(cluster.job, SIZES)
    assert len(cluster.ran) == 9


def test_a_group_leaves_for_a_larger_one_once_two_looks_find_room(cluster):
    cluster.free = 2
    answers = []

    def grows(leave) -> bool:
        cluster.reaches("moco")
        cluster.free = 1
        answers.extend([leave(), leave()])  # two busy seats and one free: no larger divisor
        cluster.free = 2
        answers.extend([leave(), leave()])
        cluster.free = 4
        return False

    cluster.ends = [grows, lambda leave: True]
    ray_elastic.train(cluster.job, SIZES)
    assert answers == [False, False, False, True]
    assert cluster.ran == [2, 4]


def test_a_group_that_is_starting_does_not_take_its_own_seats_for_free_ones(cluster):
    growth = ray_elastic._Growth(cluster.job, SIZES, 2)
    assert [growth.possible() for _ in range(3)] == [False] * 3
    cluster.reaches("moco")
    assert [growth.possible() for _ in range(2)] == [False, True]


def test_a_group_does_not_leave_a_stage_that_does_not_save(cluster):
    growth = ray_elastic._Growth(cluster.job, SIZES, 2)
    cluster.reaches("features", None)
    assert [growth.possible() for _ in range(3)] == [False] * 3
    cluster.reaches("spice_semi")
    assert [growth.possible() for _ in range(2)] == [False, True]


def test_asked_to_stop_it_does_not_start_again(cluster):
    def stopped(leave) -> bool:
        cluster.stop = True
        return False

    cluster.ends = [stopped]
    with pytest.raises(Interrupted):
        ray_elastic.train(cluster.job, SIZES)


@pytest.mark.parametrize("sizes", [(2, 4), (2,)], ids=["elastic", "fixed"])
def test_without_room_for_the_smallest_group_it_says_what_it_waits_for_and_then_ends(cluster, monkeypatch, sizes):
    cluster.free = 1
    monkeypatch.setattr(ray_elastic, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(ray_nodes, "SAY_SECONDS", 0.02)
    with pytest.raises(UserError, match="at least 2"):
        ray_elastic.train(cluster.job, sizes)
    assert cluster.ran == []
    assert cluster.said[0] == "no room for 2 workers: each needs 1 CPU; waiting 0 s more"
    assert 2 <= len(cluster.said) <= 4, "one line an interval"


def test_a_group_of_fixed_size_is_started_again_as_long_as_that_brings_the_job_on(cluster, monkeypatch):
    monkeypatch.setattr(ray_train, "_cluster_is_ours", True)  # where Ray itself has replaced the workers three times
    cluster.ends = [cluster.loses(4, 10), cluster.loses(4, 20), cluster.loses(4, None)]
    with pytest.raises(WorkersLost, match="killed"):
        ray_elastic.train(cluster.job, (2,))
    assert cluster.ends == []


def test_more_workers_than_the_cluster_has_seats_are_refused_at_once(cluster):
    with pytest.raises(UserError, match="--workers is 8, but Ray has 4 CPUs for them"):
        ray_elastic.train(cluster.job, (8,))


def test_a_group_left_by_a_node_that_goes_is_followed_by_one_of_the_size_that_has_room(cluster):
    cluster.ends = [lambda leave: bool(setattr(cluster, "free", 1)), lambda leave: True]  # saved and stopped; done
    ray_elastic.train(cluster.job, SIZES)
    assert cluster.ran == [4, 1]


@pytest.mark.parametrize(("deadline", "when"), [(0, "soon"), (2_000_000_060_000, "in 60 s")])
def test_nodes_that_leave_are_no_room_and_are_named_if_workers_are_on_them(monkeypatch, deadline, when):
    nodes = [
        {"NodeID": each, "NodeManagerHostname": each, "Alive": True, "Resources": {"CPU": 2.0, "GPU": gpus}}
        for each, gpus in (("a", 2.0), ("b", 1.0), ("c", 4.0))
    ]
    monkeypatch.setattr(ray_nodes, "_alive", lambda: nodes)
    monkeypatch.setattr(ray_nodes, "_answers", lambda node: True)
    monkeypatch.setattr(ray_nodes, "_draining", lambda: {"b": deadline, "gone": 0})
    monkeypatch.setattr(ray_nodes, "kind_of_seat", lambda: "GPU")
    monkeypatch.setattr(ray_nodes.time, "time", lambda: 2_000_000_000.0)
    assert ray_nodes.seats() == 2 + 2, "each GPU needs a CPU"
    assert ray_nodes.leaving({"a", "b"}) == [f"node b leaves {when}"]
    assert ray_nodes.leaving({"a", "c"}) == []


@pytest.mark.parametrize(
    ("groups", "wanted", "sizes"),
    [(4, 2, (2,)), (4, (1, 8), (1, 2, 4)), (6, (2, 5), (2, 3)), (4, (3, 4), (4,)), (4, 0, (0,))],
)
def test_sizes_divide_the_groups_of_a_batch(groups, wanted, sizes):
    assert plan(override(digits(), {"bn_groups": groups}), Launch(wanted, threads=1)) == (sizes, 1)


@pytest.mark.parametrize("wanted", [3, -1, (3, 3), (5, 8)])
def test_a_number_that_divides_nothing_is_refused(wanted):
    with pytest.raises(UserError, match="divisor of 4"):
        plan(override(digits(), {"bn_groups": 4}), Launch(wanted))


def test_the_option_takes_a_number_or_a_range(capsys):
    def parsed(text: str):
        return parser().parse_args(["fit", "digits", "--workers", text]).workers

    assert (parsed("3"), parsed("2:8")) == (3, (2, 8))
    for text in ("8:2", "0:2", "2:", "many"):
        with pytest.raises(SystemExit):
            parsed(text)
        assert "--workers" in capsys.readouterr().err


def test_the_interface_of_an_address_is_found():
    assert ray_trainer.interface_of("127.0.0.1") == "lo"
    assert ray_trainer.interface_of("192.0.2.199") is None


def test_on_a_cluster_that_we_have_joined_ray_waits_for_no_lost_node_and_for_no_drained_one(monkeypatch):
    monkeypatch.setattr(ray_train, "_cluster_is_ours", False)
    drained = PreemptionError(PreemptionInfo(None, {"node": [1]}))
    killed = WorkerGroupError("killed", {1: RayActorError()})
    by_default = ray.train.FailureConfig(max_failures=0)
    assert create_failure_policy(by_default).make_decision(drained) == FailureDecision.RETRY, "Ray's count of its own"
    for error in (drained, killed):
        assert create_failure_policy(ray_train.failure_config()).make_decision(error) == FailureDecision.RAISE
    monkeypatch.setattr(ray_train, "_cluster_is_ours", True)
    ours = create_failure_policy(ray_train.failure_config())
    assert [ours.make_decision(killed) for _ in range(4)] == [*[FailureDecision.RETRY] * 3, FailureDecision.RAISE]


OTHER_FRAMEWORKS = ("examples", "horovod", "jax", "lightgbm", "tensorflow", "xgboost")


def callbacks_of_ray() -> set[str]:
    """The callbacks that Ray Train has for its controller and its workers; not the classes that they derive from."""
    found = set()
    for module in pkgutil.walk_packages(ray.train.v2.__path__, "ray.train.v2."):
        if module.name.split(".")[3] not in OTHER_FRAMEWORKS:
            for name, each in vars(importlib.import_module(module.name)).items():
                if isinstance(each, type) and issubclass(each, RayTrainCallback) and each.__module__ == module.name:
                    found.add(name)
    bases = {name for name, each in vars(callback).items() if isinstance(each, type)}
    return found - bases - {"RayTrainCallback", "UserCallback"}


def test_the_installed_ray_has_no_callback_that_our_trainer_does_not_know():
    assert callbacks_of_ray() == ray_trainer.KNOWN


def test_our_trainer_leaves_out_of_rays_callbacks_only_those_that_it_names(monkeypatch):
    for name, value in ray_train.RAY_SETTINGS.items():
        monkeypatch.setenv(name, value)
    trainer = ray_trainer.Trainer(lambda: None, scaling_config=ray.train.ScalingConfig(num_workers=2))
    of_ray = {type(each).__name__ for each in TorchTrainer._create_default_callbacks(trainer)}
    used = {}
    for trainer.cleans_up in (True, False):
        used[trainer.cleans_up] = {type(each).__name__ for each in trainer._create_default_callbacks()}
    assert of_ray - used[True] == ray_trainer.NEEDLESS
    assert of_ray - used[False] == {*ray_trainer.NEEDLESS, ray_trainer.CLEANER}
    assert used[True] == {
        *("AcceleratorSetupCallback", "BackendSetupCallback", "WorkingDirectorySetupCallback", "UserCallbackHandler"),
        ray_trainer.CLEANER,
    }


def test_on_gpus_rays_detector_of_hanging_collectives_is_on_and_ends_the_group(monkeypatch):
    for name, value in (ray_train.RAY_SETTINGS | ray_train.NCCL_SETTINGS).items():
        monkeypatch.setenv(name, value)
    trainer = ray_trainer.Trainer(lambda: None, scaling_config=ray.train.ScalingConfig(num_workers=2))
    (detector,) = [each for each in trainer._create_default_callbacks() if isinstance(each, NCCLRASCallback)]
    assert (detector._action, detector._confirm_duration_s) == ("fail", 300)


def test_what_rays_detector_finds_is_one_line():
    found = "1 of 2 communicators have a collective mismatch and made no progress for 300 seconds (20 polls). This ..."
    error = NCCLHangError(f"{found}\nTo debug:\n  - Read the report\n", {})
    with pytest.raises(WorkersLost, match=r"^the training workers failed: 1 of 2 .* for 300 seconds \(20 polls\)$"):
        ray_train._is_done(error)


def test_ray_starts_the_process_group_by_the_method_that_we_extend():
    assert list(inspect.signature(_TorchBackend.on_start).parameters) == ["self", "worker_group", "backend_config"]


def test_a_node_whose_daemon_is_gone_does_not_count():
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": server.getsockname()[1]}
        assert ray_nodes._answers(node)
    assert not ray_nodes._answers(node)


def test_a_node_reports_whether_it_shares_the_folder(tmp_path):
    path, text = ray_nodes._leave_mark(tmp_path)
    good = ray_nodes.report_of_this_node(path, text)
    assert (good.problem, good.free > 0) == ("", True)
    assert "another folder" in ray_nodes.report_of_this_node(path, "other").problem
    path.unlink()
    assert "No such file" in ray_nodes.report_of_this_node(path, text).problem
    assert list(tmp_path.iterdir()) == []
