"""Training, and what a run leaves behind.

In reading order: ``optimizer``; ``rundir``, ``dcp_reader``, ``checkpoint`` and ``resume`` are what is on disk;
``throughput``, ``trace``, ``trackers`` and ``metrics`` what is seen while it runs; ``loop`` is ``flipproof train``,
``export`` ``flipproof export``.
"""
