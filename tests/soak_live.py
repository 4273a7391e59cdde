"""A live run of kills: python -m tests.soak_live [--minutes=60] [--every=40] [--seed=0] [--out=D].

Three clients on this machine, of different speed. About every so many seconds something random is
killed: a trainer, a SuperNode, Flower's process of a message, rarely the SuperLink or the server's
process. At the end the run is asked to stop, and its record is judged: every upload counted once,
every version made by one of them, nothing left in flight, no process left. Prints the kills, the
arrivals, and the memory of the server's process by its age; ends with status 1 if anything was not
as it should be.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from fedrevive_jax.record import files
from tests.live_run import SMALL, arrivals, newest_checkpoint, processes, start, wait_for

CLIENTS = 3
# What is killed: words of its command, and how often in a hundred kills.
VICTIMS = {
    "a trainer": (("live.trainer",), 30),
    "a SuperNode": (("flower-supernode",), 30),
    "the process of a message": (("flwr-clientapp",), 30),
    "the SuperLink": (("flower-superlink",), 4),
    "the server's process": (("flwr-serverapp",), 6),
}


def kill_one(generator: random.Random, state: Path) -> str | None:
    """Kills one process of this run; says what it was."""
    name = generator.choices(list(VICTIMS), [share for _, share in VICTIMS.values()])[0]
    words, _ = VICTIMS[name]
    ours = [pid for pid in processes(*words) if is_of(pid, state)]
    if not ours:
        return None
    os.kill(generator.choice(ours), signal.SIGKILL)
    return name


def is_of(pid: int, state: Path) -> bool:
    """Whether a process belongs to this run: told by its environment or its command."""
    try:
        told = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return str(state).encode() in told


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def problems(run: Path, state: Path) -> list[str]:
    """What is wrong with a record that was written under kills."""
    rows = files.read_rows(run / "arrivals.jsonl")
    found = []
    if [row["index"] for row in rows] != list(range(len(rows))):
        found.append("the arrivals are not numbered one by one")
    if [row["version"] for row in rows] != list(range(len(rows))):
        found.append("an upload made no version, or two")
    if any(row["staleness"] != row["version"] - row["base_version"] for row in rows):
        found.append("a staleness is not the difference of its versions")
    if max(row["staleness"] for row in rows) > 8 * CLIENTS:
        found.append("an upload is staler than one that was given up in time can be")
    if newest_checkpoint(run) != len(rows):
        found.append(f"the newest checkpoint is {newest_checkpoint(run)} of {len(rows)}")
    if left := processes(str(state)):
        found.append(f"processes are left: {left}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    out = options.out or Path(tempfile.mkdtemp(prefix="soak_live"))
    out.mkdir(parents=True, exist_ok=True)
    run, state = out / "run", out / "run.live"
    with (out / "output").open("w") as output:
        process = start(
            "serve", f"--local_clients={CLIENTS}", "--pauses=4,6,9", "--method=fedbuff",
            "--buffer_size=1", "--max_versions=1000000", "--eval_every=50", "--save_seconds=5",
            "--job_seconds=90", f"--workdir={run}", *SMALL, cwd=out, stdout=output,
        )  # fmt: skip
        try:
            counts, ages = soak(generator, process, state, options)
            process.send_signal(signal.SIGINT)
            status = process.wait(60)
        finally:
            process.kill()
            process.wait()
    time.sleep(5)
    found = problems(run, state)
    if status != 130:
        found.append(f"it ended with status {status}")
    print(json.dumps({"kills": counts, "arrivals": len(files.read_rows(run / "arrivals.jsonl"))}))
    for age, sizes in sorted(ages.items()):
        print(f"server of {age} minutes: {min(sizes):.0f} to {max(sizes):.0f} MB")
    for problem in found:
        print(f"wrong: {problem}", file=sys.stderr)
    return 1 if found else 0


def soak(generator, process, state, options) -> tuple[dict[str, int], dict[int, list[float]]]:
    """Kills until the time is over: (kills by what, memory of the server by its age in minutes)."""
    wait_for(lambda: arrivals(state) >= 3, process)
    counts = dict.fromkeys(VICTIMS, 0)
    ages: dict[int, list[float]] = {}
    born: dict[int, float] = {}
    end = time.monotonic() + 60 * options.minutes
    due = time.monotonic() + options.every
    seen, since = arrivals(state), time.monotonic()
    while time.monotonic() < end:
        time.sleep(1.0)
        now = time.monotonic()
        assert process.poll() is None, "serve has ended"
        if arrivals(state) != seen:
            seen, since = arrivals(state), now
        assert now - since < 240, "no upload has come for four minutes"
        try:
            pid = json.loads((state / "status.json").read_text())["pid"]
            age = int((now - born.setdefault(pid, now)) / 60)
            ages.setdefault(age, []).append(resident_mb(pid))
        except (FileNotFoundError, ProcessLookupError):
            pass
        if now >= due:
            due = now + options.every * generator.uniform(0.5, 1.5)
            if name := kill_one(generator, state):
                counts[name] += 1
    return counts, ages


if __name__ == "__main__":
    sys.exit(main())
