"""`python -m qpostcopy.bench`, which is what scripts/bench runs."""

from qpostcopy.bench.cli import entry

if __name__ == "__main__":
    entry()
