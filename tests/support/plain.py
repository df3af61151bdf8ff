"""A decoder in plain float64 numpy, token by token and head by head, without any of our code."""

from typing import Any

import numpy as np


def _norm(x: np.ndarray, weight: Any, config: Any) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + config.norm_eps) * (config.norm_offset + wide(weight))


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _activate(x: np.ndarray, config: Any) -> np.ndarray:
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _turned(x: np.ndarray, position: int, rope: Any, length: int) -> np.ndarray:
    """A head's query or key, its pairs of dimensions turned as complex numbers."""
    dim = rope.dim or len(x)
    half = dim // 2
    frequency = rope.theta ** (-np.arange(0, dim, 2) / dim)
    if rope.rope_type == "linear":
        frequency = frequency / rope.factor
    if rope.rope_type == "longrope":
        long = length > rope.original_max_position
        frequency = frequency / wide(rope.long_divisors if long else rope.short_divisors)
    turn = rope.attention_factor * np.exp(1j * position * frequency)
    pairs = (x[:half] + 1j * x[half:dim]) * turn
    return np.concatenate([pairs.real, pairs.imag, x[dim:]])


class Plain:
    """A run of one sequence, with everything that it passed.

    Attributes:
      sites: activations by (site, layer), [position, width].
      final: the stream as it leaves the last layer, [position, hidden].
    """

    def __init__(
        self,
        params: Any,
        ids: Any,
        config: Any,
        scales: Any = None,
        replaced: Any = None,
        noise: Any = None,
    ):
        """Run `ids`.

        Args:
          params: as the library has them.
          ids: token ids.
          config: the model's shape.
          scales: by (site, layer), multipliers that broadcast to [position, width].
          replaced: by (place, layer, position), what stands there instead; places: "down", "mixed",
            "residual" (the stream as it leaves the layer).
          noise: [position, hidden], added to the embeddings as they enter.
        """
        self.params, self.config, self.ids = params, config, list(map(int, ids))
        self.scales, self.replaced = scales or {}, replaced or {}
        self.sites: dict[Any, np.ndarray] = {}
        x = wide(params["embed"]["embedding"])[self.ids] * config.embed_scale
        if noise is not None:
            x = x + noise
        for layer in range(config.num_layers):
            x = self._layer(x, layer)
        self.final = x

    @property
    def logits(self) -> np.ndarray:
        """[position, vocab]."""
        params, config = self.params, self.config
        h = np.stack([_norm(x, params["final_norm"]["scale"], config) for x in self.final])
        tied = config.tied
        logits = h @ (
            wide(params["embed"]["embedding"]).T if tied else wide(params["unembed"]["kernel"])
        )
        cap = config.final_softcap
        return logits if cap is None else cap * np.tanh(logits / cap)

    @property
    def probabilities(self) -> np.ndarray:
        """[position, vocab]."""
        odds = np.exp(self.logits - self.logits.max(-1, keepdims=True))
        return odds / odds.sum(-1, keepdims=True)

    def _site(self, site: str, layer: int, value: np.ndarray) -> np.ndarray:
        value = value * self.scales.get((site, layer), 1.0)
        value = self._replace(site, layer, value)
        self.sites[site, layer] = value
        return value

    def _replace(self, place: str, layer: int, value: np.ndarray) -> np.ndarray:
        value = value.copy()
        for (name, at, position), new in self.replaced.items():
            if (name, at) == (place, layer):
                value[position] = new
        return value

    def _project(self, group: str, name: str, layer: int, x: np.ndarray) -> np.ndarray:
        arrays = self.params["layers"][group][name]
        y = x @ wide(arrays["kernel"][layer])
        return y + wide(arrays["bias"][layer]) if "bias" in arrays else y

    def _normed(self, x: np.ndarray, path: tuple[str, ...], layer: int) -> np.ndarray:
        weight = self.params["layers"]
        for key in path:
            weight = weight[key]
        return np.stack([_norm(row, weight["scale"][layer], self.config) for row in x])

    def _heads(self, name: str, layer: int, x: np.ndarray, count: int) -> np.ndarray:
        """Queries or keys [position, head, dim], normed and turned."""
        config = self.config
        if config.qk_norm == "width":
            x = self._normed(x, ("attn", f"{name}_norm"), layer)
        x = x.reshape(len(x), count, config.head_dim)
        if config.qk_norm == "head":
            x = np.stack([self._normed(row, ("attn", f"{name}_norm"), layer) for row in x])
        if config.rotary_layers is not None and not config.rotary_layers[layer]:
            return x
        slides = config.sliding_layers is not None and config.sliding_layers[layer]
        rope = config.sliding_rope if slides and config.sliding_rope is not None else config.rope
        return np.array(
            [[_turned(head, i, rope, len(x)) for head in row] for i, row in enumerate(x)]
        )

    def _attention(self, h: np.ndarray, layer: int) -> np.ndarray:
        config = self.config
        q, k, v = (self._site(n, layer, self._project("attn", n, layer, h)) for n in "qkv")
        q = self._heads("q", layer, q, config.num_heads)
        k = self._heads("k", layer, k, config.num_kv_heads)
        v = v.reshape(len(v), config.num_kv_heads, config.head_dim)
        slides = config.sliding_layers is None or config.sliding_layers[layer]
        window = config.sliding_window if slides and config.sliding_window else len(h)
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        mixed = np.zeros((len(h), config.num_heads, config.head_dim))
        for i in range(len(h)):
            first = max(0, i - window + 1)
            for head in range(config.num_heads):
                source = head * config.num_kv_heads // config.num_heads
                scores = k[first : i + 1, source] @ q[i, head] * scale
                if config.attention_softcap is not None:
                    scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
                weights = np.exp(scores - scores.max())
                mixed[i, head] = weights / weights.sum() @ v[first : i + 1, source]
        mixed = self._replace("mixed", layer, mixed.reshape(len(h), -1))
        self.sites["mixed", layer] = mixed
        return self._site("o", layer, self._project("attn", "o", layer, mixed))

    def _layer(self, x: np.ndarray, layer: int) -> np.ndarray:
        config = self.config
        o = self._attention(
            self._normed(x, ("attn_norm",), layer) if config.pre_norms else x, layer
        )
        x = x + (self._normed(o, ("attn_post_norm",), layer) if config.post_norms else o)
        h = self._normed(x, ("ffn_norm",), layer) if config.pre_norms else x
        up, gate = (self._site(n, layer, self._project("ffn", n, layer, h)) for n in ("up", "gate"))
        act = self._site("act", layer, up * _activate(gate, config))
        down = self._site("down", layer, self._project("ffn", "down", layer, act))
        x = x + (self._normed(down, ("ffn_post_norm",), layer) if config.post_norms else down)
        x = self._replace("residual", layer, x)
        self.sites["residual", layer] = x
        return x
