"""Is the converted model the model? A comparison with PyTorch transformers, positions beside it.

Compares every weight; logits and every FFN site of every layer, at short and long positions (beyond
the original context where the rotary embedding is stretched); and greedy continuations. Needs the
extra `oracle`.
"""

import contextlib
import functools
import importlib.metadata
import io
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.checkpoints.loading import LM, weights_of
from jaxneurons.convert.native import MARKER
from jaxneurons.convert.rules import fused_tensors, optional_biases, stored_names, text_part
from jaxneurons.errors import SourceError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.model.token_ids import check_ids
from jaxneurons.model.transformer import forward
from jaxneurons.storage.hashes import hash_files
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.settings import as_path, check_argument, check_number

CERTIFICATE = "certificate.json"
COMPARED_SITES = ("gate", "up", "act", "down")
_EXPERTS = (".mlp.experts", ".block_sparse_moe.experts")
SHORT, LONG = 24, 512
BEYOND = 64  # tokens past the original context
WHOLE = 1024  # tokens up to which a sequence is compared at every position, and else at so many:
LAST = 128
LLAMA3_CONTEXT = 8192  # before it was stretched; GGUF files keep the result only
NEW_TOKENS = 20
TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    if n < 2:",
    "Once upon a time there was",
)
TOLERANCE = {"largest": 1e-2, "mean": 2e-4}
"""Logit differences allowed, relative to the logits' standard deviation: some ten times what
float32 leaves on SmolLM2."""
NEAR = 4e-4
"""Two first choices whose logits are closer than this (same unit) are one choice: rounding may turn
them."""


