"""Text from tokens to DFKD: hand-worked terms, limits, laws; the rest is shared with images."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fedrevive_jax import data, models
from fedrevive_jax.clients.local_training import DROPOUT, train
from fedrevive_jax.compute.streams import Stream, jax_key
from fedrevive_jax.config import Dfkd
from fedrevive_jax.data import seed_text, tokens
from fedrevive_jax.dfkd import loss_guard, prompts, proxy, reviver, synthesis
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.messages import Upload
from fedrevive_jax.models import t5
from fedrevive_jax.models.model import (
    Embedded,
    Text,
    Vocabulary,
    gaussian_inputs,
    initial_taps,
    tap_statistics,
)
from fedrevive_jax.presets import resolve
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import KEY, arrival, submission

LENGTH = 16
SHAPE = t5.T5Shape(64, 8, 16, 2, 2, 4, 8, 16, classifier_token=3)
TEXTS = ["a red ball", "the blue sky and the red ball", "Blue water"]


# --- tokens ---------------------------------------------------------------------------------------


def test_texts_are_cut_ended_and_padded():
    letters = tokens.Tokenizer(lambda texts: [[ord(c) for c in text] for text in texts], 256)
    ids = tokens.encode(letters, ["", "ab", "abcdefg"], 5)
    assert ids.dtype == np.int32
    assert ids.tolist() == [[1, 0, 0, 0, 0], [97, 98, 1, 0, 0], [97, 98, 99, 100, 1]]


def test_a_trained_tokenizer_is_the_same_again_and_from_its_json():
    first, again = tokens.train(TEXTS, 60), tokens.train(TEXTS, 60)
    assert first.serialised == again.serialised
    restored = tokens.from_json(first.serialised)
    new = ["the red sea", "Ünknown", "RED"]
    assert restored.encode(new) == first.encode(new)
    assert first.encode(["RED"]) == first.encode(["red"])
    ids = [i for row in first.encode(TEXTS) for i in row]
    assert min(ids) >= 4  # never a special token
    assert max(ids) < first.size <= 60
    assert first.encode(["q"]) == [[tokens.UNKNOWN]]  # a letter that training never saw
    written = first.encode(["red <pad> ball </s>"])[0]
    assert not {tokens.PADDING, tokens.END, tokens.CLASSIFIER} & set(written)


def test_a_tokenizer_is_never_larger_than_asked_for():
    assert tokens.train(["abcdefghijklmnopqrstuvwxyz0123456789"], 8).size <= 8


def test_tokenizers_beside_weights(tmp_path):
    """tokenizer.json first; spiece.model where it is alone; both end and pad as T5 does."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_prefix=str(tmp_path / "spiece"), vocab_size=20,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    pieces = tokens.read(str(tmp_path))
    assert pieces.size == 20
    assert pieces.encode(["red ball"])[0] != pieces.encode(["ball red"])[0]
    (tmp_path / "tokenizer.json").write_text(tokens.train(TEXTS, 60).serialised)
    assert tokens.read(str(tmp_path)).encode(TEXTS) == tokens.train(TEXTS, 60).encode(TEXTS)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="its tokenizer cannot be read"):
        tokens.read(str(tmp_path))
    with pytest.raises(ConfigError, match="holds neither tokenizer"):
        tokens.read(str(tmp_path / "none"))


# --- the model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return t5.make_classifier(SHAPE, LENGTH, 3)


@pytest.fixture(scope="module")
def table(model):
    return model.frozen(KEY)


def test_padding_and_what_it_hides_change_nothing(model, table):
    params = model.init(KEY)
    ids = jnp.asarray([[5, 6, 7, 1] + [0] * 12])
    short, _ = model.apply(params, Text(ids[:, :4], table))
    long, taps = model.apply(params, Text(ids, table))
    np.testing.assert_allclose(short, long, atol=1e-5)
    mask = jnp.arange(LENGTH)[None] < 4
    rubbish = jnp.where(mask[..., None], table[ids], 1e3)
    hidden, _ = model.apply(params, Text(Embedded(rubbish, mask), table))
    np.testing.assert_allclose(hidden, long, atol=1e-5)
    assert [tap.shape for tap in taps] == [(1, 8)] * 2


