"""`python -m qpostcopy`: the command, without needing it on the PATH."""

from qpostcopy.cli.main import entry

entry()
