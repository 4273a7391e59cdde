"""Files of others are data: nothing in them is run, imported, unpickled or written elsewhere.

Each is a real file of its kind, made to do harm to a reader that trusts it.
"""

import hashlib
import io
import json
import os
import pickle
import struct
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments.prepare import prepare
from fedrevive_jax.clock import delays
from fedrevive_jax.config import Config
from fedrevive_jax.data import cifar10, idx, image_folder, json_lines, pixels, text_folder
from fedrevive_jax.data.builders import femnist as femnist_builder
from fedrevive_jax.data.builders import newsgroups as newsgroups_builder
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import t5_weights
from fedrevive_jax.record import derived
from tests import prepared

DEEP = b"[" * 100_000
LONG = b"1" * 10_000


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def one_line_error(match, call, *arguments):
    with pytest.raises(ConfigError, match=match) as caught:
        call(*arguments)
    assert len(str(caught.value).splitlines()) == 1


# --- archives -------------------------------------------------------------------------------------

POST = "20news-bydate-train/sci.med/1"


def member(name, kind=tarfile.REGTYPE, target=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (member(f"../../{POST}"), r"'../../20news\S*' points outside the archive"),
        (member(f"a/../../{POST}"), "points outside the archive"),
        (member(f"/tmp/{POST}"), "'/tmp/20news-bydate-train/sci.med/1' points outside"),
        (member(POST, tarfile.SYMTYPE, "/etc/passwd"), "sci.med/1' is a link or a device"),
        (member(POST, tarfile.LNKTYPE, "../../secret"), "sci.med/1' is a link or a device"),
        (member(POST, tarfile.FIFOTYPE), "sci.med/1' is a link or a device"),
        (member("../elsewhere", tarfile.DIRTYPE), "'../elsewhere' points outside"),
    ],
)
def test_an_archive_that_reaches_outside_is_refused_by_name(tmp_path, entry, message):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    archive = raw / newsgroups_builder.ARCHIVE
    prepared.write_archive(archive, train=20, test=20)
    with tarfile.open(archive) as whole:
        kept = [(m, whole.extractfile(m).read()) for m in whole]
    with tarfile.open(archive, "w:gz") as bad:
        for old, content in kept:
            bad.addfile(old, io.BytesIO(content))
        bad.addfile(entry, io.BytesIO(b""))
    one_line_error(message, lambda: list(newsgroups_builder.posts(archive)))
    one_line_error(message, prepare, "newsgroups", str(out), str(raw))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != archive]


# --- prepared data --------------------------------------------------------------------------------


