"""Continuous training by dropping files: the long-running process."""
