"""A trace of a few windows with `jax.profiler`, taken once everything has run at least once."""

from pathlib import Path

import jax

from fedrevive_jax.dfkd import due
from fedrevive_jax.simulation.simulator import Simulation

FOLDER = "profile"
WINDOWS = 3


class WindowTrace:
    """Traces `WINDOWS` windows of a simulation into a folder, for TensorBoard or Perfetto.

    Windows before the first distillation would show little, so the trace begins after it where the
    method distils, and after the first window otherwise.
    """

    def __init__(self, folder: Path, simulation: Simulation):
        self._folder, self._simulation = folder, simulation
        config = simulation.config
        distils = config.traits.distils
        self._after = due.warm_version(config, config.synthesises) if distils else 0
        self._first = simulation.position
        self._left = WINDOWS
        self.running = False

    def before_arrival(self) -> None:
        """To be called before each arrival is processed."""
        simulation = self._simulation
        if simulation.position not in simulation.window_starts:
            return
        if self.running:
            self._left -= 1
            if self._left == 0:
                self.close()
        elif (
            self._left == WINDOWS
            and simulation.position > self._first
            and simulation.server.version > self._after
        ):
            jax.profiler.start_trace(str(self._folder))
            self.running = True

    @property
    def taken(self) -> bool:
        """Whether there is a trace."""
        return self._left < WINDOWS

    def close(self) -> None:
        """Ends a trace that is under way, when the device is done with it."""
        if self.running:
            self._left = min(self._left, WINDOWS - 1)
            server = self._simulation.server
            jax.block_until_ready((server.params, server.method_state))
            jax.profiler.stop_trace()
            self.running = False
