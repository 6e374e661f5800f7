"""`python -m daemon` is `dropforge`."""

from daemon.cli import main

if __name__ == "__main__":
    main()
