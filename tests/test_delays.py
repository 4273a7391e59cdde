"""The laws of durations, by statistics with a negative control; and the trace file."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from fedrevive_jax.clock import delays
from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError

N = 20_000
# Kolmogorov-Smirnov with fixed seeds: a true law falls below this level once in a thousand tests.
LEVEL = 1e-3


def train_times(**kwargs):
    config = Config(num_clients=N, concurrency=1, delay_mean=2.0, **kwargs)
    return delays.create(config).durations(0).train


LAWS = {
    "exponential": scipy.stats.expon(scale=2.0),
    "uniform": scipy.stats.uniform(1.5, 1.0),
    "lognormal": scipy.stats.lognorm(0.5, scale=2.0 * np.exp(-0.125)),
    "halfnormal": scipy.stats.halfnorm(scale=2.0 * np.sqrt(np.pi / 2)),
}


@pytest.mark.parametrize("name", LAWS)
def test_laws(name):
    times = train_times(delays=name, delay_spread=0.5)
    # The standard error of the mean is at most 2 / sqrt(20000) = 0.014.
    assert times.mean() == pytest.approx(2.0, abs=0.05)
    assert scipy.stats.kstest(times, LAWS[name].cdf).pvalue > LEVEL
    for other, law in LAWS.items():
        if other != name:
            assert scipy.stats.kstest(times, law.cdf).pvalue < 1e-12


def test_constant():
    assert (train_times(delays="constant") == 2.0).all()


def test_published_means_are_persistent():
    model = delays.create(Config(num_clients=N, concurrency=1, delays="default"))
    uploads = np.stack([model.durations(visit).upload for visit in range(3)])
    assert ((uploads > 0.13) & (uploads < 0.27)).all()
    slow = uploads > 0.2
    assert (slow == slow[0]).all()
    assert slow[0].mean() == pytest.approx(0.5, abs=0.02)
    assert (model.durations(7).download == 0.1).all()
    assert model.durations(0).train.mean() == pytest.approx(1.3, abs=0.05)


def write_trace(path, text):
    path.write_text(text)
    return Config(num_clients=4, concurrency=2, delays="trace", delay_trace=str(path))


def test_trace_by_client(tmp_path):
    text = "client,download,train,upload\na,1,10,2\nb,3,20,4\na,5,30,6\n"
    model = delays.create(write_trace(tmp_path / "t.csv", text))
    assert model.durations(0).train.tolist() == [10, 20, 10, 20]
    assert model.durations(1).train.tolist() == [30, 20, 30, 20]
    assert model.durations(2).upload.tolist() == [2, 4, 2, 4]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_headers_are_read_as_a_reader_reads_them(tmp_path, separator):
    lines = ["\ufeffNote, Client ,DOWNLOAD, Train ,upload", "x,b,3,20,4", "", "x, a ,1,10,2"]
    text = "\n".join(lines).replace(",", separator)
    model = delays.create(write_trace(tmp_path / "t.csv", text))
    assert model.durations(0).train.tolist() == [10, 20, 10, 20]


def test_recorded_clients_are_in_the_order_of_numbers(tmp_path):
    rows = "".join(f"{client},0,{client + 1},0\n" for client in range(12))
    config = write_trace(tmp_path / "t.csv", f"client,download,train,upload\n{rows}")
    model = delays.create(dataclasses.replace(config, num_clients=12))
    assert model.durations(0).train.tolist() == list(range(1, 13))


def test_trace_without_clients_draws_rows(tmp_path):
    model = delays.create(write_trace(tmp_path / "t.csv", "train,upload,download\n1,2,3\n4,5,6\n"))
    rows = {tuple(r) for visit in range(20) for r in np.stack(model.durations(visit), 1)}
    assert rows == {(3, 1, 2), (6, 4, 5)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("download,train\n1,2\n", "no column 'upload'"),
        ("download,train,upload\n", "no rows"),
        ("download,train,upload\n1,0,1\n", "line 2.*train > 0"),
        ("download,train,upload\n1,1,1\n1,nan,1\n", "line 3.*finite"),
        ("download,train,upload\n1,x,1\n", "line 2"),
        ("download,train,upload\n1,2\n", "line 2: has 2 fields, the header has 3, with a comma"),
        ("download,train,upload\n1,5,1,2\n", "line 2: has 4 fields"),
        ("download;train;upload\n1,5;1;1\n", "line 2: durations must be finite"),
        ("download|train|upload\n1|1|1\n", "looks like one .*must name"),
        ("a b c\n1 2 3\n", "no column 'download'.*separated by comma, semicolon, tab"),
        ("download,train,upload,train\n1,2,3,4\n", "has two columns 'train'"),
        ("download,train,upload,Client ,client\n1,2,3,a,b\n", "has two columns 'client'"),
        ("client_id,download,train,upload\na,1,2,3\n", "column 'client_id' looks like one"),
        ("clinet,download,train,upload\na,1,2,3\n", "column 'clinet' looks like one"),
        ("download,train,upload_s\n1,2,3\n", "column 'upload_s' looks like one .*must name down"),
        ("client,download,train,upload\n ,1,2,3\n", "line 2: the client is empty"),
        ("", "no column"),
    ],
)
def test_bad_traces(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        delays.create(write_trace(tmp_path / "t.csv", text))


def test_missing_trace(tmp_path):
    config = Config(delays="trace", delay_trace=str(tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match=r"none\.csv"):
        delays.create(config)
