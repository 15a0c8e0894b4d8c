"""Runs in every process of a launch (or alone) and saves the results. OUT contains saved `rows` and `scored rows`.

python tests/every_engine.py OUT                                                          # one process
accelerate launch --config_file FILE --num_processes 2 tests/every_engine.py OUT [fsdp2|zero]   # two
"""

import os
import sys
from pathlib import Path

import engine_cells
import resume_engines
import torch
import two_processes
import two_processes_policy
import two_processes_sampling
import two_processes_storage


def main(out: Path, engine: str | None = None) -> None:
    if engine == "fsdp2":
        two_processes.make_fsdp2_real()
    results = two_processes.runs(out, engine) | two_processes_policy.runs(out, engine)
    # A cell of the engine matrix, since the matrix is not part of the test suite.
    results["reward model"] = engine_cells.run("BradleyTerry/full/plain/packed", out / "reward model", engine)
    results["stored"] = two_processes_storage.runs(out, engine)
    results["generated"] = two_processes_sampling.generating_runs(out, engine)
    if "WORLD_SIZE" in os.environ:
        results["resumed"] = resume_engines.resumed(out, engine)
        results["online"] = two_processes_sampling.online_runs(out, engine)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(results, out / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
