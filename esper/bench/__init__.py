"""Benchmarks of ``esper bench NAME``: each module has ``TITLE``, ``TARGETS`` and ``run``."""
