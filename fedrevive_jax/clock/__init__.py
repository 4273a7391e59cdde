"""The virtual clock: who works when, from which version, in NumPy alone."""
