"""A dropped file's rows: what they may look like, and one pass that checks them all."""
