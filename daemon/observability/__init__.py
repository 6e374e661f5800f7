"""What the daemon tells: log, journal, metrics, status file."""
