"""Training, and what a run leaves behind.

In reading order: ``optimizer``; ``rundir``, ``dcp_reader``, ``checkpoint`` and ``resume`` are what is on disk;
``throughput``, ``trace`` and ``metrics`` what is seen while it runs; ``start`` is what is known before the first step
and ``flipproof train --dry-run``, ``step`` one step, ``loop`` ``flipproof train``, ``export`` ``flipproof export``.
"""
