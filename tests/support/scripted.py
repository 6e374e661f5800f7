"""A trainer for the executors' tests: does what `script` in its run directory says."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from daemon.trainer.attempt import exit_process


class Library:
    """Aborts the process when the interpreter goes down."""

    def __del__(self, abort: Callable[[], None] = os.abort) -> None:
        abort()


def act(run_dir: Path) -> int:
    script = json.loads((run_dir / "script").read_text())
    print("a line for the log", flush=True)
    facts = {"pid": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0), "stdin": sys.stdin.read()}
    if script.get("child"):
        child = subprocess.Popen(["sleep", "1000"])
        facts["child"] = child.pid
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    beside = run_dir / ".facts"
    beside.write_text(json.dumps(facts))
    beside.rename(run_dir / "facts")
    while script.get("wait") and not asked:
        time.sleep(0.01)
    if asked:
        return 75
    if script.get("farewell"):  # as a library that reports runs elsewhere
        atexit.register((run_dir / "registered").write_text, "done")
        threading.Timer(0.2, (run_dir / "awaited").write_text, ["done"]).start()
    if script.get("abort"):
        sys.library = Library()  # type: ignore[attr-defined]
    if script.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if script.get("raise"):
        raise ValueError("as scripted")
    return int(script.get("code", 0))


if __name__ == "__main__":
    exit_process(lambda: act(Path(sys.argv[1])))
