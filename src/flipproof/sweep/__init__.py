"""A grid of faults, measured: ``plan`` says what a grid is and which point is next, ``grid`` makes one of a model and
a config, ``directory`` is what is left behind and shared, and ``run`` measures.
"""
