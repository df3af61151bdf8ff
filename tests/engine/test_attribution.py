"""Attribution against a plain oracle, against PyTorch, and against itself."""

import copy
import functools
import json
from importlib import resources

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attributing import difference, oracle
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import SITES, ConfigError, Quadrature, RopeConfig, forward, integrated_gradients
from jaxneurons.engine.quadrature import PANEL_NODES, nodes_and_weights
from jaxneurons.engine.row_memory import rows_in_budget
from jaxneurons.engine.rows import evaluate, prefill, sweep


@functools.cache
def attribute(config, quadrature=Quadrature(), **options):
    make = jax.jit if config.num_layers > 3 else compiled
    return make(
        functools.partial(integrated_gradients, config=config, quadrature=quadrature, **options)
    )


LENGTHS = jnp.array([7, 4, 1])
SHAPES = {
    "gqa-untied": tiny_config(),
    "mqa-tied-window": tiny_config(num_kv_heads=1, tied=True, sliding_window=3),
    "mha-wide-heads": tiny_config(num_layers=2, num_kv_heads=4, head_dim=12),
    "biases-some-windows-dynamic": tiny_config(
        biases=("q", "k", "v"),
        sliding_window=3,
        sliding_layers=(False, True, True),
        rope=RopeConfig(rope_type="dynamic", factor=3.0, original_max_position=5),
    ),
}


def case(config, seed=0):
    params, tokens = tiny_params(config, seed), random_tokens(config, (3, 7), seed)
    return params, tokens, random_tokens(config, (3,), seed + 1)


CASES = [
    *[("gqa-untied", site, "gauss") for site in ("up", "act", "k", "o")],
    ("gqa-untied", "up", "right"),
    ("mqa-tied-window", "v", "reference"),
    ("mha-wide-heads", "q", "gauss"),
    ("biases-some-windows-dynamic", "k", "gauss"),
]
MORE_CASES = [
    *[("gqa-untied", site, "gauss") for site in SITES if site not in ("up", "act", "k", "o")],
    ("gqa-untied", "up", "reference"),
    *[("mqa-tied-window", site, "reference") for site in ("up", "k")],
    ("mha-wide-heads", "act", "right"),
    ("biases-some-windows-dynamic", "up", "gauss"),
]


