"""A grid of faults, measured: ``order`` says what a grid is and which trial is next, ``table`` makes one of a model and
a config, ``store`` is what is left behind and shared, and ``run`` measures.
"""
