"""The benchmark: this engine beside QEMU's own migration, in one run (docs/benchmarks.md)."""
