"""Names of environment variables that several of our processes read.

A module of its own because the command must start quickly: it imports nothing.
"""

#: Of a process and of those that it starts: debug, info, warning, error.
LOG_LEVEL_VARIABLE = "QPOSTCOPY_LOG_LEVEL"
