"""The T5 encoder with the same weights gives what `transformers` gives (float32, to 1e-4).

The weights go the way a user's do: saved by `transformers`, read by `models.t5_weights`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax.data import tokens
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import t5, t5_weights
from fedrevive_jax.models.model import Embedded, Text
from fedrevive_jax.presets import resolve
from fedrevive_jax.running import runner
from fedrevive_jax.running.restore import evaluate_checkpoint
from fedrevive_jax.simulation.simulator import Simulation

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install -e '.[parity]'"
)

LENGTH, CLASSES = 40, 5


@pytest.fixture(scope="module")
def encoder():
    sizes = {
        "vocab_size": 3300, "d_model": 32, "d_kv": 12, "d_ff": 64, "num_layers": 3, "num_heads": 4,
        "relative_attention_num_buckets": 16, "relative_attention_max_distance": 24,
        "dropout_rate": 0.0, "feed_forward_proj": "relu",
    }  # fmt: skip
    torch.manual_seed(0)
    net = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # norms start at one: make every weight matter
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return net


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    encoder.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def model(folder):
    shape = t5_weights.read_shape(str(folder))
    return t5.make_classifier(shape, LENGTH, CLASSES, t5_weights.read(str(folder), shape))


def expected(encoder, params, embeddings, mask):
    """Logits and every layer's state at position 0, by transformers and a head in torch."""
    states = []
    hooks = [
        block.register_forward_hook(
            lambda module, inputs, output: states.append(
                (output[0] if isinstance(output, tuple) else output)[:, 0]
            )
        )
        for block in encoder.encoder.block
    ]
    with torch.no_grad():
        pooled = encoder(
            inputs_embeds=torch.from_numpy(np.array(embeddings)),
            attention_mask=torch.from_numpy(np.array(mask, np.int64)),
        ).last_hidden_state[:, 0]
        for hook in hooks:
            hook.remove()
        head = [torch.from_numpy(np.array(params[f"head{i}"]["kernel"])) for i in (1, 2)]
        bias = [torch.from_numpy(np.array(params[f"head{i}"]["bias"])) for i in (1, 2)]
        logits = torch.tanh(pooled @ head[0] + bias[0]) @ head[1] + bias[1]
    return logits.numpy(), [state.numpy() for state in states]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", ["ids", "embeddings"])
def test_logits_and_taps(encoder, model, padded, form):
    rng = np.random.default_rng(1)
    params, table = model.init(jax.random.key(0)), model.frozen(jax.random.key(0))
    mask = np.ones((6, LENGTH), bool)
    if padded:
        mask = np.arange(LENGTH)[None] < np.asarray([1, 7, 39, 40, 20, 13])[:, None]
    ids = np.where(mask, rng.integers(1, 3300, (6, LENGTH)), 0).astype(np.int32)
    embeddings = np.asarray(table)[ids]
    if form == "embeddings":
        embeddings = rng.normal(size=embeddings.shape).astype(np.float32)
        content = Embedded(jnp.asarray(embeddings), jnp.asarray(mask))
    else:
        content = jnp.asarray(ids)
    first = np.broadcast_to(np.asarray(table)[3200], (6, 1, 32))
    whole = np.concatenate([first, embeddings], axis=1)
    seen = np.concatenate([np.ones((6, 1), bool), mask], axis=1)
    logits, states = expected(encoder, params, whole, seen)

    ours, taps = jax.jit(model.apply)(params, Text(content, table))
    np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-4)
    assert len(taps) == len(states) == 3
    for tap, state in zip(taps, states, strict=True):
        np.testing.assert_allclose(tap, state, rtol=1e-4, atol=1e-4 * np.abs(state).max())


@pytest.mark.parametrize(("buckets", "far", "length"), [(32, 128, 300), (16, 24, 40), (8, 20, 9)])
def test_position_buckets(buckets, far, length):
    from transformers.models.t5.modeling_t5 import T5Attention

    places = torch.arange(length)
    theirs = T5Attention._relative_position_bucket(
        places[None, :] - places[:, None], True, buckets, far
    )
    np.testing.assert_array_equal(t5.position_buckets(length, buckets, far), theirs.numpy())


def test_a_start_has_the_law_of_transformers():
    """Without weights: the standard deviation of every tensor, to 5%."""
    sizes = {"vocab_size": 3300, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2}
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(**sizes, num_heads=8, relative_attention_num_buckets=64)
    )
    shape = t5.T5Shape(3300, 128, 512, 2, 8, 32, 64)
    model = t5.make_classifier(shape, LENGTH, CLASSES)
    ours = model.init(jax.random.key(0))
    block = theirs.encoder.block[1].layer
    pairs = [
        (model.frozen(jax.random.key(0)), theirs.shared.weight),
        (ours["layer1"]["query"]["kernel"], block[0].SelfAttention.q.weight),
        (ours["layer1"]["key"]["kernel"], block[0].SelfAttention.k.weight),
        (ours["layer1"]["value"]["kernel"], block[0].SelfAttention.v.weight),
        (ours["layer1"]["output"]["kernel"], block[0].SelfAttention.o.weight),
        (ours["layer1"]["feed_forward_in"]["kernel"], block[1].DenseReluDense.wi.weight),
        (ours["layer1"]["feed_forward_out"]["kernel"], block[1].DenseReluDense.wo.weight),
    ]
    for mine, their in pairs:
        assert float(np.std(mine)) == pytest.approx(float(their.detach().std()), rel=0.05)


def test_a_run_from_pretrained_weights(encoder, tmp_path):
    weights, texts = tmp_path / "weights", tmp_path / "texts"
    encoder.save_pretrained(weights, safe_serialization=True)
    texts.mkdir()
    rows = [{"label": f"c{i % 2}", "text": f"word{i % 2} number{i}"} for i in range(80)]
    (texts / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = tokens.train([row["text"] for row in rows], 100)
    (weights / "tokenizer.json").write_text(tokenizer.serialised)
    config = resolve(
        "text_folder", "fedrevive", preset_scale="small", data_dir=str(texts), max_time=3,
        text_length=8, t5_weights=str(weights), workdir=str(tmp_path / "run"),
    )  # fmt: skip
    summary = runner.run(config, keep_record=True).summary
    assert summary["tokenizer"] == str(weights)
    assert summary["start"] == str(weights)
    moved = weights.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="no such folder"):
        evaluate_checkpoint(config.run_dir)
    figures = evaluate_checkpoint(config.run_dir, t5_weights=str(moved))
    assert figures["accuracy"] == summary["final_accuracy"]
    moved.rename(weights)
    assert evaluate_checkpoint(config.run_dir)["accuracy"] == summary["final_accuracy"]
    np.testing.assert_array_equal(
        Simulation(config).server.params["layer1"]["key"]["kernel"],
        encoder.encoder.block[1].layer[0].SelfAttention.k.weight.detach().numpy().T,
    )
