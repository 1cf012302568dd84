"""Placeholder until scripts/bench limits lands."""

from qpostcopy.qmp.schema import Model


class Limits(Model):
    """What the machine can do at best."""
