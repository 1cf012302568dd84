"""A laboratory: real QEMUs, a guest that can prove its memory, and the measuring of both.

The demo, the tests and the benchmark stand on it; nothing that migrates a VM does.
"""
