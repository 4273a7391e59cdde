"""Programs compiled for TPUs that are not there. Skipped where their compiler is not installed."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from fedrevive_jax.clock import schedule
from fedrevive_jax.compute import hlo
from fedrevive_jax.compute import target as targets
from fedrevive_jax.dfkd import pool
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import convolutions
from fedrevive_jax.presets import resolve
from fedrevive_jax.simulation import compiling, fitting
from tests.commands import call

needs_compiler = pytest.mark.skipif(
    not targets.has_compiler(), reason="python -m pip install -e '.[tpu]'"
)


@pytest.fixture(autouse=True, scope="module")
def no_cache():
    """Only a chip that is there can read its programs back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "must be a topology like v5e:1x1"),
        ("v9:1x1", "must be a topology like v5e:1x1"),
        ("v5e:0x1", "must be a topology like v5e:1x1"),
        ("v5p:2x2", "must have 3 sides"),
    ],
)
def test_an_unknown_target_is_one_line(name, words):
    with pytest.raises(ConfigError, match=f"target={name}: {words}"):
        targets.described(name)


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(targets, "has_compiler", lambda: False)
    with pytest.raises(ConfigError, match="target=v5e:1x1: needs the compiler of TPUs"):
        targets.described("v5e:1x1")


# --- what may not come back -----------------------------------------------------------------------

SMALL = {"preset_scale": "small", "model": "convnet", "model_width": 8}


class Compiled:
    """One of a run's programs, compiled for a target, with its text parsed."""

    def __init__(self, target, name, dataset="cifar10", method="fedrevive", **fields):
        self.target = targets.described(target)
        given = resolve(dataset, method, **{**SMALL, **fields})
        self.config = compiling.settled(given, self.target)
        self.dataset = compiling.blank(self.config)
        clock = schedule.create(self.config)
        self.programs = compiling.build(self.config, self.target, self.dataset, clock)
        self.function, self.arguments = getattr(self.programs, name)
        compiled = self.function.lower(*self.arguments).compile()
        self.program = hlo.Program(compiled.as_text())
        arguments = compiled.memory_analysis().argument_size_in_bytes
        self.peak = arguments + fitting.new_bytes(compiled)
        self.estimated = arguments + self.programs.estimates.get(name, 0)

    def convolutions_in_single_precision(self):
        shapes = {one.name: one.shape for one in self.program.instructions()}
        return [
            one.origin
            for one in self.program.instructions()
            if one.opcode == "convolution"
            and any(shapes[operand].startswith("f32") for operand in one.operands)
        ]

    def copies_of(self, rows):
        """Copies of an array with so many rows, anew or in another layout."""
        return [
            one.text[:200]
            for one in self.program.instructions()
            if one.opcode in ("copy", "copy-start", "transpose")
            and re.search(rf"\[{rows}[,\]]", one.shape)
            and "," in one.shape.split("]")[0]  # a row is more than one number
        ]


@pytest.fixture(scope="module", params=["cifar10", "fashion_mnist"])
def training(request):
    return Compiled("v5e:1x1", "training", request.param)


@pytest.fixture(scope="module")
def revival():
    return Compiled("v5e:1x1", "server_step")


@needs_compiler
@pytest.mark.slow
def test_training_for_a_tpu(training):
    """In bfloat16 throughout, from a store that stays as it lies, in several jobs at once."""
    assert training.config.precision == "bfloat16"
    assert training.programs.jobs > 1
    assert not training.convolutions_in_single_precision()
    assert not training.copies_of(len(training.dataset.samples))
    assert training.peak <= (1 + compiling.AGREEMENT) * training.estimated
    cost = training.program.cost()
    assert cost.unknown_loops == 0
    # As many rounds of the loop as local steps: of two or more loops none would be told.
    loops = [one for one in training.program.instructions() if one.opcode == "while"]
    assert {training.program.rounds(loop) for loop in loops} == {training.config.local_iterations}


@needs_compiler
@pytest.mark.slow
def test_pixels_side_by_side_are_worth_their_zeros(monkeypatch):
    """Of the paper's ConvNet; the same images, one pixel beside the other, take more cycles."""
    fields = {"model_width": 64, "client_batch": 4, "batch_size": 32, "local_iterations": 20}

    def cycles():
        return Compiled("v5e:1x1", "training", "femnist", **fields).program.cost().always

    ours = cycles()
    monkeypatch.setattr(convolutions, "pixels_beside", lambda *image: 1)
    theirs = cycles()
    assert ours < 0.9 * theirs  # 0.82 of them; of thirteen jobs, which take long to compile, 0.56


