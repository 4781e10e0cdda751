"""What another busy program costs a training step on CPU, by how long torch's idle threads spin before they sleep.

    python -m tests.bench.bench_spinning [--seconds 20]

A step of a ResNet-18 on 16 images of 64 px, with all cores: one process alone, then two at the same time, for several
GOMP_SPINCOUNT; "none" is libgomp's default. Two that share the cores fairly take twice the time of one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

COUNTS = (None, 100_000, 30_000, 10_000, 3_000, 1_000, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        print(1000 * step_seconds(options.seconds))
        return
    print(f"{'spin count':<12}{'alone ms':>10}{'two ms':>10}{'ratio':>8}")
    for count in COUNTS:
        (alone,), two = (processes(number, count, options.seconds) for number in (1, 2))
        slower = statistics.mean(two)
        name = "none" if count is None else str(count)
        print(f"{name:<12}{alone:>10.0f}{slower:>10.0f}{slower / alone:>8.1f}", flush=True)


def processes(number: int, count: int | None, seconds: float) -> list[float]:
    """Milliseconds a step of each of these processes, started together."""
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    if count is not None:
        environment["GOMP_SPINCOUNT"] = str(count)
    command = [sys.executable, "-m", "tests.bench.bench_spinning", "--train", "--seconds", str(seconds)]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(number)]
    return [float(process.communicate()[0]) for process in started]


def step_seconds(seconds: float) -> float:
    """The median of the steps that end in this time. Imports nothing of spice_dist, which sets the spin count."""
    import torch
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18().to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    took, end = [], time.perf_counter() + seconds
    while len(took) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        net(images).sum().backward()
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


if __name__ == "__main__":
    main()
