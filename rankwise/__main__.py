"""`python -m rankwise` is the command `rankwise`, as `torchrun -m rankwise` needs it."""

from rankwise.experiments.cli import main

if __name__ == "__main__":
    main()
