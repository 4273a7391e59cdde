"""A whole run: simulation and record, from the first arrival to the summary."""