def verify(
    lm: LM,
    against: str | os.PathLike[str],
    *,
    long: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a model with what transformers makes of the checkpoint it came from.

    Both compute in float32. A model of narrower parameters is held against the source's weights,
    rounded the same way; what its own arithmetic adds to that is reported beside it.

    Args:
      lm: the converted model.
      against: Hugging Face directory or `.gguf` file.
      long: tokens of the long sequence; default: 512, and more where the rotary embedding is
        stretched, so that it ends beyond the original context. Beyond 1,024 tokens the last 128
        positions are compared.
      progress: called with (done, of) sequences and continuations.

    Returns:
      The certificate: largest differences, absolute and relative to the standard deviation, per
      sequence, of logits and of each FFN site (worst layer); weights that differ; continuations;
      dtype, matmul precision, versions; `passed`.

    Raises:
      SourceError: PyTorch or transformers are missing, or they cannot load the checkpoint.
      ConfigError: arguments of other types.
    """
    check_argument("lm", LM, lm)
    check_argument("progress", Callable | None, progress)
    against = as_path("against", against)
    if long is not None:
        check_number("long", long, least=1)
    torch, model = _torch_model(against, lm)
    for stored in model.parameters():
        stored.data = stored.data.to(getattr(torch, lm.dtype.name)).float()
    weights = _compare_weights(lm, model.state_dict())
    length = long_enough(lm.config) if long is None else long
    sequences, continuations = _compare_texts(lm, torch, model, length, progress)
    worst = {
        "largest": max(result["logits"]["relative"] for result in sequences),
        "mean": max(result["logits"]["mean"] for result in sequences),
    }
    equal = sum(result["same"] for result in continuations)
    return {
        "passed": equal == len(TEXTS)
        and not weights["differ"]
        and all(worst[k] <= most for k, most in TOLERANCE.items()),
        "tolerance": TOLERANCE,
        "logits_worst": worst,
        "weights": weights,
        "continuations_equal": f"{equal} of {len(TEXTS)}",
        "dtype": lm.dtype.name,
        "arithmetic": "float32",
        "matmul_precision": "highest",
        "source": {"path": str(against), "sha256": _source_hash(against)},
        "result": {
            "name": lm.source,
            "sha256": lm.hash,
            **({"ignored_keys": list(lm.ignored_keys)} if lm.ignored_keys else {}),
        },
        "sequences": sequences,
        "continuations": continuations,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("jaxneurons", "jax", "flax", "transformers", "torch", "numpy")
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def _compare_texts(
    lm: LM, torch: Any, model: Any, length: int, progress: Progress | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What becomes of sequences, and of texts that are continued."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), lm.params)
    sequences = _sequences(lm, length)
    results: list[dict[str, Any]] = []
    continuations: list[dict[str, Any]] = []

    def report() -> None:
        if progress is not None:
            progress(len(results) + len(continuations), len(sequences) + len(TEXTS))

    with jax.default_matmul_precision("highest"):
        for name, ids in sequences.items():
            theirs = _torch_forward(torch, model, ids)
            result = {"sequence": name, **_compare(wide, lm, ids, theirs)}
            if lm.dtype != jnp.float32:
                logits, _ = _run(lm.params, lm, ids)
                result["own_arithmetic"] = _difference(logits, theirs[0])
            results.append(result)
            report()
        for text in TEXTS:
            continuations.append(_continue(wide, lm, torch, model, text))
            report()
    return results, continuations


def _torch_model(path: Path, lm: LM) -> tuple[Any, Any]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise SourceError(
            "verification compares with PyTorch, which is not installed: "
            "pip install torch==2.13.0 'jaxneurons[oracle]'"
        ) from None
    if (path / MARKER).is_file():
        raise SourceError(f"{path}: a native directory; give the checkpoint that it came from")
    if path.is_file() and optional_biases(lm.config):
        raise SourceError(
            f"{path}: transformers leaves the biases of a GGUF file of this architecture out; give "
            "the directory that the file was made from"
        )
    options: dict[str, Any] = {
        "dtype": torch.float32,
        # Only the plain form caps scores.
        "attn_implementation": "sdpa" if lm.config.attention_softcap is None else "eager",
        "trust_remote_code": False,
    }
    where = path
    if path.is_file():
        where, options["gguf_file"] = path.parent, path.name
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            model = AutoModelForCausalLM.from_pretrained(
                str(where), local_files_only=True, **options
            )
    except Exception as error:  # transformers raises whatever it finds
        text = " ".join(str(error).split())[:200]
        raise SourceError(f"{path}: transformers cannot load it: {text}") from None
    text = model.config.get_text_config()
    sizes = [
        (text.vocab_size, lm.config.vocab_size),
        (text.num_hidden_layers, lm.config.num_layers),
        (
            getattr(text, "moe_intermediate_size", text.intermediate_size),
            lm.config.intermediate_size,
        ),
    ]
    if any(theirs != ours for theirs, ours in sizes):
        raise SourceError(
            f"{path}: (tokens, layers, neurons) are {tuple(t for t, _ in sizes)}, those of the "
            f"converted model {tuple(o for _, o in sizes)}: not the checkpoint it came from"
        )
    return torch, model.eval()


def long_enough(config: ModelConfig) -> int:
    """Tokens of a sequence that ends beyond the original context, if that has been stretched, and
    beyond a window that is not large.
    """
    rope, least = config.rope, LONG
    if config.sliding_window is not None and config.sliding_window <= WHOLE:
        least = max(LONG, config.sliding_window + BEYOND)
    if rope.inv_freq_divisors is not None:
        original = LLAMA3_CONTEXT
    elif rope.rope_type == "linear":
        original = int(config.max_position / rope.factor)
    elif rope.rope_type == "default":
        return min(least, config.max_position)
    else:
        original = rope.original_max_position
    beyond = max(least, original + BEYOND)
    # `dynamic` begins to stretch where the stated context ends.
    return beyond if rope.rope_type == "dynamic" else min(beyond, config.max_position)


def _sequences(lm: LM, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    random = rng.integers(0, lm.config.vocab_size, length)
    text = lm.tokenizer(" ".join(TEXTS))["input_ids"][:SHORT]
    check_ids(text, lm.config.vocab_size, lm.tokenizer)
    return {
        "text": np.asarray(text, np.int32),
        f"random, {SHORT} tokens": random[:SHORT].astype(np.int32),
        f"random, {length} tokens": random.astype(np.int32),
    }


def _compared(ids: np.ndarray) -> int:
    """Positions, counted from the end, at which a sequence is compared."""
    return len(ids) if len(ids) <= WHOLE else LAST


@functools.partial(jax.jit, static_argnames=("config", "capture"))
def _forward(
    params: Params, ids: jax.Array, at: jax.Array, *, config: ModelConfig, capture: tuple[str, ...]
) -> Any:
    out = forward(params, ids, config=config, at=at, capture=capture)
    return out.logits, out.activations


def _run(
    params: Params, lm: LM, ids: np.ndarray, capture: tuple[str, ...] = ()
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits and activations of one sequence, at the positions that are compared."""
    at = jnp.arange(len(ids) - _compared(ids), len(ids))[None]
    out = _forward(params, jnp.asarray(ids)[None], at, config=lm.config, capture=capture)
    logits, sites = jax.device_get(out)
    return logits[0], {site: values[:, 0] for site, values in sites.items()}


def _compare(params: Params, lm: LM, ids: np.ndarray, theirs: Any) -> dict[str, Any]:
    logits, sites = _run(params, lm, ids, tuple(theirs[1]))
    result = {"tokens": len(ids), "logits": _difference(logits, theirs[0])}
    for site in theirs[1]:
        per_layer = [
            _difference(ours, torchs)
            for ours, torchs in zip(sites[site], theirs[1][site], strict=True)
        ]
        worst = int(np.argmax([d["relative"] for d in per_layer]))
        result[site] = {**per_layer[worst], "layer": worst}
    return result


def _difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    apart = np.abs(ours.astype(np.float32) - theirs)
    spread = max(float(np.std(theirs)), 1e-30)
    return {
        "absolute": float(apart.max()),
        "relative": float(apart.max()) / spread,
        "mean": float(apart.mean()) / spread,
    }


def _torch_forward(
    torch: Any, model: Any, ids: np.ndarray
) -> tuple[np.ndarray, Mapping[str, list[np.ndarray]]]:
    """Logits, and inputs and outputs of the feed-forward's projections in every layer.

    Of experts, what they add together.
    """
    every = [name for name, _ in model.named_modules()]
    experts = any(name.endswith(_EXPERTS) for name in every)
    sites = ("down",) if experts else COMPARED_SITES
    outputs: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    positions = _compared(ids)
    hooks = []
    for layer in getattr(model.model, "language_model", model.model).layers:
        if experts:

            def keep_sum(_: Any, inputs: Any, output: Any) -> None:
                values = output[0] if isinstance(output, tuple) else output
                outputs["down"].append(values[0, -positions:].float().numpy())

            block = getattr(layer, "block_sparse_moe", None) or layer.mlp
            hooks.append(block.register_forward_hook(keep_sum))
            continue
        whole = hasattr(layer.mlp, "gate_up_proj")  # one tensor, the gate first
        for sites in (("gate", "up"), ("down",)) if whole else (("gate",), ("up",), ("down",)):

            def keep(_: Any, inputs: Any, output: Any, sites: Sequence[str] = sites) -> None:
                if sites == ("down",):
                    outputs["act"].append(inputs[0][0, -positions:].float().numpy())
                parts = output[0, -positions:].float().numpy()
                for site, values in zip(sites, np.split(parts, len(sites), -1), strict=True):
                    outputs[site].append(values)

            module = getattr(layer.mlp, f"{'_'.join(sites)}_proj")
            hooks.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            batch = torch.tensor(ids[None], dtype=torch.long)
            logits = model(batch, logits_to_keep=positions).logits[0].float().numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, outputs


def _continue(params: Params, lm: LM, torch: Any, model: Any, text: str) -> dict[str, Any]:
    """Greedy continuations, teacher-forced on theirs: where do the first choices part?

    PyTorch's is a plain loop: `generate` follows what the checkpoint says of generation (tokens
    that end it, are padding, suppressed, forced or penalised), which the model's logits do not.
    """
    start = lm.tokenizer(text)["input_ids"]
    check_ids(start, lm.config.vocab_size, lm.tokenizer)
    ids, scores = list(start), []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            out = model(torch.tensor([ids], dtype=torch.long), logits_to_keep=1, use_cache=False)
            scores.append(out.logits[0, -1].float().numpy())
            ids.append(int(scores[-1].argmax()))
    logits, _ = _run(params, lm, np.asarray(ids, np.int32))
    ours, theirs = logits[len(start) - 1 : -1], np.asarray(ids[len(start) :])
    short = ours.max(-1) - np.take_along_axis(ours, theirs[:, None], -1)[:, 0]
    agree = short <= NEAR * np.std(scores, axis=-1)
    return {
        "text": text,
        "continuation": lm.tokenizer.decode(theirs),
        "same": bool(agree.all()),
        "tokens_agreeing": int(agree.sum()),
        "near_ties": int((agree & (short > 0)).sum()),
        "tokens": len(theirs),
    }


def _compare_weights(lm: LM, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of every tensor: sequences meet only some rows of an embedding.

    Returns:
      How many there are, and the largest difference of each that differs (None: it is not there).
    """
    differ: dict[str, float | None] = {}
    names = stored_names(lm.config, "hf")
    theirs = _apart(lm.config, theirs)
    for name, (rule, layer) in names.items():
        leaf: Any = functools.reduce(lambda tree, key: tree[key], rule.path, lm.params)
        place = () if layer is None else (layer,) if rule.expert is None else (layer, rule.expert)
        ours = np.asarray(leaf[place], np.float32)
        ours = ours.T if rule.transposed else ours
        values = theirs[name].numpy() if name in theirs else np.empty(0)
        if values.shape != ours.shape:
            differ[name] = None
        # GGUF: two programs that de-quantise may round otherwise.
        elif not np.allclose(ours, values, rtol=1e-6, atol=1e-9):
            differ[name] = float(np.abs(ours - values).max())
    return {"tensors": len(names), "differ": differ}


def _apart(config: ModelConfig, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names of `stored_names`: of the text part, those that hold several cut."""
    part = text_part(config.family, "hf")
    named = {
        plain: values
        for name, values in theirs.items()
        if (plain := name if part is None else part.name(name)) is not None
    }
    shapes = {name: rule.stored_shape for name, (rule, _) in stored_names(config, "hf").items()}
    for whole, parts in fused_tensors(config, "hf").items():
        rows = [shapes[name][0] for name in parts]
        if whole in named and math.prod(named[whole].shape[:-1]) == sum(rows):
            values = named.pop(whole)
            values = values.reshape(sum(rows), values.shape[-1])
            named |= dict(zip(parts, values.split(rows), strict=True))
    return named


def _source_hash(path: Path) -> str:
    return hash_files(weights_of(path))
