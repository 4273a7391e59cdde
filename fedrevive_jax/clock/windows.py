"""Windows: jobs that can be trained together because their starting versions exist by then."""

import heapq
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from fedrevive_jax.clock.schedule import Schedule


@dataclass(frozen=True)
class Window:
    """Jobs that are trained together.

    Attributes:
      first_arrival: index of the arrival before which the jobs must be trained.
      jobs: int array, job numbers in the order of their arrival.
    """

    first_arrival: int
    jobs: np.ndarray


def plan_windows(
    schedule: Schedule,
    limit: int = 0,
    start: int = 0,
    *,
    trained: Collection[int] = (),
    end: int | None = None,
) -> list[Window]:
    """Groups jobs so that each group can be trained in one batched call, exactly.

    Walk the arrivals; when the next one belongs to a job that is not trained yet, train every job
    in flight that is not trained yet: all versions they start from exist by then. Jobs that never
    arrive are not trained. The result is the same, update for update, as training one at a time in
    calls of the same size; calls of another size round differently.

    Args:
      schedule: the virtual clock's plan.
      limit: most jobs in a window, those that arrive first; 0 is no limit.
      start: arrivals before this one are processed already.
      trained: jobs in flight at `start` that have been trained.
      end: no window begins at this arrival or later; None is the end of the plan.
    """
    windows = []
    waiting: list[int] = []  # arrival indices of jobs in flight that are not trained yet
    done = np.zeros(schedule.num_arrivals, bool)
    done[schedule.arrival_of_job[list(trained)]] = True
    handed_out = 0
    for arrival in range(start, min(schedule.num_arrivals, end or schedule.num_arrivals)):
        started = schedule.jobs_started[arrival - 1] if arrival else schedule.initial_jobs
        for index in schedule.arrival_of_job[handed_out:started]:
            if index >= start and not done[index]:
                heapq.heappush(waiting, int(index))
        handed_out = started
        if not done[arrival]:
            count = min(limit or len(waiting), len(waiting))
            arrivals = [heapq.heappop(waiting) for _ in range(count)]
            done[arrivals] = True
            windows.append(Window(arrival, schedule.job[arrivals]))
    return windows
