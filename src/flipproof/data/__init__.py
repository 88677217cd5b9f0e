"""Text to packed token sequences.

In reading order: ``document`` says which part of a text is held out, ``tables``, ``folders`` and ``source`` what the
config's data stand for, ``chunks`` and ``packing`` how text becomes tokens in a file, ``sequences`` which of these make
up which batch.
"""
