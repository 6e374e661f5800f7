"""Fingerprints, seals, verdicts: no run continues from a checkpoint that is not its own."""
