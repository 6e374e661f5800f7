"""What is kept of trained datasets, beside the state: rows to rehearse, and rows held out to measure what was learned.

`state/memory/DIGEST/`, DIGEST the first half of the dataset's own, holds

| file             | what                                                                    | when it is missing             |
|------------------|-------------------------------------------------------------------------|--------------------------------|
| `meta.json`      | `DatasetMeta`: numbers, and digests of the files beside it; written last | nothing is known of the dataset |
| `rows.jsonl`     | trained rows, normalised: a uniform sample, smallest keyed hash first   | nothing of it is rehearsed     |
| `held_out.jsonl` | rows that were never trained, normalised                                | nothing of it is measured      |
| `held_out.idx`   | their digests, 16 bytes each: the registry is all of these together     | its rows may be trained        |
| `retired.idx`    | digests of earlier datasets' rows that this one took the place of       | it took none                   |

The trainer writes the folder into its run directory; the promotion moves it here, before the version becomes current. What a
run draws on are the datasets of its parent's line of versions, so that a rollback takes the memory along.
"""
