"""`python -m daemon.dataset serve PARENT_PID`: reads requests and writes replies, one JSON object a line.

What a hostile file may do to a parser, it does here.
"""

from __future__ import annotations

import resource
import sys

from daemon.dataset.requests import Reply, Request, answer
from daemon.job import from_json, to_json
from daemon.processes import die_with_parent

MEMORY_LIMIT_BYTES = 4 * 2**30  # of the address space: a row that needs more is an error, not a dead machine


def main(arguments: list[str]) -> int:
    """`serve PARENT_PID`: requests on stdin, replies on stdout, until stdin ends."""
    if len(arguments) != 2 or arguments[0] != "serve":
        print("usage: python -m daemon.dataset serve PARENT_PID", file=sys.stderr)
        return 2
    die_with_parent(int(arguments[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))

    def send(reply: Reply) -> None:
        sys.stdout.write(to_json(reply) + "\n")
        sys.stdout.flush()

    for line in sys.stdin.buffer:
        send(answer(from_json(line, Request), send))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
