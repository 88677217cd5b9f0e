"""Text to packed token sequences.

In reading order: ``document`` says which part of a text is held out, ``tables`` and ``source`` what a name in the
config stands for, ``packing`` how text becomes tokens in a file, ``sequences`` which of these make up which batch.
"""
