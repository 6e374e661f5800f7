"""Whatever bytes the readers of files meet: `make fuzz` looks for odd ones, `make test` reads those that were kept."""
