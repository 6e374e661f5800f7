"""A fork server whose trainers are the scripted ones of the executors' tests; imports nothing that takes time."""

from __future__ import annotations

import os
import threading

from daemon.trainer.fork_server import main
from tests.support.scripted import act


def load(base: str) -> None:
    """As a library that starts a thread when it is imported, if asked to."""
    if os.environ.get("QUICK_WARM_THREAD"):
        threading.Thread(target=threading.Event().wait, daemon=True).start()


if __name__ == "__main__":
    main(act, load)
