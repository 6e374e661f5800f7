"""Backup and restore of a root: plan, create, verify, put back."""
