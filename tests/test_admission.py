"""Bad uploads, as a network may bring them: rejected for a reason, counted, harmless."""

import logging
import math
from dataclasses import dataclass, field

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax.methods import method as interface
from fedrevive_jax.presets import resolve
from fedrevive_jax.server.admission import Reason
from fedrevive_jax.server.core import Receipt, Server, UnknownClientError, UnknownJobError
from tests.toys import scalar_upload

CLIENTS = 6
LR = 0.5


def make(buffer_size=1, max_update_norm=0.0, traces=1):
    """A server whose step may be traced so often; once more is an error."""
    config = resolve("digits", "fedbuff", server_lr=LR)
    method = interface.compose(
        interface.as_it_is(), buffer_size, interface.server_optimizer(config)
    )
    chex.clear_trace_counter()  # it counts by the name of a function
    method = method._replace(step=chex.assert_max_traces(method.step, n=traces))
    start, taps = {"w": jnp.asarray(1.0, jnp.float32)}, scalar_upload(0.0).taps
    return Server(method, start, taps, seed=0, num_clients=CLIENTS, max_update_norm=max_update_norm)


def host_upload(w, mean=0.0, loss=0.0):
    """An upload as it comes from a network: plain NumPy arrays."""
    upload = jax.tree.map(np.asarray, scalar_upload(w, mean))
    return upload._replace(loss=np.asarray(loss, np.float32))


GOOD = host_upload(2.0)
DEEP = 0.0
for _ in range(50_000):
    DEEP = [DEEP]
WRONG_SHAPES = {
    "longer": GOOD._replace(params={"w": np.zeros(2, np.float32)}),
    "other name": GOOD._replace(params={"v": np.zeros((), np.float32)}),
    "integers": GOOD._replace(params={"w": np.zeros((), np.int32)}),
    "doubles": GOOD._replace(params={"w": np.zeros((), np.float64)}),
    "taps": GOOD._replace(taps=((np.zeros(2, np.float32), np.ones(2, np.float32)),)),
    "no taps": GOOD._replace(taps=()),
    "a plain number": GOOD._replace(loss=0.5),
    "a text": GOOD._replace(params={"w": "2.0"}),
    "nothing": None,
    "a mapping": GOOD._asdict(),
    "keys that have no order": GOOD._replace(params={"w": GOOD.loss, 1: GOOD.loss}),
    "a deep nest": GOOD._replace(params=DEEP),
}
NOT_JOBS = (-1, 10**30, True, np.True_, 0.0, "0", None, b"0", np.asarray([0, 1]))


def test_every_reason_by_hand(caplog):
    """One upload after the other; after each the model, the buffer and the slots are known."""
    server = make(buffer_size=2, max_update_norm=3.0)
    tickets = [server.dispatch(client) for client in range(CLIENTS)]
    receipt = server.submit(0, host_upload(3.0))  # Delta = 2, first of a buffer of two
    assert isinstance(receipt, Receipt)

    with caplog.at_level(logging.WARNING, "fedrevive_jax.server.admission"):
        rejected = [
            server.submit(0, host_upload(9.0)),
            server.submit(6, host_upload(9.0)),
            server.submit(1, host_upload(9.0), base_version=7),
            server.submit(2, WRONG_SHAPES["longer"]),
        ]
    assert [r.reason for r in rejected] == [
        Reason.JOB_OVER, Reason.UNKNOWN_JOB, Reason.WRONG_VERSION, Reason.WRONG_SHAPE,
    ]  # fmt: skip
    assert [r.client is not None for r in rejected] == [False, False, True, True]
    assert [(r.client, r.base_version) for r in rejected[2:]] == [(1, 0), (2, 0)]
    assert server.version == 0  # no place in the buffer was taken
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "rejected an upload for job 0: job_over (was used already or given up)"
    assert lines[2].startswith("rejected an upload for job 1 from client 1, version 0: wrong_ver")

    # Numbers are judged on the device: the second place of the buffer is taken, nothing moves by
    # it. w = 1 + 0.5 * 2 / 1.
    assert not bool(server.submit(3, host_upload(4.5)).accepted)  # a norm of 3.5
    assert server.version == 1
    assert float(server.params["w"]) == 2.0
    assert server.rejected == {
        "unknown_job": 1, "job_over": 1, "wrong_version": 1, "wrong_shape": 1,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING, "fedrevive_jax.server.admission"):
        (found,) = server.review()
    assert found[:4] == (3, 3, 0, Reason.UPDATE_NORM)
    assert found.detail == "update norm 3.5 above max_update_norm=3"
    assert found.detail in caplog.records[-1].getMessage()
    assert server.rejected["update_norm"] == 1
    assert server.review() == []

    # A norm of exactly the limit is let in; a true claim of the version, too.
    assert bool(server.submit(4, host_upload(4.0), base_version=np.int64(0)).accepted)
    assert server.live_versions == (0, 1)  # job 5 is the last that holds version 0
    assert server.give_up(5) == tickets[5]
    assert server.live_versions == (1,)
    assert server.submit(5, GOOD).reason is Reason.JOB_OVER
    with pytest.raises(UnknownJobError, match="job 5 is not in flight"):
        server.give_up(5)


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_a_wrong_shape_ends_the_job_and_is_seen_before_anything_is_compiled(name):
    server = make(traces=0)
    ticket = server.dispatch(3)
    rejection = server.submit(ticket.job, WRONG_SHAPES[name])
    assert rejection[:4] == (0, 3, 0, Reason.WRONG_SHAPE)
    # The client may have another job, from the newest version; the old one is over.
    assert server.submit(ticket.job, GOOD).reason is Reason.JOB_OVER
    assert server.dispatch(3) == (1, 3, 0)


