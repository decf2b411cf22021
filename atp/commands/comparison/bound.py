"""`python -m atp.commands.comparison.bound PID ...`: `atp ...`, which ends when its parent, process PID, is gone.

A comparison that is killed outright cannot end its runs: they would go on writing to folders that the next try uses.
"""

import os
import runpy
import signal
import sys
import threading
import time

SECONDS_BETWEEN_LOOKS = 1.0


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv.pop(1)),), daemon=True).start()
    runpy.run_module("atp", run_name="__main__", alter_sys=True)
