"""Post-copy live migration for stock QEMU."""

__version__ = "0.1.0"
