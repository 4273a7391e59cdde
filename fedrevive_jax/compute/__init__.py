"""Where a run computes, and with what randomness: devices, processes, keys, pytrees."""
