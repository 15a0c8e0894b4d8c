"""Runs in both processes of a launch: the second one is killed while the last checkpoint is written.

accelerate launch --config_file FILE --num_processes 2 tests/lost_process.py OUT
"""

import os
import signal
import sys
from pathlib import Path

from resume_engines import make

SGD = {"optim": "sgd", "learning_rate": 0.1}


def main(out: Path) -> None:
    trainer = make(out, None, **SGD)
    write = trainer._save_rng_state

    def write_or_die(folder):
        if trainer.state.global_step == trainer.state.max_steps and trainer.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder)

    trainer._save_rng_state = write_or_die
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
