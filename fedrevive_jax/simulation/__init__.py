"""The simulated federation: clock, clients and server put together, planned and sized."""