@needs_compiler
@pytest.mark.slow
def test_the_control_of_these_tests():
    """What they look for is seen where it is asked for."""
    exact = Compiled("v5e:1x1", "evaluation", "fashion_mnist", precision="float32")
    assert exact.convolutions_in_single_precision()
    count = len(exact.dataset.samples)
    store = jax.ShapeDtypeStruct((count, 32, 32, 3), jnp.uint8)
    places = jax.ShapeDtypeStruct((64,), jnp.int32)
    shapes = exact.target.shapes((store, places))
    plain = jax.jit(lambda store, places: store[places]).lower(*shapes).compile()
    exact.program = hlo.Program(plain.as_text())
    assert exact.copies_of(count)


@needs_compiler
@pytest.mark.slow
def test_a_server_step_for_a_tpu(revival):
    """The generator, too, computes in bfloat16; the pool stays where it is; what is due now and
    then is told apart."""
    assert not revival.convolutions_in_single_precision()
    assert not revival.copies_of(revival.config.pool_size)
    cost = revival.program.cost(compiling.SCOPES)
    assert cost.unknown_loops == 0
    assert min(cost.branches.values()) > cost.always > 0


@needs_compiler
@pytest.mark.slow
def test_what_a_server_step_needs_is_estimated():
    """At the paper's size; of a small one the program's code and the padding of tiles are most."""
    made = Compiled("v5e:1x1", "server_step", "femnist", preset_scale="full", model_width=64)
    assert made.peak == pytest.approx(made.estimated, rel=compiling.AGREEMENT)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sample", [(32, 32, 3), (28, 28, 1), (128, 512)])
def test_a_pool_is_neither_copied_nor_laid_out_anew(sample):
    """The last are the embedded texts of T5, for which both once took 4.2 GB and 13 ms."""
    places = jax.ShapeDtypeStruct((64,), jnp.int32)
    batch = jax.ShapeDtypeStruct((64, *sample), jnp.float32)
    ring = jax.eval_shape(lambda: pool.empty(16_000, batch))

    def pass_by(ring, batch, labels, wanted, places):
        ring = pool.add(ring, batch, labels, wanted)
        one = jax.ShapeDtypeStruct(sample, jnp.float32)
        return ring, pool.take(ring, places, one)

    device = jax.sharding.SingleDeviceSharding(targets.described("v5e:1x1").devices[0])
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        (ring, batch, places, jax.ShapeDtypeStruct((), jnp.bool_), places),
    )
    compiled = jax.jit(pass_by, donate_argnums=0).lower(*arguments).compile()
    size = batch.size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * size < 16_000 / 64 * size


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedbuff", "fedasync", "fadas", "ca2fl", "fedfa", "afl_dw"])
def test_a_server_step_of_every_family_for_a_tpu(method):
    traced = []

    def note(event, *rest, **named):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            traced.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        made = Compiled("v5e:1x1", "server_step", "fashion_mnist", method)
        assert traced
        # The same shapes again are the same program.
        traced.clear()
        made.function.lower(*made.arguments)
        assert not traced
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert made.program.cost().always > 0


@needs_compiler
@pytest.mark.slow
def test_what_crosses_a_mesh():
    """Uploads once after a window, which is what the docs name; nothing on the way in."""
    made = Compiled("v5e:2x2", "training", "fashion_mnist", concurrency=16)
    assert made.programs.jobs % 4 == 0
    seen = made.program.collectives()
    assert set(seen) <= {"all-gather", "all-reduce"}
    assert seen["all-gather"] >= 1


@needs_compiler
def test_texts_that_synthesis_starts_from_move_no_size(tmp_path):
    config = resolve("newsgroups", "fedrevive", preset_scale="small", seed_text=str(tmp_path / "s"))
    target = targets.described("v5e:1x1")
    config = compiling.settled(config, target)
    clock = schedule.create(config)
    assert compiling.build(config, target, compiling.blank(config), clock).jobs > 0


@needs_compiler
@pytest.mark.slow
def test_a_plan_for_a_target():
    """Every part of a run, what it takes, and whether it fits; printed as JSON."""
    result = call(
        "--dry_run", "--target=v5e:1x1", "--dataset=digits", "--method=fedbuff",
        "--preset_scale=small",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["chip"], told["devices"], told["fits"]) == ("TPU v5 lite", 1, True)
    assert set(told["parts"]) == {"training", "server_step", "evaluation"}
    total = sum(part["seconds_of_the_run"] for part in told["parts"].values())
    assert told["seconds_of_the_run"] == pytest.approx(total)
    for part in told["parts"].values():
        assert part["seconds"] >= part["flops"] / told["flops_peak"]
        assert 0 <= part["share_of_peak"] <= 1
    assert "--precision=bfloat16 --convolution=lax" in told["flags"]


@needs_compiler
@pytest.mark.slow
def test_what_does_not_fit_is_told():
    """A model whose six copies alone are larger than a v5e."""
    config = resolve("cifar10", "fedbuff", model="convnet", model_width=8192, eval_batch=8)
    told = compiling.plan(config, targets.described("v5e:1x1"))
    assert not told["fits"]
    assert not told["programs"]["training"]["fits"]
