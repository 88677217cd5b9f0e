"""What faults do to a model, measured: arms side by side, each with its interval.

In reading order: ``intervals``, ``points`` and ``arms`` are the vocabulary; ``evaluate`` is ``flipproof eval`` on
text, ``tasks`` the same by lm-eval, whose ``answers`` may be kept; ``generate`` is ``flipproof generate`` and
``profile`` is ``flipproof profile``.
"""
