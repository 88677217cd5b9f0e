"""The flip operation: counter RNG, Poisson parity, the reference that defines it, and the custom op."""