@pytest.mark.parametrize(
    ("shape", "site", "rule"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
)
def test_equals_the_plain_oracle(shape, site, rule):
    config = SHAPES[shape]
    params, tokens, targets = case(config)
    out = attribute(config, Quadrature(rule=rule, steps=4), site=site)(
        params, tokens, targets, lengths=LENGTHS
    )
    x, w = nodes_and_weights(rule, 4)
    scores, zero, one = oracle(params, tokens, LENGTHS, targets, config=config, site=site, x=x, w=w)
    # At the only position of a one-token prompt attention has nothing to choose from: q and k
    # score zero there, and a relative difference means nothing.
    trivial = np.linalg.norm(scores, axis=-1) < 1e-9
    assert not trivial[:2].any()
    assert trivial[2].all() == (site in "qk")
    assert difference(out.scores, scores)[~trivial].max() < 1e-5
    assert np.abs(np.asarray(out.scores)[trivial]).max(initial=0) < 1e-9
    np.testing.assert_allclose(out.ablated, zero, rtol=1e-5)
    np.testing.assert_allclose(out.probability, one[:, 0], rtol=1e-5)
    gap = np.abs(np.asarray(out.scores).sum(-1) - (np.asarray(out.probability)[:, None] - zero))
    np.testing.assert_allclose(out.gap, gap, atol=1e-6)
    assert (np.asarray(out.nodes) == 4).all()


ADAPTIVE = pytest.param("adaptive", marks=pytest.mark.slow)


@pytest.mark.parametrize("rule", ["gauss", ADAPTIVE])
def test_answers_of_several_tokens(rule):
    config = tiny_config(num_layers=2)
    params, tokens, _ = case(config)
    answers, answer_lengths = random_tokens(config, (3, 3), 9), jnp.array([3, 1, 2])
    quadrature = Quadrature(rule=rule, steps=4)
    out = attribute(config, quadrature)(
        params, tokens, answers, lengths=LENGTHS, answer_lengths=answer_lengths
    )
    one = attribute(config, quadrature)
    for row in range(3):
        steps = []
        for step in range(int(answer_lengths[row])):
            prompt = np.concatenate([tokens[row, : LENGTHS[row]], answers[row, :step]])
            padded = jnp.asarray(np.pad(prompt, (0, 9 - len(prompt))))[None]
            steps.append(
                one(params, padded, answers[row, step, None], lengths=jnp.array([len(prompt)]))
            )
        for name in ("scores", "probability", "ablated", "gap"):
            mean = np.mean([np.asarray(getattr(step, name)[0]) for step in steps], axis=0)
            np.testing.assert_allclose(getattr(out, name)[row], mean, rtol=1e-4, atol=2e-6)
        expected = np.mean([np.asarray(step.scores[0]) for step in steps], axis=0)
        assert difference(out.scores[row], expected).max() < (1e-5 if rule == "gauss" else 1e-3)
        nodes = np.sum([np.asarray(step.nodes[0]) for step in steps], axis=0)
        np.testing.assert_array_equal(out.nodes[row], nodes)


# --- the adaptive rule ----------------------------------------------------------------------------


SOME_SITES = ["up", *(pytest.param(site, marks=pytest.mark.slow) for site in ("o", "gate"))]


@pytest.mark.parametrize("site", SOME_SITES)
def test_adaptive_converges_and_is_complete(site):
    config = SHAPES["gqa-untied"]
    params, tokens, targets = case(config)

    def run(quadrature):
        return attribute(config, quadrature, site=site)(params, tokens, targets, lengths=LENGTHS)

    fine = run(Quadrature("gauss", steps=256))
    for tolerance in (5e-4, 1e-5):
        out = run(Quadrature(tolerance=tolerance, max_nodes=300))
        assert difference(out.scores, fine.scores).max() < 2 * tolerance + 1e-5
        size = np.linalg.norm(out.scores, axis=-1)
        assert (np.asarray(out.gap) < tolerance * size + 1e-6).all()
        np.testing.assert_allclose(out.ablated, fine.ablated, atol=1e-6)


@functools.cache
def likeliest(config):
    def tokens(*args, **options):
        return forward(*args, config=config, **options).logits[:, 0].argmax(-1)

    return compiled(tokens)


def sharp(config, factor, seed):
    """A model whose answer turns over in a small part of the path."""
    params = tiny_params(config, seed)
    ffn = params["layers"]["ffn"]
    ffn["up"]["kernel"] = ffn["up"]["kernel"].at[0].multiply(factor)
    params["embed"]["embedding"] = params["embed"]["embedding"] * 0.2
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 4
    return params


@pytest.mark.slow
@pytest.mark.parametrize("factor", [5.0, 20.0, 100.0])
@pytest.mark.parametrize("max_nodes", [16, 1000])
def test_adaptive_knows_what_it_does_not_know(factor, max_nodes):
    config = tiny_config(num_layers=2)
    tokens = random_tokens(config, (3, 7))
    options = {"lengths": LENGTHS}
    params = sharp(config, factor, seed=3)
    targets = likeliest(config)(params, tokens, **options)
    fine = attribute(config, Quadrature("gauss", steps=2048))(params, tokens, targets, **options)
    out = attribute(config, Quadrature(max_nodes=max_nodes))(params, tokens, targets, **options)
    true = difference(out.scores, fine.scores)
    estimate = np.asarray(out.error)
    # Either right, or it says so.
    assert (true < np.maximum(1e-3, 2 * estimate)).all(), (true, estimate)
    assert (np.asarray(out.nodes).sum(-1) <= max_nodes * config.num_layers).all()


@pytest.mark.slow
def test_more_nodes_are_spent_only_where_they_are_needed():
    config = tiny_config(num_layers=2)
    params, tokens = sharp(config, 20.0, seed=3), random_tokens(config, (3, 7))
    targets = likeliest(config)(params, tokens, lengths=LENGTHS)
    run = functools.partial(attribute, config)
    spent = {}
    for most in (PANEL_NODES, 16, 1000):
        out = run(Quadrature(max_nodes=most))(params, tokens, targets, lengths=LENGTHS)
        spent[most] = np.asarray(out.nodes)
        assert (spent[most].sum(-1) <= most * config.num_layers).all()
    assert (spent[PANEL_NODES] == PANEL_NODES - 1).all()  # one panel; its end at 1 is shared
    assert (spent[1000][:, 0] > spent[1000][:, 1]).all()  # the step is in layer 0


# --- chunks, transformations, compilations --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gauss", "adaptive"])
def test_chunks_change_nothing(rule):
    config = tiny_config(num_layers=2)
    params, tokens, targets = case(config)
    quadrature = Quadrature(rule, steps=4)
    one = attribute(config, quadrature)(params, tokens, targets, lengths=LENGTHS)
    for options in ({"chunk_rows": 1}, {"memory_budget": 100_000}):
        two = attribute(config, quadrature, **options)(params, tokens, targets, lengths=LENGTHS)
        assert difference(two.scores, one.scores).max() < 1e-5
        np.testing.assert_allclose(two.ablated, one.ablated, rtol=1e-5)
        np.testing.assert_array_equal(two.nodes, one.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gqa-untied", "biases-some-windows-dynamic"])
def test_many_keys_change_nothing(shape, monkeypatch):
    """Attention in blocks, and scores computed again: as for prompts of thousands of tokens."""
    config = SHAPES[shape]
    params, tokens, targets = case(config)
    x, w = nodes_and_weights("gauss", 4)
    scores, zero, _ = oracle(params, tokens, LENGTHS, targets, config=config, site="up", x=x, w=w)
    monkeypatch.setattr("jaxneurons.model.blockwise.MOST_SCORES", 12)
    monkeypatch.setattr("jaxneurons.engine.rows.MANY_KEYS", 2)

    @compiled
    def run(params, tokens, targets, lengths):
        return integrated_gradients(
            params,
            tokens,
            targets,
            config=config,
            lengths=lengths,
            quadrature=Quadrature("gauss", 4),
        )

    out = run(params, tokens, targets, LENGTHS)
    assert difference(out.scores, scores).max() < 1e-5
    np.testing.assert_allclose(out.ablated, zero, rtol=1e-5)
    padded = jnp.pad(tokens[:1], ((0, 0), (0, 9)), constant_values=3)  # alone, and longer
    alone = run(params, padded, targets[:1], LENGTHS[:1])
    assert difference(alone.scores, scores[:1]).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gauss", "adaptive"])
def test_answers_of_many_tokens_some_at_a_time(rule, monkeypatch):
    config = tiny_config(num_layers=2)
    params, tokens, _ = case(config)
    answers, answer_lengths = random_tokens(config, (3, 5), 9), jnp.array([5, 1, 3])
    quadrature = Quadrature(rule, steps=4)

    def run():
        @compiled
        def found(params, tokens, answers):
            return integrated_gradients(
                params,
                tokens,
                answers,
                config=config,
                lengths=LENGTHS,
                answer_lengths=answer_lengths,
                quadrature=quadrature,
                chunk_rows=60,
            )

        return found(params, tokens, answers)

    together = run()
    monkeypatch.setattr("jaxneurons.engine.attribution.MANY_ANSWERS", 2)
    apart = run()
    assert difference(apart.scores, together.scores).max() < 1e-5
    for name in ("probability", "ablated", "gap"):
        np.testing.assert_allclose(
            getattr(apart, name), getattr(together, name), rtol=1e-5, atol=1e-7
        )
    np.testing.assert_array_equal(apart.nodes, together.nodes)


def test_rows_follow_the_budget():
    config = tiny_config()
    few, more = (rows_in_budget(config, 100, budget) for budget in (10**6, 2 * 10**6))
    assert 1 < few < more
    assert more == pytest.approx(2 * few, abs=1)
    assert rows_in_budget(config, 100, 1) == 1
    # Scores of many keys are kept for one layer at a time.
    deep = tiny_config(num_layers=60)
    assert rows_in_budget(deep, 1100, 10**7) > 2 * rows_in_budget(deep, 1000, 10**7)


@pytest.mark.parametrize("rule", ["gauss", ADAPTIVE])
def test_inside_jit_and_vmap(rule):
    config = tiny_config(num_layers=2)
    params, tokens, targets = case(config)
    quadrature = Quadrature(rule, steps=4)
    plain = functools.partial(integrated_gradients, config=config, quadrature=quadrature)
    # Without jit every operation is compiled by itself: once is enough.
    outside = (plain if rule == "gauss" else attribute(config, quadrature))(
        params, tokens, targets, lengths=LENGTHS
    )
    jitted = compiled(lambda *args: plain(*args[:3], lengths=args[3]))(
        params, tokens, targets, LENGTHS
    )

    def single(row, target, length):
        out = plain(params, row[None], target[None], lengths=length[None])
        return jax.tree.map(lambda x: x[0], out)

    mapped = compiled(jax.vmap(single))(tokens, targets, LENGTHS)
    for other in (jitted, mapped):
        assert difference(other.scores, outside.scores).max() < 1e-5
        np.testing.assert_allclose(other.gap, outside.gap, atol=1e-6)
        np.testing.assert_array_equal(other.nodes, outside.nodes)


@pytest.mark.parametrize("rule", ["gauss", "adaptive"])
def test_one_trace_for_one_shape(rule):
    config = tiny_config(num_layers=1)
    quadrature = Quadrature(rule, steps=4)
    chex.clear_trace_counter()

    @compiled
    @chex.assert_max_traces(n=1)
    def run(params, tokens, targets, lengths):
        return integrated_gradients(
            params, tokens, targets, lengths=lengths, config=config, quadrature=quadrature
        )

    for seed in range(3):
        params, tokens, targets = case(config, seed)
        run(params, tokens, targets, jnp.array([7, 1 + seed, 3]))
    with pytest.raises(AssertionError, match="is traced > 1 times"):
        run(params, tokens[:2], targets[:2], jnp.array([7, 3]))  # another shape


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gauss", "adaptive"])
def test_bfloat16_parameters_give_float32_scores(rule):
    config = tiny_config(num_layers=2)
    params, tokens, targets = case(config)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    run = attribute(config, Quadrature(rule, steps=4))
    out, wide = (run(p, tokens, targets, lengths=LENGTHS) for p in (half, params))
    for name in ("scores", "probability", "ablated", "gap", "error"):
        values = getattr(out, name)
        assert values.dtype == jnp.float32
        assert np.isfinite(values).all()
    assert difference(out.scores, wide.scores).max() < 0.3


@pytest.mark.usefixtures("as_users_call")
def test_bad_arguments():
    config = tiny_config(num_layers=1)
    params, tokens, targets = case(config)
    with pytest.raises(ConfigError, match="unknown site 'upp'; did you mean 'up'"):
        integrated_gradients(params, tokens, targets, config=config, site="upp")
    with pytest.raises(ConfigError, match=r"got \(3, 7\) and \(2,\)"):
        integrated_gradients(params, tokens, targets[:2], config=config)


# --- SmolLM2 --------------------------------------------------------------------------------------


def prompts_and_answers(lm, samples, count=20):
    """Varied prompts with their answer's first token, as (ids, token); half of them questions.

    The questions are the sample's, whatever `--data` says: what is measured stays the same.
    """
    path = resources.files("jaxneurons.data") / "facts.jsonl"
    facts = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [(fact["prompts"][0], " " + fact["answer"]) for fact in facts[:: len(facts) // count]]
    questions = list(json.loads((samples / "qrneuron/subject_qa.json").read_text()).values())
    chosen = questions[:: len(questions) // (count // 2)]
    multi_choice = [(q["sentences"][0], " " + q["obj_label"][0]) for q in chosen]
    texts = texts[: 2 * (count // 2) : 2] + multi_choice[: count // 2]
    tokenize = lm.tokenizer
    return [
        (np.asarray(tokenize(text)["input_ids"], np.int32), tokenize(answer)["input_ids"][0])
        for text, answer in texts[:count]
    ]


def padded(ids):
    """One prompt at a time, padded to one length if it can be: each is another program."""
    length = -(-len(ids) // 192) * 192
    return jnp.asarray(np.pad(ids, (0, length - len(ids))))[None]


def real_attribution(lm, quadrature):
    run = attribute(lm.config, quadrature)

    def of(ids, answer):
        return jax.tree.map(
            lambda x: np.asarray(x)[0],
            run(lm.params, padded(ids), jnp.array([answer]), lengths=jnp.array([len(ids)])),
        )

    return of


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        ("reference", 6),
        pytest.param("right", 6, marks=pytest.mark.slow),
        pytest.param("gauss", 6, marks=pytest.mark.slow),
    ],
)
def test_smollm2_equals_the_published_procedure(smollm2, torch_smollm2, published, rule, steps):
    model = copy.deepcopy(torch_smollm2[0]).double()
    ids = np.asarray(smollm2.tokenizer(FACT)["input_ids"], np.int32)
    answer = smollm2.tokenizer(" Paris")["input_ids"][0]
    chosen = [0, 1, 15, 29]
    theirs = published.published_attribution(
        model, ids[None], answer, layers=chosen, steps=steps, rule=rule
    )
    ours = real_attribution(smollm2, Quadrature(rule, steps=steps))(ids, answer)
    # In float64: PyTorch's own float32 is up to 2.5e-4 away from it on this prompt.
    assert difference(ours.scores[chosen], theirs).max() < 1e-4


FACT = (
    "The capital of Germany is Berlin, the capital of Italy is Rome, and the capital of France is"
)


def finely(lm):
    """Scores by 256 nodes of layer 0, whose path has a step, and by 32 of the others."""
    (x, w), (many, weights) = nodes_and_weights("gauss", 32), nodes_and_weights("gauss", 256)
    options = {"config": lm.config, "site": "up"}

    @jax.jit
    def run(params, tokens, targets, lengths):
        pre = prefill(params, tokens, targets, config=lm.config, lengths=lengths)
        scores = sweep(params, pre, x, w, rows=300, **options)[1][0, 0]
        alpha = jnp.asarray(many, jnp.float32)[None, None]
        gradient = evaluate(params, pre, jnp.zeros(alpha.shape, jnp.int32), alpha, **options)[1]
        return scores.at[0].set(jnp.einsum("mw,m->w", gradient[0, 0], weights.astype(np.float32)))

    def of(ids, answer):
        return run(lm.params, padded(ids), jnp.array([[answer]]), jnp.array([len(ids)]))

    return of


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_adaptive_equals_256_nodes(smollm2, samples):
    adaptive, fine = real_attribution(smollm2, Quadrature()), finely(smollm2)
    gauss = real_attribution(smollm2, Quadrature("gauss", steps=256))
    prompts = prompts_and_answers(smollm2, samples)
    for ids, answer in (prompts[0], prompts[5]):
        scores = gauss(ids, answer).scores
        assert difference(adaptive(ids, answer).scores, scores).max() < 1e-3
        assert difference(fine(ids, answer), scores).max() < 1e-4


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_adaptive_is_complete_and_exact_on_varied_prompts(smollm2, samples):
    adaptive, fine = real_attribution(smollm2, Quadrature()), finely(smollm2)
    for ids, answer in prompts_and_answers(smollm2, samples):
        out = adaptive(ids, answer)
        assert out.gap.max() < 1e-3
        assert np.median(out.gap) < 1e-5
        assert out.nodes.sum() <= 16 * smollm2.config.num_layers
        assert difference(out.scores, fine(ids, answer)).max() < 1e-3
