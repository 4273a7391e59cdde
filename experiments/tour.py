"""Walks through a run, piece by piece: python -m experiments.tour [--out=DIR].

From the data over the plan and one window of local training to server steps and images made without
data; prints shapes and writes pictures. Any setting of a run with FedRevive on images is taken;
without flags it is the bundled digits, short, done in a minute or two.
"""

from pathlib import Path

from absl import flags

from experiments import flags as config_flags
from fedrevive_jax.config import whole_path
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import resolve

OUT = flags.DEFINE_string("out", "runs/tour", "folder for the pictures")
config_flags.define()
flags.adopt_module_key_flags(config_flags)

# Early synthesis and distillation, so that a short walk meets them.
SHORT = {
    "max_time": "10", "freeze_versions": "20", "warmup_versions": "30", "beta_s_max": "8",
}  # fmt: skip


def main() -> None:
    given = config_flags.given_values()
    if given["workdir"] is not None:
        raise ConfigError("workdir", given["workdir"], "the tour keeps no record; see --out")
    if given["method"] is None:
        given = {name: SHORT.get(name) if v is None else v for name, v in given.items()}
    config = resolve(**given)
    if not config.synthesises:
        raise ConfigError("method", config.method, "the tour walks through fedrevive")
    if config.model == "t5":
        raise ConfigError("dataset", config.dataset, "the tour shows images, not texts")
    walk(config, Path(whole_path("out", OUT.value)))


def walk(config, out: Path) -> None:
    import jax

    from fedrevive_jax.comparison import report
    from fedrevive_jax.record import plots
    from fedrevive_jax.simulation.simulator import Simulation

    report.prepare(out)

    def shapes(tree):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            print(f"    {name} {leaf.shape}")

    print("1. A simulation is built from a configuration alone.")
    simulation = Simulation(config)
    dataset, plan = simulation.dataset, simulation.schedule
    print(f"  {dataset.name}: {len(dataset.labels)} samples of shape {dataset.input_shape}")
    print("  splits: " + ", ".join(f"{len(p)} {name}" for name, p in dataset.splits.items()))

    print("2. The partition says who holds what.")
    mixes = simulation.shards.class_mixes(dataset.labels, dataset.num_classes)
    print(f"  class mixes {mixes.shape}; of client 0: {' '.join(f'{m:.2f}' for m in mixes[0])}")
    plots.clients(out / "clients.png", f"Dirichlet, alpha = {config.alpha:g}", mixes[:20])

    print("3. The schedule is computed before any training; see docs/concepts/clock.md.")
    print(f"  {plan.num_arrivals} arrivals make {plan.num_versions} versions, "
          f"mean staleness {plan.staleness.mean():.1f}")  # fmt: skip
    window = simulation.windows[0]
    print(f"  jobs of the first window: {len(window.jobs)} of {plan.initial_jobs} in flight")
    _draw_clock(out / "clock.png", plan)

    print("4. All clients start from one model, version 0.")
    shapes(simulation.server.params)
    before = simulation.evaluate().accuracy

    print("5. The first arrival needs its window: all its jobs are trained together.")
    receipt = simulation.advance()
    _, arrays = simulation.snapshot()
    print(f"  uploads that wait for their arrival: {len(arrays['uploads'])}; each holds")
    shapes(next(iter(arrays["uploads"].values()), {}))

    print("6. The server takes them in the planned order.")
    print("  arrival  client  started from  version  tau   beta   loss")
    shown = min(12, plan.num_arrivals)
    for index in range(shown):
        beta, loss = float(receipt.metrics["beta"]), float(receipt.loss)
        print(f"  {index:7}  {receipt.client:6}  {receipt.base_version:12}  {receipt.version:7}  "
              f"{receipt.staleness:3}  {beta:5.2f}  {loss:5.2f}")  # fmt: skip
        if index + 1 < shown:
            receipt = simulation.advance()
    live = simulation.server.live_versions
    print(f"  versions that somebody still works from: {', '.join(map(str, live))}")

    print("7. FedRevive's server learns to make samples from the uploads, and distils them.")
    distilled = []
    for receipt in simulation.arrivals():
        distilled.append(receipt.metrics["beta"])
    revived = sum(float(beta) > 0 for beta in distilled)
    state = simulation.server.method_state.rule
    print(f"  teachers: {config.num_teachers}; their first kernel, stacked: "
          f"{jax.tree.leaves(state.teachers.params)[1].shape}")  # fmt: skip
    print(f"  updates that were blended with a distilled one: {revived}")
    _draw_pool(out / "synthetic.png", state.pool, config, dataset)

    after = simulation.evaluate().accuracy
    print(f"8. Accuracy on the {config.eval_split} split: {before:.3f} before, {after:.3f} after.")
    print(f"Pictures in {out}: clients.png, clock.png, synthetic.png")


def _draw_clock(path: Path, plan) -> None:
    from fedrevive_jax.record import plots

    jobs = []
    for job in range(min(plan.jobs_started[-1] if plan.num_arrivals else plan.initial_jobs, 40)):
        arrival = plan.arrival_of_job[job]
        jobs.append(
            {
                "start": plan.start[job],
                "train_end": plan.train_end[job],
                "arrival": plan.arrival_time[job],
                "client": plan.client[job],
                "base_version": plan.base_version[job],
                "staleness": plan.staleness[arrival] if arrival >= 0 else None,
            }
        )
    first = plan.time[0] if plan.num_arrivals else 0.0
    plots.clock(
        path, "The first jobs; a colour is a version; dashed: the first arrival", jobs, first
    )


def _draw_pool(path: Path, pool, config, dataset) -> None:
    import numpy as np

    from fedrevive_jax.compute import rows
    from fedrevive_jax.record import plots

    images = rows.unpacked(np.asarray(pool.samples), dataset.samples[0])
    labels = np.asarray(pool.labels)
    filled = min(int(pool.added), len(labels))
    print(f"  pool: {filled} of {config.pool_size} images, {images.shape}")
    plots.synthetic(path, images[:filled], labels[:filled], dataset.num_classes)


if __name__ == "__main__":
    config_flags.run(main)
