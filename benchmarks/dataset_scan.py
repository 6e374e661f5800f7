"""The pass over a large chat file - every check and the digest included - beside bare parsers.

python -m benchmarks.dataset_scan [--gigabytes 1.0] [--rounds 3] [--dir FOLDER]

Each arm runs in a process of its own, so that its peak memory is its own; the arms take turns. The parsers only parse
(and look at the roles, where they have an object to look at); none of them digests the file or finds what they skip.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._table import print_goal

# A person who drops a gigabyte waits hours for its training: the pass may take seconds, and needs no second mechanism.
SECONDS_GOAL, MEMORY_GOAL_MB = 15.0, 100.0

ARMS = {
    "dropforge": """
from daemon.dataset.validate import scan_dataset; from daemon.dataset.rows import Rules
---
rows = scan_dataset(path, Rules()).dataset.rows
""",
    "msgspec, line by line": """
decode = decoder.decode
---
for line in open(path, "rb", buffering=1 << 20): decode(line); rows += 1
""",
    "msgspec, decode_lines": """
rest = b""
---
with open(path, "rb", buffering=0) as file:
    while block := file.read(8 << 20):
        whole, _, rest_ = (rest + block).rpartition(b"\\n")
        rest = rest_; rows += len(decoder.decode_lines(whole))
""",
    "json": "import json\n---\nfor line in open(path, 'rb', buffering=1 << 20): check(json.loads(line)); rows += 1",
    "orjson": "import orjson\n---\nfor line in open(path, 'rb', buffering=1 << 20): check(orjson.loads(line)); rows += 1",
    "pyarrow": """
import pyarrow as pa, pyarrow.json as pj
message = pa.struct([("role", pa.string()), ("content", pa.string())])
options = pj.ParseOptions(explicit_schema=pa.schema([("messages", pa.list_(message))]), unexpected_field_behavior="ignore")
pa.set_cpu_count(1)
---
for batch in pj.open_json(path, parse_options=options, read_options=pj.ReadOptions(block_size=8 << 20, use_threads=False)):
    rows += batch.num_rows
""",
    "datasets": """
import datasets, tempfile; datasets.disable_progress_bars()
---
with tempfile.TemporaryDirectory() as cache:
    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache).num_rows
""",
}
PRELUDE = """
import os, sys, time
os.environ["HF_DATASETS_OFFLINE"] = "1"
from typing import Annotated, Literal
import msgspec
path, rows = sys.argv[1], 0
class Message(msgspec.Struct, gc=False):
    role: Literal["system", "user", "assistant", "tool"]
    content: str
class Row(msgspec.Struct, gc=False):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
decoder = msgspec.json.Decoder(Row)
def check(row):
    for message in row["messages"]:
        if message["role"] not in ("system", "user", "assistant", "tool") or type(message["content"]) is not str:
            raise ValueError
"""
CLOCK = "\nbegan, used = time.perf_counter(), sum(os.times()[:4])\n"  # stands where an arm has its line of dashes: imports are not timed
POSTLUDE = """
seconds, used = time.perf_counter() - began, sum(os.times()[:4]) - used
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, used, int(peak.split()[1]) / 1024, rows)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where the file is put (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        path = Path(name, "chat.jsonl")
        expected = write_chat(path, int(options.gigabytes * 1e9))
        results: dict[str, list[tuple[float, float, float]]] = {}
        for _ in range(options.rounds):
            for arm, code in ARMS.items():
                done = subprocess.run(
                    [sys.executable, "-c", PRELUDE + code.replace("\n---\n", CLOCK) + POSTLUDE, path],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode == 0:
                    seconds, used, peak, rows = done.stdout.split()[-4:]
                    assert int(rows) == expected, (arm, rows, expected)
                    results.setdefault(arm, []).append((float(seconds), float(used), float(peak)))
                else:
                    print(f"  {arm}: not measured: {done.stderr.strip().splitlines()[-1]}")
        size = path.stat().st_size
    print(
        f"The pass over {size / 1e9:.2f} GB of chat, {expected:,} rows, {os.cpu_count()} cores ({options.rounds} rounds)"
    )
    megabytes = size / 1e6
    rate = {arm: megabytes / statistics.median(run[0] for run in runs) for arm, runs in results.items()}
    work = {arm: megabytes / statistics.median(run[1] for run in runs) for arm, runs in results.items()}
    peak = {arm: max(run[2] for run in runs) for arm, runs in results.items()}
    bare, ours = "msgspec, line by line", "dropforge"
    print(f"  {'':<24}{'MB/s':>8}{'x bare':>8}{'MB/CPU s':>10}{'x bare':>8}{'peak MB':>9}")
    for arm in results:
        wall, cpu = (
            f"{rate[arm]:>8.0f}{rate[arm] / rate[bare]:>8.2f}",
            f"{work[arm]:>10.0f}{work[arm] / work[bare]:>8.2f}",
        )
        print(f"  {arm:<24}{wall}{cpu}{peak[arm]:>9.0f}")
    print("  the pass digests and checks everything as well, names unused keys, and makes the rows that training sees")
    print_goal("CPU seconds a gigabyte", value=1000 / work[ours], at_most=SECONDS_GOAL)
    print_goal("peak memory, MB", value=peak[ours], at_most=MEMORY_GOAL_MB)


def write_chat(path: Path, size_bytes: int) -> int:
    """Chat rows of about a kilobyte, no two alike, some text beyond ASCII, two keys that nobody reads; their number."""
    generator = random.Random(7)
    syllables = [
        "ka",
        "lo",
        "mi",
        "tra",
        "sen",
        "do",
        "par",
        "ing",
        "ter",
        "re",
        "con",
        "de",
        "ble",
        "ness",
        "al",
        "or",
        "un",
        "pre",
        "ma",
        "ti",
        "ve",
        "st",
        "li",
        "cu",
        "om",
    ]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(20_000)]
    words += [
        "caf\u00e9",
        "na\u00efve",
        "\u65e5\u672c\u8a9e",
        "don't",
        'say "hi"',
        "a\\b",
        "line\nbreak",
        "\U0001f600",
    ] * 25
    texts = []
    for number in range(40_000):
        text = " ".join(generator.choices(words, k=generator.randint(12, 60)))
        texts.append(json.dumps(text, ensure_ascii=number % 4 == 0)[1:-1])
    rows = written = 0
    with path.open("wb", buffering=1 << 22) as file:
        while written < size_bytes:
            first, second, third, fourth = generator.choices(texts, k=4)
            row = (
                f'{{"id": "ex-{rows:09}", "messages": [{{"role": "system", "content": "You are helpful."}}, '
                f'{{"role": "user", "content": "{first}"}}, {{"role": "assistant", "content": "{second} {third}"}}, '
                f'{{"role": "user", "content": "{fourth}"}}], "meta": {{"score": {generator.random():.4f}, "tags": ["a"]}}}}\n'
            ).encode()
            file.write(row)
            written += len(row)
            rows += 1
    return rows


if __name__ == "__main__":
    main()
