"""What the daemon reports: log, journal, metrics, status file."""
