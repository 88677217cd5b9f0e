"""What faults do to a model, measured: arms side by side, each with its interval.

In reading order: ``intervals`` and ``arms`` are the vocabulary; ``perplexity`` is ``flipproof eval`` on text,
``harness`` and ``tasks`` the same by lm-eval, ``text`` is ``flipproof generate`` and ``magnitudes`` is
``flipproof profile``.
"""
