"""The `qpostcopy` command: one module for each verb."""
