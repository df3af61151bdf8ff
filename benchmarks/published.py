"""The published QRNCA attribution in PyTorch, as a baseline and as an oracle.

Written from the description of the procedure (Chen, Dejl, Toni, arXiv 2406.10868, section 2 of
the method), with forward hooks on a ``transformers`` model. It shares nothing with jaxneurons
and imports no JAX, so that an agreement between the two means something.

For every layer, `published_attribution` runs a baseline pass over the whole prompt to read the
site's activation f at the last position, then `steps` full-sequence passes, `batch` at a time,
in which a hook overwrites that activation with alpha * f, and takes the gradient of the target
token's probability. Logits are computed at every position, as the published procedure does.
`lean_attribution` gives the same numbers with two obvious savings: one baseline pass shared by
all layers, and logits for the last position only. Both still run every node on the whole prompt.

All arithmetic is in the model's dtype: ``model.double()`` makes it a float64 oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

Rule = Literal["reference", "right", "gauss"]
Site = Literal["up", "gate", "act", "down", "q", "k", "v", "o"]

_PROJECTION: dict[str, str] = {
    "up": "mlp.up_proj",
    "gate": "mlp.gate_proj",
    "act": "mlp.down_proj",  # its input
    "down": "mlp.down_proj",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}


def load_torch(
    gguf_path: str | Path,
    threads: int | None = None,
    *,
    attention: Literal["sdpa", "eager"] = "sdpa",
    device: str = "cpu",
) -> tuple[Any, Any]:
    """Load a GGUF file as a frozen float32 `transformers` model, with its tokenizer.

    `threads`, where given, sets PyTorch's number of CPU threads (for the whole process).
    """
    from transformers import (  # pyright: ignore[reportMissingImports]
        AutoModelForCausalLM,
        AutoTokenizer,
    )

    if threads is not None:
        torch.set_num_threads(threads)
    path = Path(gguf_path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation=attention
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.to(device).eval().requires_grad_(False), tokenizer


def path_nodes(steps: int, rule: Rule = "reference") -> tuple[np.ndarray, np.ndarray]:
    """Nodes alpha and weights of a quadrature rule on [0, 1], both float64.

    `reference` is what the public code does (both ends included, every node 1/steps), `right` is
    the paper's formula (k/steps for k = 1..steps), `gauss` is Gauss-Legendre.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if rule == "reference":
        return np.linspace(0.0, 1.0, steps), np.full(steps, 1.0 / steps)
    if rule == "right":
        return np.arange(1, steps + 1) / steps, np.full(steps, 1.0 / steps)
    if rule == "gauss":
        x, w = np.polynomial.legendre.leggauss(steps)
        return (x + 1.0) / 2.0, w / 2.0
    raise ValueError(f"unknown rule {rule!r}; one of {', '.join(get_args(Rule))}")


def published_attribution(
    model: Any,
    input_ids: torch.Tensor | np.ndarray | Sequence[Sequence[int]],
    target_id: int,
    *,
    layers: Sequence[int],
    steps: int = 16,
    batch: int = 8,
    rule: Rule = "reference",
    site: Site = "up",
) -> np.ndarray:
    """Attribution of P(target at the last position) to one site, as published.

    Returns float32 scores [len(layers), width of the site]: f times the path mean of dP/df, where
    only the last position of one layer is scaled at a time.
    """
    ids = _as_ids(model, input_ids)
    rows = []
    for layer in layers:
        f = _capture(model, ids, [layer], site)[0]
        rows.append(_layer_scores(model, ids, target_id, layer, f, steps, batch, rule, site, 0))
    return np.stack(rows)


def lean_attribution(
    model: Any,
    input_ids: torch.Tensor | np.ndarray | Sequence[Sequence[int]],
    target_id: int,
    *,
    layers: Sequence[int],
    steps: int = 16,
    batch: int = 8,
    rule: Rule = "reference",
    site: Site = "up",
) -> np.ndarray:
    """Compute what `published_attribution` does, with one baseline pass and last-position logits.

    The nodes still run on the whole prompt, `batch` at a time.
    """
    ids = _as_ids(model, input_ids)
    activations = _capture(model, ids, layers, site, logits_to_keep=1)
    return np.stack(
        [
            _layer_scores(model, ids, target_id, layer, f, steps, batch, rule, site, 1)
            for layer, f in zip(layers, activations, strict=True)
        ]
    )


