"""What a version has kept of what earlier ones had learned: measured on held-out rows, and judged before it is promoted.

values      what was measured, and the verdict; travels in a run's result and a version's record
settings    `[evaluation]` and `[gate]`, which a dropped file has no say in
statistics  the paired bootstrap, and the verdict that follows from it
budget      which datasets are scored this time, with how many rows
blend       which mixture of parent and candidate is accepted in place of a candidate that has lost something
scores      what each adapter scored on each row, beside the memories
evals       the administrator's evals, read from `evals/`; `checks` judges an answer
gate        what the daemon does with a verdict
matrix      versions by datasets: backward transfer, average, the worst cell

Pure but for `scores`, `evals` and `checks`; torch-free. The trainer computes the scores (`daemon.trainer.evaluation`).
"""
