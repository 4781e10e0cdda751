"""What a stage does when its loss is not finite: leave the step out, then lower the rate, then stop.

The first time it goes back to its last checkpoint and leaves the step out, if its loop can. The second time it goes
back once more, with LOWERED times its learning rate. The third time it stops. `STAGE/setbacks.json` keeps this for
calls that resume.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from spice_dist.data.checksums import publish_sealed, read_sealed

FILE = "setbacks.json"
LOWERED = 0.1
MOST = 3  # setbacks after which a stage stops


@dataclass(frozen=True)
class Setbacks:
    """How often a stage's loss was not finite, and the step that it leaves out; 0: none."""

    count: int = 0
    left_out: int = 0

    @property
    def rate(self) -> float:
        """Return the factor on the learning rate."""
        return LOWERED if self.count > 1 else 1.0

    def after(self, step: int, can_leave_out: bool) -> "Setbacks":
        """Return what follows when the loss of `step` is not finite."""
        if self.count == 0 and can_leave_out:
            return Setbacks(1, step)
        return Setbacks(max(2, self.count + 1), self.left_out)


def read(stage: Path) -> Setbacks:
    """Read the setbacks of a stage; none if its folder has no record of any, or a damaged one."""
    try:
        return Setbacks(**read_sealed(stage / FILE))
    except (OSError, ValueError, TypeError):
        return Setbacks()


def write(stage: Path, setbacks: Setbacks) -> None:
    stage.mkdir(parents=True, exist_ok=True)
    publish_sealed(stage / FILE, asdict(setbacks))


def gave_up(stage: Path) -> bool:
    """Tell whether a stage has stopped because its loss was not finite, also with a lower rate."""
    return read(stage).count >= MOST
