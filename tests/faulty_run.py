"""
One `mars-hf train` that `test_faults.py` starts: HOW IT DIES, then the arguments of `mars-hf`.

It dies by SIGKILL in its second checkpoint: "in-optimizer" while the state of the optimizer is written, "in-state"
while the last file is; "not" leaves it alone. SIGTERM is obeyed at once: transformers waits 3 s for a SIGKILL.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerState
from transformers.trainer_jit_checkpoint import CheckpointManager

from mars_hf.cli import main


def die_halfway(path: str, seen: list[str]) -> None:
    """At the second call, leave half of a file and die."""
    seen.append(path)
    if len(seen) == 2:
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_optimizer() -> None:
    save, seen = torch.save, []

    def save_or_die(value, file, *args, **kwargs):
        save(value, file, *args, **kwargs)
        if str(file).endswith("optimizer.pt"):
            die_halfway(file, seen)

    torch.save = save_or_die


def die_in_the_state() -> None:
    save, seen = TrainerState.save_to_json, []

    def save_or_die(self, path):
        save(self, path)
        die_halfway(path, seen)

    TrainerState.save_to_json = save_or_die


if __name__ == "__main__":
    torch.set_num_threads(1)
    CheckpointManager.__init__.__defaults__ = (0,)
    {"in-optimizer": die_in_the_optimizer, "in-state": die_in_the_state, "not": lambda: None}[sys.argv[1]]()
    sys.argv = ["mars-hf", *sys.argv[2:]]
    main()
