"""ROME, MEMIT and AlphaEdit in plain PyTorch, from the papers' equations: an oracle for tests.

Whole sequences through a transformers model, one after the other, nothing padded or cached; hooks
add and read, `torch.autograd` and `torch.optim.Adam` optimise, dense solves make the updates.
Contexts are (ids, index of the subject's last token). Kernels are [inputs, outputs], as ours.
"""

import contextlib
from typing import Any, NamedTuple

import torch

Located = tuple[tuple[int, ...], int]


class Value(NamedTuple):
    """What the optimisation of one request gives."""

    key: torch.Tensor
    initial: torch.Tensor
    delta: torch.Tensor
    losses: list[float]


def _module(model: Any, layer: int, place: str) -> Any:
    block = model.model.layers[layer]
    return block.mlp.down_proj if place == "down" else block


@contextlib.contextmanager
def _adding(module: Any, delta: Any, at: int) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        mask = torch.zeros(stream.shape[1], 1, dtype=stream.dtype)
        mask[at] = 1
        edited = stream + mask * delta
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _seen(model: Any, layer: int, place: str, ids: tuple[int, ...], at: int) -> Any:
    """What enters the down projection of a layer, and what stands at `place`, at a position."""
    kept: dict[str, Any] = {}

    def down(module: Any, inputs: Any, output: Any) -> None:
        kept["key"] = inputs[0][0, at]

    def standing(module: Any, inputs: Any, output: Any) -> None:
        kept["value"] = (output[0] if isinstance(output, tuple) else output)[0, at]

    handles = [
        _module(model, layer, "down").register_forward_hook(down),
        _module(model, layer, place).register_forward_hook(standing),
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return kept["key"], kept["value"]


def mean_key(model: Any, layer: int, prompts: list[Located]) -> torch.Tensor:
    keys = [_seen(model, layer, "down", ids, at)[0] for ids, at in prompts]
    return torch.stack(keys).mean(0)


def mean_value(model: Any, layer: int, place: str, prompts: list[Located]) -> torch.Tensor:
    return torch.stack([_seen(model, layer, place, ids, at)[1] for ids, at in prompts]).mean(0)


def _log_p(model: Any, ids: tuple[int, ...], target: tuple[int, ...]) -> torch.Tensor:
    logp = torch.log_softmax(model(torch.tensor([ids + target[:-1]])).logits[0], -1)
    rows = torch.arange(len(target)) + len(ids) - 1
    return logp[rows, torch.tensor(target)].sum()


def find_value(
    model: Any,
    prompts: list[Located],
    target: tuple[int, ...],
    essence: Located,
    *,
    layer: int,
    place: str,
    steps: int,
    learning_rate: float,
    kl_factor: float,
    weight_decay: float,
    clamp: float,
    stop: float,
) -> Value:
    """ROME, equation 4: Adam on what is added at the subject's last token."""
    module = _module(model, layer, place)
    initial = mean_value(model, layer, place, prompts)
    with torch.no_grad():
        unedited = torch.log_softmax(model(torch.tensor([essence[0]])).logits[0, -1], -1)
    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=learning_rate)
    losses = []
    for step in range(steps + 1):
        nll = []
        for ids, at in prompts:
            with _adding(module, delta, at):
                nll.append(-_log_p(model, ids, target))
        with _adding(module, delta, essence[1]):
            after = torch.log_softmax(model(torch.tensor([essence[0]])).logits[0, -1], -1)
        kl = (after.exp() * (after - unedited)).sum()
        answer = torch.stack(nll).mean()
        decay = weight_decay * torch.norm(delta) / torch.norm(initial) ** 2
        loss = answer + kl_factor * kl + decay
        losses.append(float(answer.detach()))
        if float(loss.detach()) < stop or step == steps:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            most = clamp * torch.norm(initial)
            if torch.norm(delta) > most:
                delta.mul_(most / torch.norm(delta))
    return Value(mean_key(model, layer, prompts), initial, delta.detach(), losses)


def rome_update(
    kernel: torch.Tensor,
    bias: torch.Tensor | float,
    key: torch.Tensor,
    value: torch.Tensor,
    covariance: torch.Tensor,
) -> torch.Tensor:
    """outer(C^-1 k*, v* - k* K) / (k*^T C^-1 k*)."""
    direction = torch.linalg.inv(covariance) @ key
    return torch.outer(direction, value - bias - key @ kernel) / (key @ direction)


def spread(
    model: Any,
    prompts: list[list[Located]],
    targets: torch.Tensor,
    layers: tuple[int, ...],
    solve: Any,
) -> dict[int, torch.Tensor]:
    """MEMIT, algorithm 1: the updates by layer; the model's kernels are edited on the way.

    `targets` [request, hidden] are to stand after the last layer; `solve(layer, K1, R)` with K1
    [width, request] and R [request, hidden] is the method's update.
    """
    updates = {}
    for n, layer in enumerate(layers):
        keys = torch.stack([mean_key(model, layer, each) for each in prompts], dim=1)
        now = [mean_value(model, layers[-1], "residual", each) for each in prompts]
        residuals = (targets - torch.stack(now)) / (len(layers) - n)
        updates[layer] = solve(layer, keys, residuals)
        with torch.no_grad():
            model.model.layers[layer].mlp.down_proj.weight += updates[layer].T
    return updates


def memit_update(
    covariance: torch.Tensor, keys: torch.Tensor, residuals: torch.Tensor, earlier: Any = 0.0
) -> torch.Tensor:
    """(lambda C + Kp Kp^T + K1 K1^T)^-1 K1 R^T; `covariance` is lambda C."""
    return torch.linalg.inv(covariance + earlier + keys @ keys.T) @ keys @ residuals


def alphaedit_update(
    covariance: torch.Tensor,
    threshold: float,
    keys: torch.Tensor,
    residuals: torch.Tensor,
    earlier: Any = 0.0,
    weight: float = 1.0,
) -> torch.Tensor:
    """X of (P (K1 K1^T + Kp Kp^T) + weight I) X = P K1 R^T."""
    u, s, _ = torch.linalg.svd(covariance)
    kept = u[:, s < threshold]
    p = kept @ kept.T
    matrix = p @ (keys @ keys.T + earlier) + weight * torch.eye(len(p), dtype=p.dtype)
    return torch.linalg.solve(matrix, p @ keys @ residuals)
