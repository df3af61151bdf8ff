"""Clean, noised and restored runs against PyTorch transformers with hooks, one run at a time."""

import jax
import numpy as np
import pytest

from jaxneurons.convert.hf import read_hf
from jaxneurons.edit.restoring import KINDS, NoisedPrompts, restored_probabilities, window_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.families import make  # noqa: E402
from support.models import tiny_config  # noqa: E402

WINDOW = 2
LENGTHS = (9, 7)  # prompt and all but the last token of the answer
SUBJECTS = ((1, 4), (0, 2))
POSITIONS = np.array([[1, 3, 5, 7], [0, 1, 5, -1]])
ANSWERS = np.array([[5, 11], [7, 3]])
SAMPLES = 2


def prompts(noise=3.0, samples=SAMPLES):
    rng = np.random.default_rng(0)
    tokens = np.zeros((2, 12), np.int32)
    added = np.zeros((samples, 2, 12, 32), np.float32)
    for row, (length, (start, end)) in enumerate(zip(LENGTHS, SUBJECTS, strict=True)):
        tokens[row, :length] = rng.integers(0, 50, length)
        tokens[row, length - 1] = ANSWERS[row, 0]
        added[:, row, start:end] = noise * 0.15 * rng.normal(size=(samples, end - start, 32))
    return NoisedPrompts(tokens, np.array(LENGTHS), ANSWERS, added, POSITIONS)


run = jax.jit(restored_probabilities, static_argnames=("config", "kinds", "window"))


@pytest.fixture(scope="module", params=["llama-biases", "qwen2-mixed"])
def models(request, tmp_path_factory):
    """One family has biases where attention's output is projected, one a window in some layers."""
    directory = tmp_path_factory.mktemp("model")
    model = make(request.param, "default", "gqa", False)
    model.save_pretrained(directory)
    config, params = read_hf(directory)
    return model, config, params


def module_of(model, kind, layer):
    block = model.model.layers[layer]
    return {"residual": block, "down": block.mlp, "o": block.self_attn}[kind]


def torch_probability(model, row, noise, kept=None, restore=None):
    """P(answer) of a run; `kept` takes what each module puts out, `restore` puts it back."""
    given, hooks = prompts(), []
    count = LENGTHS[row]
    for kind in KINDS:
        for layer in range(len(model.model.layers)):

            def hook(module, inputs, output, key=(kind, layer)):
                value = output[0] if isinstance(output, tuple) else output
                if kept is not None:
                    kept[key] = value.clone()
                if restore is not None and key in restore[0]:
                    _, position, clean = restore
                    value[:, position] = clean[key][:, position]

            hooks.append(module_of(model, kind, layer).register_forward_hook(hook))
    with torch.no_grad():
        embedded = model.model.embed_tokens(torch.tensor(given.tokens[None, row, :count])).clone()
        embedded += torch.tensor(noise[None, :count])
        logits = model(inputs_embeds=embedded).logits[0].double()
    for hook in hooks:
        hook.remove()
    steps = logits[-2:].softmax(-1)
    return float(steps[0, ANSWERS[row, 0]] * steps[1, ANSWERS[row, 1]])


def layers_restored(kind, layer, count):
    if kind == "residual":
        return [layer]
    return [at for at in (layer - 1, layer) if 0 <= at < count]  # a window of two


def test_every_run_equals_pytorch_with_hooks(models):
    model, config, params = models
    given = prompts()
    result = jax.device_get(run(params, given, config=config, window=WINDOW))
    spread = []
    for row in range(2):
        clean = {}
        p = torch_probability(model, row, np.zeros_like(given.noise[0, row]), kept=clean)
        np.testing.assert_allclose(result.clean[row], p, rtol=2e-4)
        for sample in range(SAMPLES):
            noise = given.noise[sample, row]
            p = torch_probability(model, row, noise)
            np.testing.assert_allclose(result.noised[sample, row], p, rtol=2e-4)
            for k, kind in enumerate(KINDS):
                for layer in range(config.num_layers):
                    for column, position in enumerate(POSITIONS[row]):
                        here = result.restored[sample, k, layer, column, row]
                        if position < 0:  # none: as noised
                            np.testing.assert_allclose(here, p, rtol=1e-5)
                            continue
                        keys = [(kind, at) for at in layers_restored(kind, layer, 3)]
                        theirs = torch_probability(
                            model, row, noise, restore=(keys, position, clean)
                        )
                        np.testing.assert_allclose(here, theirs, rtol=2e-4)
                        spread.append(abs(theirs - p) / p)
    assert np.median(spread) > 0.01  # the runs differ by far more than they may differ from ours


def test_without_noise_nothing_is_restored(models):
    _, config, params = models
    result = jax.device_get(run(params, prompts(noise=0.0), config=config, window=WINDOW))
    np.testing.assert_array_equal(result.noised, np.stack([result.clean] * SAMPLES))
    np.testing.assert_allclose(
        result.restored, np.broadcast_to(result.clean, result.restored.shape), rtol=1e-5
    )


def test_restoring_what_the_answer_is_read_of_gives_the_clean_run(models):
    _, config, params = models
    given = prompts()
    # An answer of one token is read at the last position alone.
    short = given._replace(targets=given.targets[:, 1:], positions=np.array(LENGTHS)[:, None] - 1)
    result = jax.device_get(run(params, short, config=config, window=WINDOW))
    last = result.restored[:, 0, -1, 0]
    np.testing.assert_array_equal(last, np.broadcast_to(result.clean, last.shape))
    assert np.all(np.abs(result.noised / result.clean - 1) > 1e-3)
    # Everything of a layer's attention and feed-forward at the noised tokens is not the stream.
    assert not np.allclose(result.restored[:, 1, -1, 0], last, rtol=1e-3)


def test_composes_with_vmap_over_parameters(models):
    _, config, params = models
    given = prompts(samples=1)
    scaled = jax.tree.map(lambda x: x * np.float32(0.9), params)
    both = jax.tree.map(lambda *x: np.stack(x), params, scaled)
    kinds = ("down",)

    def of(params):
        return restored_probabilities(params, given, config=config, kinds=kinds, window=WINDOW)

    together = jax.device_get(jax.jit(jax.vmap(of))(both))
    for i, each in enumerate((params, scaled)):
        alone = jax.device_get(run(each, given, config=config, kinds=kinds, window=WINDOW))
        np.testing.assert_allclose(together.restored[i], alone.restored, rtol=2e-5)


@pytest.mark.parametrize(("layers", "window"), [(48, 10), (30, 6), (32, 7), (6, 1), (2, 1)])
def test_windows_follow_the_depth(layers, window):
    assert window_of(tiny_config(num_layers=layers)) == window
