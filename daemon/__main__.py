"""`python -m daemon` is `dropforge`."""

from daemon.cli.main import main

if __name__ == "__main__":
    main()
