"""`python -m rankwise.experiments.cli` is the command `rankwise`."""

from rankwise.experiments.cli import main

if __name__ == "__main__":
    main()