@torch.no_grad()
def path_probabilities(
    model: Any,
    input_ids: torch.Tensor | np.ndarray | Sequence[Sequence[int]],
    target_id: int,
    *,
    layers: Sequence[int],
    alphas: Sequence[float] = (0.0, 1.0),
    site: Site = "up",
) -> np.ndarray:
    """P(target) along each layer's path: float32 [len(layers), len(alphas)].

    With the default `alphas`, column 1 minus column 0 is what a layer's attributions sum to.
    """
    ids = _as_ids(model, input_ids)
    activations = _capture(model, ids, layers, site, logits_to_keep=1)
    scale = torch.tensor(list(alphas), dtype=model.dtype, device=ids.device)[:, None]
    rows = []
    for layer, f in zip(layers, activations, strict=True):
        probability = _target_probability(model, ids, target_id, layer, scale * f, site, 1)
        rows.append(probability.cpu().numpy())
    return np.stack(rows).astype(np.float32)


def _layer_scores(
    model: Any,
    ids: torch.Tensor,
    target_id: int,
    layer: int,
    f: torch.Tensor,
    steps: int,
    batch: int,
    rule: Rule,
    site: Site,
    logits_to_keep: int,
) -> np.ndarray:
    """Attribution of one layer: weighted sum of gradients over the nodes, times f."""
    alphas, weights = path_nodes(steps, rule)
    total = torch.zeros_like(f)
    for start in range(0, steps, batch):
        part = slice(start, start + batch)
        alpha = torch.tensor(alphas[part], dtype=f.dtype, device=f.device)
        weight = torch.tensor(weights[part], dtype=f.dtype, device=f.device)
        scaled = (alpha[:, None] * f).requires_grad_(True)
        probability = _target_probability(
            model, ids, target_id, layer, scaled, site, logits_to_keep
        )
        (gradient,) = torch.autograd.grad(probability.sum(), scaled)
        total += (weight[:, None] * gradient).sum(0)
    return (total * f).cpu().numpy().astype(np.float32)


def _target_probability(
    model: Any,
    ids: torch.Tensor,
    target_id: int,
    layer: int,
    values: torch.Tensor,
    site: Site,
    logits_to_keep: int,
) -> torch.Tensor:
    """P(target) [rows], with row i of `values` in place of the site's last-position activation.

    `logits_to_keep` is the model's own argument: 0 computes the logits of every position.
    """

    def overwrite(activation: torch.Tensor) -> torch.Tensor:
        activation = activation.clone()
        activation[:, -1] = values
        return activation

    with _hook(model, layer, site, overwrite):
        logits = model(
            ids.repeat(values.shape[0], 1), use_cache=False, logits_to_keep=logits_to_keep
        ).logits
    return torch.softmax(logits[:, -1], dim=-1)[:, target_id]


@torch.no_grad()
def _capture(
    model: Any, ids: torch.Tensor, layers: Sequence[int], site: Site, logits_to_keep: int = 0
) -> list[torch.Tensor]:
    """One baseline pass; the site's last-position activation [width] of each layer asked for."""
    seen: dict[int, torch.Tensor] = {}

    def read(layer: int) -> Callable[[torch.Tensor], None]:
        return lambda activation: seen.__setitem__(layer, activation[0, -1].clone())

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_hook(model, layer, site, read(layer)))
        model(ids, use_cache=False, logits_to_keep=logits_to_keep)
    return [seen[layer] for layer in layers]


@contextmanager
def _hook(
    model: Any, layer: int, site: Site, function: Callable[[torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Pass a site's activation [rows, positions, width] to `function`; a result replaces it."""
    if site not in _PROJECTION:
        raise ValueError(f"unknown site {site!r}; one of {', '.join(_PROJECTION)}")
    module = model.model.layers[layer].get_submodule(_PROJECTION[site])
    if site == "act":
        handle = module.register_forward_pre_hook(lambda _module, inputs: function(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda _module, _inputs, output: function(output))
    try:
        yield
    finally:
        handle.remove()


def _as_ids(model: Any, input_ids: Any) -> torch.Tensor:
    """Token ids as an int64 tensor [1, T] on the model's device."""
    ids = torch.as_tensor(np.asarray(input_ids), dtype=torch.long, device=model.device)
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise ValueError(f"input_ids must have shape [1, T], not {list(ids.shape)}")
    return ids