def test_dropout_is_on_with_a_key_only_and_unbiased_in_size(model, table):
    params, text = model.init(KEY), Text(jnp.full((1, LENGTH), 5), table)
    apply = jax.jit(model.apply)
    plain = apply(params, text)[0]
    np.testing.assert_array_equal(plain, apply(params, text, None)[0])
    dropped = jnp.stack([apply(params, text, jax.random.key(i))[0] for i in range(8)])
    assert np.abs(np.asarray(dropped) - np.asarray(plain)).max() > 1e-3
    kept = t5._dropout(jnp.ones(10_000), KEY)
    share = float((kept > 0).mean())
    assert share == pytest.approx(0.9, abs=0.01)  # over three standard deviations
    assert np.unique(kept).tolist() == pytest.approx([0, 1 / 0.9])


# --- prompts --------------------------------------------------------------------------------------


def test_random_tokens_masks_and_prompts(table):
    """Embeddings are rows of the table; masks cover 4 + U{8..16} of 16 positions."""
    maker = prompts.prompt_maker(Vocabulary(64, 8), LENGTH)
    omega = maker.init(KEY)
    assert omega.shape == (4, 8)
    latents, mask = maker.draw(KEY, jax.random.key(1), jnp.zeros(6000, jnp.int32), table)
    assert latents.shape == (6000, LENGTH - 4, 8)
    rows = {row.tobytes() for row in np.asarray(table)}
    assert {row.tobytes() for row in np.asarray(latents[:20]).reshape(-1, 8)} <= rows
    covered = np.asarray(mask.sum(axis=1))
    np.testing.assert_array_equal(mask, np.arange(LENGTH)[None] < covered[:, None])
    # 4 + 8 .. 4 + 11 as they are, 4 + 12 .. 4 + 16 all cut to 16.
    counts = np.bincount(covered, minlength=17)[12:]
    assert scipy.stats.chisquare(counts, 6000 * np.asarray([1, 1, 1, 1, 5]) / 9).pvalue > 1e-3
    assert scipy.stats.chisquare(counts).pvalue < 1e-12  # the control: uniform would fail
    made = maker.make(omega, latents, mask)
    np.testing.assert_array_equal(made.embeddings[7, :4], omega)
    np.testing.assert_array_equal(made.embeddings[:, 4:], latents)


def test_seed_text_is_chosen_by_class_and_uniformly(table):
    seed = prompts.SeedText(
        jnp.asarray([[10] * LENGTH, [11] * LENGTH, [20] * LENGTH]), jnp.asarray([0, 0, 2])
    )
    maker = prompts.prompt_maker(Vocabulary(64, 8), LENGTH, seed)
    targets = jnp.asarray([0, 2, 1] * 1000)
    latents, _ = maker.draw(KEY, KEY, targets, table)
    first = np.asarray(latents[:, 0])
    of = {i: (first == np.asarray(table[i])).all(axis=1) for i in (10, 11, 20)}
    assert (of[10] | of[11])[0::3].all()
    assert of[20][1::3].all()
    assert of[10][0::3].mean() == pytest.approx(0.5, abs=0.06)  # four standard deviations
    # A class without seed text starts from random tokens, which differ within a text.
    assert not (np.asarray(latents[2]) == first[2]).all()


def test_tap_distance_by_hand():
    """Six layers: (1/6) [mean ||s2 - mu2|| + mean ||s5 - mu5||], other taps ignored."""
    states = [jnp.full((2, 2), 1e6)] * 6
    states[2] = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    states[5] = jnp.asarray([[1.0, 1.0], [1.0, 3.0]])
    reference = [(jnp.zeros(2), jnp.ones(2))] * 5 + [(jnp.ones(2), jnp.ones(2))]
    expected = ((5 + 0) / 2 + (0 + 2) / 2) / 6
    assert float(prompts.tap_distance(tuple(states), tuple(reference))) == pytest.approx(expected)
    gradient = jax.grad(lambda s: prompts.tap_distance((s, s), tuple(reference[:2])))(
        jnp.zeros((2, 2))
    )
    np.testing.assert_array_equal(gradient, 0)  # where the norm has no derivative