def test_what_names_no_job_is_unknown():
    server = make()
    server.dispatch(0)
    server.dispatch(1)
    for job in NOT_JOBS:
        rejection = server.submit(job, GOOD)
        assert (rejection.reason, rejection.client) == (Reason.UNKNOWN_JOB, None)
        assert len(rejection.detail.splitlines()) == 1
    assert server.rejected == {"unknown_job": len(NOT_JOBS)}
    receipt = server.submit(np.int64(1), GOOD)
    assert (receipt.job, type(receipt.job), receipt.new_version) == (1, int, 1)


def test_jobs_go_to_clients_of_the_population_alone():
    """An index outside would be clamped or dropped silently by the device."""
    server = make()
    for client in (-1, CLIENTS, True, 0.0, "0", None, 2**40):
        with pytest.raises(UnknownClientError, match=r"must be a whole number in 0\.\.5"):
            server.dispatch(client)
    assert server.next_job == 0
    assert type(server.dispatch(np.int64(CLIENTS - 1)).client) is int
    for wrong in ({"num_clients": 0}, {"num_clients": 1, "max_update_norm": math.nan}):
        with pytest.raises(ValueError, match="num_clients >= 1 and a finite max_update_norm"):
            Server(None, {"w": jnp.zeros(())}, (), 0, **wrong)


@pytest.mark.parametrize(
    ("upload", "reason"),
    [
        (host_upload(math.nan), Reason.NOT_FINITE),
        (host_upload(math.inf), Reason.NOT_FINITE),
        (host_upload(2.0, mean=-math.inf), Reason.NOT_FINITE),
        (host_upload(2.0, loss=math.nan), Reason.NOT_FINITE),
        (host_upload(3e38), Reason.NOT_FINITE),  # its square is beyond float32
        (host_upload(1e18), None),
    ],
)
def test_numbers_without_a_limit_of_the_norm(upload, reason):
    server = make()
    server.dispatch(0)
    receipt = server.submit(0, upload)
    assert [r.reason for r in server.review()] == ([] if reason is None else [reason])
    assert bool(receipt.accepted) == (reason is None)
    if reason is not None:
        assert float(server.params["w"]) == 1.0


def test_a_review_may_leave_the_newest():
    server = make()
    bad = [server.dispatch(client).job for client in range(2)]
    for job in bad:
        server.submit(job, host_upload(math.nan))
    assert [rejection.job for rejection in server.review(leave=1)] == bad[:1]
    assert [rejection.job for rejection in server.review()] == bad[1:]


def test_a_review_tells_what_was_looked_at_before():
    """A snapshot looks at the numbers, too; whoever reviews later is still told."""
    server = make()
    server.dispatch(0)
    server.submit(0, host_upload(math.nan))
    server.snapshot()
    assert [r.reason for r in server.review()] == [Reason.NOT_FINITE]
    assert server.review() == []


def test_counts_survive_a_snapshot():
    server = make()
    server.dispatch(0)
    server.submit(5, GOOD)
    server.submit(0, host_upload(math.nan))
    record, arrays = server.snapshot()  # looks at what the device found first
    assert record["rejected"] == {"unknown_job": 1, "not_finite": 1}
    copy = make()
    copy.restore(record, server.params, jax.tree.map(jnp.array, arrays))
    assert copy.rejected == server.rejected


def test_nobody_has_to_look():
    """Verdicts that are never asked for are looked at after a thousand uploads."""
    server = make()
    for _ in range(1001):
        server.submit(server.dispatch(0).job, host_upload(math.nan))
    assert server.rejected == {"not_finite": 1000}


# --- any order of anything, against a server in plain Python --------------------------------------


