"""What flips, and how: the draw, the operators that carry it out, the layers that suffer it, their injection.

In reading order: ``spec`` says what may flip, in which ``dtypes``; ``philox``, ``poisson``, ``guard`` and ``draw``
define the draw; ``cpu``,
``triton_kernels`` with ``triton_launch``, and ``memory`` (all but new, independent flips) carry it out; ``op`` makes
them PyTorch operators; ``state`` is what the faulty modules of a model share, ``linear``, ``embedding`` and
``attention`` are these modules, ``ties`` and ``matching`` what ``inject`` needs beside them to swap them in;
``flip_log`` logs flips and replays them.
"""