def ensemble(model, table, adversarial):
    params = [model.init(jax.random.key(i)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params[:2])
    text = gaussian_inputs(model, jax.random.key(8), 4, table)
    taps = tap_statistics(model.apply(params[0], text)[1])
    statistics = jax.tree.map(lambda m: jnp.stack([m, m + 0.5]), taps)
    q = jax.nn.softmax(jax.random.normal(jax.random.key(9), (2, 3)))
    return synthesis.Ensemble(stacked, statistics, q, params[2], jnp.asarray(adversarial), table)


def make_synthesiser(model, **changes):
    maker = prompts.prompt_maker(model.vocabulary, LENGTH)
    options = {
        "synthesis_batch": 6, "synthesis_steps": 2, "generator_lr": 0.01, "latent_lr": 0.1,
        "feature_weight": 0.3, "one_hot_weight": 1.0, "adversarial_weight": 0.1, **changes,
    }  # fmt: skip
    return maker, synthesis.make_synthesiser(model, maker, lambda x, key: x, Dfkd(**options))


def test_the_feature_term_is_the_weighted_sum_of_distances(model, table):
    """(1/b) sum_k [sum_i w_k(y_i)] distance_k, each teacher's distance taken by a plain call."""
    maker, synthesiser = make_synthesiser(model)
    judges = ensemble(model, table, adversarial=False)
    drawn = synthesiser.draw(KEY, judges.proxies, jnp.ones(2, bool), table)
    omega = maker.init(KEY)
    _, (terms, samples, *_) = jax.jit(synthesiser.objective)(
        synthesis.Variables(omega, drawn.latents), drawn, judges, loss_guard.init(Dfkd()), KEY
    )
    share = np.asarray(judges.proxies)[:, drawn.targets]
    weights = share / share.sum(axis=0)
    expected = 0.0
    for k in range(2):
        params = jax.tree.map(lambda leaf, k=k: leaf[k], judges.params)
        reference = jax.tree.map(lambda leaf, k=k: leaf[k], judges.taps)
        states = model.apply(params, Text(samples, table))[1]
        distance = sum(
            np.linalg.norm(np.asarray(states[t]) - np.asarray(reference[t][0]), axis=1).mean()
            for t in (0, 1)
        ) / 2  # fmt: skip
        expected += float(weights[k].sum()) * distance / 6
    assert float(terms.feature) == pytest.approx(expected, rel=1e-5)


def test_prompts_move_at_their_own_rate(model, table):
    """Adam's first step has the size of its rate, elementwise: meta_lr, not generator_lr."""
    maker, synthesiser = make_synthesiser(model)
    judges = ensemble(model, table, adversarial=True)
    drawn = synthesiser.draw(KEY, judges.proxies, jnp.ones(2, bool), table)
    omega = maker.init(KEY)
    result = jax.jit(synthesiser.synthesise)(
        synthesiser.init(omega), drawn, judges, loss_guard.init(Dfkd()), KEY
    )
    np.testing.assert_allclose(jnp.abs(result.generator.params - omega), 0.02, rtol=2e-3)
    assert isinstance(result.samples, Embedded)
    np.testing.assert_array_equal(result.samples.mask, drawn.condition)


def test_only_content_under_the_mask_is_optimised(model, table):
    maker, synthesiser = make_synthesiser(model)
    judges = ensemble(model, table, adversarial=True)
    drawn = synthesiser.draw(KEY, judges.proxies, jnp.ones(2, bool), table)

    def total(latents):
        variables = synthesis.Variables(maker.init(KEY), latents)
        return synthesiser.objective(variables, drawn, judges, loss_guard.init(Dfkd()), KEY)[0]

    moved = np.abs(jax.jit(jax.grad(total))(drawn.latents)).sum(axis=2) > 0
    np.testing.assert_array_equal(moved, np.asarray(drawn.condition)[:, 4:])


# --- the reviver ----------------------------------------------------------------------------------


def test_the_probe_feeds_unmasked_gaussian_embeddings(model, table):
    params = model.init(KEY)
    inputs = gaussian_inputs(model, jax.random.key(5), 64, table)
    assert inputs.content.mask.all()
    assert float(inputs.content.embeddings.std()) == pytest.approx(1, abs=0.03)
    logits, _ = model.apply(params, inputs)
    observed = proxy.observe(
        proxy.unknown(2, 3), model, params, params, jnp.asarray(1), jax.random.key(5),
        Dfkd(), frozen=table,
    )  # fmt: skip
    expected = jax.nn.softmax(logits / 0.8).mean(axis=0)
    np.testing.assert_allclose(observed.total[1], expected, atol=1e-6)


def small_config(**changes):
    settings = {
        "num_clients": 4, "concurrency": 2, "generation_interval": 1, "freeze_versions": 2,
        "warmup_versions": 4, "text_length": LENGTH, **changes,
    }  # fmt: skip
    return resolve("text_folder", "fedrevive", preset_scale="small", **settings)


def test_the_meta_step_of_prompts_covers_all_inner_steps(model, table):
    """lr_g * K_synth is the rate, and Adam's first step has the size of its rate."""
    config = small_config(generator_lr=0.01, synthesis_steps=3, freeze_versions=0)
    revive = reviver.create(config, model, lambda x, key: x, frozen=table)
    params = model.init(KEY)
    state = revive.init(params)
    upload = Upload(model.init(jax.random.key(3)), initial_taps(model), jnp.zeros(()))
    after, _ = jax.jit(revive.revive)(
        state, jnp.asarray(0.5), submission(upload, arrival(), params)
    )
    moved = jnp.abs(after.generator.params - state.generator.params)
    np.testing.assert_allclose(moved, 0.03, rtol=2e-3)


def embeddings_of(pool):
    """Packed as rows: 16 times 8 numbers, or 32, fill whole tiles."""
    assert pool.samples.embeddings.ndim == 2
    return np.asarray(pool.samples.embeddings).reshape(len(pool.labels), LENGTH, -1)


def test_synthesis_starts_from_the_seed_text(model, table):
    """With a rate of nearly zero the pool holds the seed text's embeddings."""
    seed = prompts.SeedText(jnp.full((3, LENGTH), 9), jnp.arange(3))
    config = small_config(latent_lr=1e-9, freeze_versions=0)
    revive = reviver.create(config, model, lambda x, key: x, frozen=table, seed_text=seed)
    params = model.init(KEY)
    upload = Upload(model.init(jax.random.key(3)), initial_taps(model), jnp.zeros(()))
    state, _ = jax.jit(revive.revive)(
        revive.init(params), jnp.asarray(0.5), submission(upload, arrival(), params)
    )
    made = embeddings_of(state.pool)[:16, prompts.PROMPTS :]
    np.testing.assert_allclose(made, np.broadcast_to(table[9], made.shape), atol=1e-6)


def test_gates_of_text(model, table):
    """Synthesis from version 2, distillation above version 4, blended only then."""
    revive = reviver.create(small_config(), model, lambda x, key: x, frozen=table)
    params = model.init(KEY)
    state = revive.init(params)
    step = jax.jit(revive.revive)
    upload = Upload(model.init(jax.random.key(3)), initial_taps(model), jnp.zeros(()))
    seen = []
    for version in range(7):
        state, revival = step(
            state, jnp.asarray(0.5), submission(upload, arrival(version, 0, version, 2), params)
        )
        seen.append((int((state.pool.labels >= 0).sum()), bool(revival.distilled)))
    # 16 samples a synthesis, 64 places.
    assert [added for added, _ in seen] == [0, 0, 16, 32, 48, 64, 64]
    assert [distilled for _, distilled in seen] == [False] * 5 + [True] * 2
    assert embeddings_of(state.pool).shape == (64, LENGTH, 8)
    np.testing.assert_array_equal(state.frozen, table)


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus():
    """Texts whose class is told by half of their words."""
    rng = np.random.default_rng(0)
    own = [[f"topic{c}word{i}" for i in range(5)] for c in range(3)]
    common = [f"common{i}" for i in range(10)]
    labels = np.arange(240, dtype=np.int32) % 3
    texts = [" ".join(rng.choice([*own[c], *common[:5]], 8)) for c in labels]
    tokenizer = tokens.train(texts, 128)
    splits = data.split_training(200, 0)
    splits["test"] = np.arange(200, 240, dtype=np.int32)
    return data.Dataset(
        "corpus", 3, tokens.encode(tokenizer, texts, LENGTH), labels, splits,
        class_names=("zero", "one", "two"), tokenizer=tokenizer,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_learns_and_never_moves_the_table(corpus):
    config = small_config(
        max_time=8, local_iterations=8, client_lr=0.01, server_lr=0.5, vocabulary_size=128
    )
    simulation = Simulation(config, corpus)
    before = np.asarray(simulation.server.method_state.rule.frozen)
    start = simulation.evaluate().accuracy
    distilled = [float(r.metrics["distillation"]) for r in simulation.arrivals()]
    assert np.isfinite(distilled).any()
    assert simulation.evaluate().accuracy > max(0.6, start)
    np.testing.assert_array_equal(simulation.server.method_state.rule.frozen, before)


def test_clients_train_with_dropout_and_others_judge_without(corpus):
    config = small_config(vocabulary_size=128)
    simulation = Simulation(config, corpus)
    simulation.train_ahead()
    job = int(simulation.windows[0].jobs[0])
    client = int(simulation.schedule.client[job])
    positions = simulation._shards.batches(client, 0, steps=2, batch_size=8, seed=config.seed)
    frozen = simulation.server.method_state.rule.frozen

    def losses(key_of):
        def batch_of(step):
            ids, labels, number = step
            return Text(ids, frozen), labels, key_of(number)

        steps = (jnp.asarray(corpus.samples[positions]), jnp.asarray(corpus.labels[positions]))
        start = simulation.server.params
        batches = (*steps, jnp.arange(2))
        return train(simulation.model, start, batches, batch_of, config.client_lr).losses.mean()

    def dropout_key(step):
        key = jax_key(config.seed, Stream.AUGMENTATION, job, step)
        return jax.random.fold_in(key, DROPOUT)

    found = float(simulation._uploads[job].loss)
    assert found == pytest.approx(float(losses(dropout_key)), abs=1e-5)
    assert abs(found - float(losses(lambda step: None))) > 1e-3


def test_real_text_teaches_the_reference_method(corpus):
    config = small_config(max_time=3, vocabulary_size=128)
    reference = {"method": "dd_fedrevive", "samples": "real", "freeze_versions": 0}
    config = resolve(**{**config.as_dict(), **reference, "warmup_versions": 0})
    simulation = Simulation(config, corpus)
    assert simulation.server.method_state.rule.pool.samples.dtype == jnp.int32
    receipts = list(simulation.arrivals())
    assert float(receipts[-1].metrics["beta"]) > 0


def test_seed_text_file(corpus, tmp_path):
    path = tmp_path / "seed.jsonl"
    rows = [{"label": "one", "text": "topic1word1 common1"}, {"label": 2, "text": "common2"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    ids, labels = seed_text.read(str(path), corpus)
    assert labels.tolist() == [1, 2]
    assert ids.shape == (2, LENGTH)
    # With a rate of nearly zero the pool holds the seed text's embeddings.
    config = small_config(
        max_time=3, seed_text=str(path), vocabulary_size=128, latent_lr=1e-9, freeze_versions=0
    )
    simulation = Simulation(config, corpus)
    other = Simulation(dataclasses.replace(config, seed_text=""), corpus)
    assert simulation.fingerprint != other.fingerprint
    assert all(bool(receipt.accepted) for receipt in simulation.arrivals())
    state = simulation.server.method_state.rule
    made = embeddings_of(state.pool)[state.pool.labels == 1][:, prompts.PROMPTS :]
    wanted = state.frozen[ids[0, : LENGTH - prompts.PROMPTS]]
    assert len(made)
    np.testing.assert_allclose(made, np.broadcast_to(wanted, made.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no texts"),
        (b"\xff\xfe", "line 1: is not UTF-8"),
        (b"not json", "line 1: is not JSON"),
        (b"[1]", "line 1: must hold a 'label'"),
        (b'{"label": 1, "text": " "}', "line 1: must hold a 'text'"),
        (b'{"label": 1, "text": "\\ud83d"}', "line 1: its text is not valid Unicode"),
        (b'{"label": true, "text": "a"}', "line 1: has label True"),
        (b'{"label": 1, "text": "a"}\n{"label": "four", "text": "b"}', "line 2: has label 'four'"),
        (b'{"label": 3, "text": "a"}', "must be a class name or 0..2"),
    ],
)
def test_bad_seed_text(corpus, tmp_path, content, message):
    path = tmp_path / "seed.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        seed_text.read(str(path), corpus)


def test_token_ids_beyond_the_table_are_refused(corpus):
    with pytest.raises(
        ConfigError, match="the token table has 16 rows; the tokenizer of corpus has"
    ):
        Simulation(small_config(vocabulary_size=16), corpus)


def test_seed_text_that_is_not_there_or_not_for_text(corpus, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        seed_text.read(str(tmp_path / "none"), corpus)
    with pytest.raises(ConfigError, match="digits is not text"):
        seed_text.read("any", data.load(resolve("digits")))


def test_a_model_of_images_is_refused(corpus):
    with pytest.raises(ConfigError, match="model=convnet: does not read text; must be t5"):
        Simulation(small_config(model="convnet"), corpus)
    with pytest.raises(ConfigError, match="model=t5: does not read images; must be one of"):
        Simulation(resolve("digits", "fedbuff", model="t5"))


def test_half_precision_of_an_encoder():
    """The token table stays as it is, the weights of attention and the norms are in float32."""
    shape = t5.T5Shape(
        vocabulary=50, width=16, feed_forward=32, layers=2, heads=2, head_width=8,
        classifier_token=3,
    )  # fmt: skip
    single = t5.make_classifier(shape, 12, 4)
    half = models.with_precision(single, "bfloat16")
    params, table = single.init(jax.random.key(0)), single.frozen(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (6, 12), 1, 50)
    (ours, states), (theirs, expected) = (m.apply(params, Text(ids, table)) for m in (half, single))
    assert ours.dtype == jnp.float32
    assert states[0].dtype == jnp.bfloat16
    for a, b in ((ours, theirs), (states[-1].astype(jnp.float32), expected[-1])):
        assert 0 < float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 0.05
