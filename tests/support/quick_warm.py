"""A fork server whose trainers are the scripted ones of the executors' tests; imports nothing that takes time."""

from __future__ import annotations

from daemon.trainer.warm import main
from tests.support.scripted import act

if __name__ == "__main__":
    main(act, lambda base: None)
