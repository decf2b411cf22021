"""One tiny run, as one process or one of several: `python -m tests.processes FOLDER`; each leaves what it ends with."""

import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from tests import runs

ROWS_A_STEP = 4


def main(folder: Path) -> None:
    processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    run = runs.trainer(
        folder,
        runs.config(**runs.LATE),
        per_device_train_batch_size=ROWS_A_STEP // processes,
        ddp_find_unused_parameters=False,
    )
    run.train()
    decision = runs.callback_of(run).learner.attachment.decision()
    save_file(runs.adapter(run), folder / f"adapter-{rank}.safetensors")
    save_file(decision, folder / f"decision-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