@dataclass
class PlainServer:
    """What the server must do, with one float for a model."""

    buffer_size: int
    limit: float
    versions: list[float] = field(default_factory=lambda: [1.0])
    in_flight: dict[int, tuple[int, int]] = field(default_factory=dict)  # job: client, version
    next_job: int = 0
    buffered: int = 0
    deltas: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def dispatch(self, client):
        self.in_flight[self.next_job] = (client, len(self.versions) - 1)
        self.next_job += 1

    def reject(self, reason):
        self.counts[reason] = self.counts.get(reason, 0) + 1
        return reason

    def submit(self, job, upload, fits, claim):
        """The reason of the rejection, or "" for an update that counts."""
        if job not in self.in_flight:
            known = 0 <= job < self.next_job
            return self.reject(Reason.JOB_OVER if known else Reason.UNKNOWN_JOB)
        _, version = self.in_flight.pop(job)
        if claim is not None and claim != version:
            return self.reject(Reason.WRONG_VERSION)
        if not fits:
            return self.reject(Reason.WRONG_SHAPE)
        reason, delta = "", float(upload.params["w"]) - self.versions[version]
        numbers = (delta, float(upload.loss), *(float(x[0]) for x in upload.taps[0]))
        if not all(map(math.isfinite, numbers)) or abs(delta) > math.sqrt(np.finfo("f4").max):
            reason = self.reject(Reason.NOT_FINITE)
        elif self.limit and abs(delta) > self.limit:
            reason = self.reject(Reason.UPDATE_NORM)
        else:
            self.deltas.append(delta)
        self.buffered += 1
        if self.buffered == self.buffer_size:
            step = LR * sum(self.deltas) / len(self.deltas) if self.deltas else 0.0
            self.versions.append(self.versions[-1] + step)
            self.buffered, self.deltas = 0, []
        return reason

    @property
    def live(self):
        return tuple(sorted({v for _, v in self.in_flight.values()} | {len(self.versions) - 1}))


SHAPES = [WRONG_SHAPES[name] for name in ("longer", "other name", "doubles", "a text", "nothing")]
BAD_NUMBERS = [
    host_upload(math.nan), host_upload(-math.inf), host_upload(0.0, mean=math.nan),
    host_upload(0.0, loss=math.inf), host_upload(3e38), host_upload(-1e25),
]  # fmt: skip
DO = ("dispatch", "dispatch", "good", "good", "again", "unknown", "numbers", "large", "shape",
      "claim", "give up")  # fmt: skip
INJECTED = ("again", "unknown", "numbers", "large", "shape", "claim")
STEPS = st.lists(
    st.tuples(st.sampled_from(DO), st.integers(0, 29), st.integers(-8, 8)),
    min_size=100,
    max_size=100,
)


@pytest.mark.parametrize(("buffer_size", "limit"), [(1, 0.0), (3, 10.0)])
def test_no_order_of_anything_does_harm(buffer_size, limit, caplog):
    """10,000 bad uploads in all, among good ones: the two servers agree after every single one."""
    caplog.set_level(logging.ERROR, "fedrevive_jax.server.admission")  # ten thousand lines
    server = make(buffer_size, limit)
    server.submit(server.dispatch(0).job, GOOD)  # compiles
    blank, arrays = make(buffer_size, limit).snapshot()
    arrays, params = jax.tree.map(np.asarray, (arrays, {"w": np.float32(1.0)}))
    injected = 0

    def play(steps):
        nonlocal injected
        server.restore(blank, *jax.tree.map(jnp.array, (params, arrays)))
        plain, found = PlainServer(buffer_size, limit), []
        for what, number, value in steps:
            injected += what in INJECTED
            if what == "dispatch" or (what != "unknown" and not plain.next_job):
                assert server.dispatch(number % CLIENTS)[:2] == (plain.next_job, number % CLIENTS)
                plain.dispatch(number % CLIENTS)
                continue
            flying = list(plain.in_flight)
            job = flying[number % len(flying)] if flying else number % max(plain.next_job, 1)
            if what == "again":
                over = sorted(set(range(plain.next_job)) - set(flying))
                job = over[number % len(over)] if over else job
            elif what == "unknown":
                job = plain.next_job + number if value % 2 else -1 - number
            elif what == "give up":
                if flying:
                    server.give_up(job)
                    del plain.in_flight[job]
                continue
            upload, claim = host_upload(value / 4), None
            if what == "numbers":
                upload = BAD_NUMBERS[value % len(BAD_NUMBERS)]
            elif what == "large":
                upload = host_upload(1e6 * (value or 1))
            elif what == "shape":
                upload = SHAPES[value % len(SHAPES)]
            elif what == "claim":
                claim = value
            before, counted = float(server.params["w"]), len(plain.versions)
            reason = plain.submit(job, upload, what != "shape", claim)
            outcome = server.submit(np.int64(job), upload, claim)
            if isinstance(outcome, Receipt):
                found += [reason] if reason else []
                assert bool(outcome.accepted) == (reason == "")
            else:
                assert outcome.reason == reason
                assert float(server.params["w"]) == before
                assert len(plain.versions) == counted
            assert math.isfinite(float(server.params["w"]))
            assert server.version == len(plain.versions) - 1
            assert server.live_versions == plain.live
            # Sums of float32 that may cancel: as exact as the largest number that took part.
            scale = max(map(abs, plain.versions))
            assert float(server.params["w"]) == pytest.approx(plain.versions[-1], abs=1e-5 * scale)
        assert [rejection.reason for rejection in server.review()] == found
        assert server.rejected == {str(k): v for k, v in plain.counts.items()}

    bounded = hypothesis.settings(
        max_examples=110,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
    )
    bounded(hypothesis.given(STEPS)(play))()
    assert injected >= 5_000