def test_prepared_data_import_no_module_of_their_own(tmp_path, monkeypatch):
    """TFDS imports what features.json names, also a module beside the data."""
    folder = prepared.write_images("cifar10", tmp_path, {"train": 60, "test": 30})
    (tmp_path / "harmful_features.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = folder / "features.json"
    whole = path.read_text()
    for name in ("harmful_features.Image", "os.path"):
        bad = json.loads(whole)
        bad["featuresDict"]["features"]["image"]["pythonClassName"] = name
        path.write_text(json.dumps(bad))
        one_line_error(f"features.json: names '{name}'; must be of", cifar10.load, str(tmp_path), 0)
    for raw in (DEEP, LONG, b'{"type": "harmful_features.Image", "content": {}}'):
        path.write_bytes(raw)
        one_line_error(r"features.json", cifar10.load, str(tmp_path), 0)
    assert "harmful_features" not in sys.modules
    path.write_text(whole)
    assert len(cifar10.load(str(tmp_path), 0).labels) == 90


# --- images ---------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n%%EndComments\nshowpage\n%%EOF\n"


def test_images_are_never_handed_to_another_program(tmp_path, monkeypatch):
    """Pillow knows EPS files by their content and has Ghostscript run them."""
    ran, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for name in "abc":
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (5, 6)).save(folder / f"{number}.png")
    bad = tmp_path / "data" / "a" / "0.png"
    bad.write_bytes(EPS)
    one_line_error(r"a/0.png: cannot be read as an image", image_folder.load, bad.parent.parent, 0)
    bad.unlink()
    os.mkfifo(bad)  # would be waited for without end
    one_line_error(
        r"a/0.png: cannot be read.*it is no file", image_folder.load, tmp_path / "data", 0
    )

    table = tmp_path / "train.parquet"
    columns = prepared.femnist_rows(4, 2)
    columns["image"][0] = {"bytes": EPS.replace(b"5 6", b"28 28"), "path": None}
    prepared.write_parquet(table, columns)
    one_line_error(
        "row 0: image cannot be decoded", lambda: list(femnist_builder.parquet_rows(table))
    )
    assert not ran.exists()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_damage_to_an_image_is_one_line(tmp_path):
    """420 seeded cuts, flips and blocks of zeros in files of every format: an image or an error."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    messages = []
    for name in pixels.FORMATS:
        buffer = io.BytesIO()
        Image.fromarray(colours).save(buffer, name)
        for turn in range(60):
            raw = bytearray(buffer.getvalue())
            place = int(generator.integers(len(raw)))
            if turn % 3 == 0:
                raw = raw[:place]
            elif turn % 3 == 1:
                raw[place] ^= 1 << int(generator.integers(8))
            else:
                raw[place : place + 8] = bytes(len(raw[place : place + 8]))
            path = tmp_path / "image"
            path.write_bytes(raw)
            try:
                pixels.read(path)
            except ConfigError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert all(len(message.splitlines()) == 1 for message in messages)


# --- arrays and tables ----------------------------------------------------------------------------


def test_sizes_that_wrap_round(tmp_path):
    """2^31 x 2^31 x 4 is 0 in 64 bits, just what the file holds."""
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 4)
    (tmp_path / "images").write_bytes(header)
    one_line_error("holds 16 bytes, its header says", idx.read_idx, str(tmp_path), "images", 3)


def test_nothing_is_unpickled(tmp_path):
    """Pickles under every name under which a reader would find them."""
    trap = tmp_path / "trap"
    raw = pickle.dumps(Trap(trap))
    objects = np.empty(1, object)
    objects[0] = Trap(trap)

    np.savez(tmp_path / derived.CLIENTS, indices=objects, offsets=objects)
    digest = hashlib.sha256((tmp_path / derived.CLIENTS).read_bytes()).hexdigest()
    origin = {"start": "", "data_sha256": "", "classes": [], "inputs": {}}
    origin = {**origin, "files": {derived.CLIENTS: digest}}  # whoever sets a trap knows digests
    (tmp_path / derived.ORIGIN).write_text(json.dumps(origin))
    one_line_error("clients.npz: holds something else", derived.read, tmp_path)
    (tmp_path / derived.ORIGIN).write_bytes(raw)
    one_line_error("origin.json: is damaged", derived.read, tmp_path)

    trace = tmp_path / "trace.csv"
    trace.write_bytes(raw)
    config = Config(delays="trace", delay_trace=str(trace))
    one_line_error(r"trace.csv: (cannot be read|no column)", delays.create, config)
    (tmp_path / "seed.jsonl").write_bytes(raw)
    one_line_error("seed.jsonl line 1", json_lines.read, tmp_path / "seed.jsonl")
    (tmp_path / t5_weights.SIZES).write_bytes(raw)
    one_line_error("config.json cannot be read", t5_weights.read_shape, str(tmp_path))
    (tmp_path / t5_weights.WEIGHTS).write_bytes(raw)
    shape = t5_weights.T5Shape(3300, 8, 8, 2, 2, 4, 8, 16, 1e-6)
    one_line_error("safetensors cannot be read", t5_weights.read, str(tmp_path), shape)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw)
    one_line_error("not an IDX", idx.read_idx, str(tmp_path), "train-images-idx3-ubyte", 3)
    assert not trap.exists()
    pickle.loads(raw).close()  # the control: the trap works
    assert trap.exists()


@pytest.mark.parametrize("raw", [DEEP, LONG, b'{"label": ' + DEEP, b'{"label": 1' + LONG])
def test_json_that_a_parser_gives_up_on(tmp_path, raw):
    """Nesting beyond the parser's stack, numbers of more digits than it converts."""
    (tmp_path / "a.jsonl").write_bytes(raw)
    one_line_error(r"a.jsonl line 1", json_lines.read, tmp_path / "a.jsonl")
    one_line_error(r"a.jsonl line 1", text_folder.load, str(tmp_path), 0)
    one_line_error("LEAF's JSON", lambda: list(femnist_builder.leaf_rows(tmp_path / "a.jsonl")))
    for name in (t5_weights.SIZES, derived.ORIGIN):
        (tmp_path / name).write_bytes(raw)
    one_line_error(
        r"config.json (cannot be read|holds no sizes)", t5_weights.read_shape, str(tmp_path)
    )
    one_line_error("origin.json: is damaged", derived.read, tmp_path)
