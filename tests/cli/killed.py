"""The command line, in which rank 1 is killed before its eighth step, unless torchrun has started it anew."""

import os
import signal

from torchnewton.cli import main
from torchnewton.train import loop

train_step = loop.train_step


def step(run: loop.Run) -> None:
    """A step, or the end."""
    if run.step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    train_step(run)


loop.train_step = step
main()
