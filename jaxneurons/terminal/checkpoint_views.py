"""What people see of checkpoints: a certificate of `verify`, the description of `inspect`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from jaxneurons.terminal.console import console, gib

if TYPE_CHECKING:
    from jaxneurons.checkpoints.description import Description
    from jaxneurons.model.config import ModelConfig, RopeConfig


def show_certificate(certificate: Mapping[str, Any]) -> None:
    """How a converted model compares with PyTorch, of `verify`."""
    table = Table(
        title="Largest difference from PyTorch, in standard deviations (FFN sites: worst layer)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    every = ("gate", "up", "act", "down")
    compared = [site for site in every if site in certificate["sequences"][0]]
    for name in ("sequence", "logits", *compared):
        table.add_column(name, justify="left" if name == "sequence" else "right")
    for result in certificate["sequences"]:
        sites = (f"{result[site]['relative']:.1e}" for site in compared)
        table.add_row(result["sequence"], f"{result['logits']['relative']:.1e}", *sites)
    console.print(table)
    weights, most = certificate["weights"], certificate["tolerance"]
    console.print(
        f"Greedy continuations equal: {certificate['continuations_equal']}. Weights that differ: "
        f"{len(weights['differ'])} of {weights['tensors']} tensors. "
        f"{'Passed' if certificate['passed'] else 'FAILED'} ({certificate['dtype']} weights; "
        f"logits may differ by {most['largest']:g}, and by {most['mean']:g} on average)."
    )
    means = [r["own_arithmetic"]["mean"] for r in certificate["sequences"] if "own_arithmetic" in r]
    if means:
        console.print(
            f"Computed in {certificate['dtype']} itself, logits differ by {max(means):.1e} on "
            "average."
        )


def _experts(config: "ModelConfig") -> list[tuple[str, str]]:
    """The row about experts, of a model that has some."""
    if not config.experts:
        return []
    shown = f"{config.experts} a layer of {config.intermediate_size:,} neurons each"
    return [("experts", f"{shown}, a token runs {config.experts_per_token}")]


def show_description(description: "Description") -> None:
    """Family, shapes, sizes and tokenizer of a checkpoint, of `inspect`."""
    config = description.config
    window = f"{config.sliding_window} positions" if config.sliding_window else "none"
    if config.sliding_layers:
        window += f", {sum(config.sliding_layers)} of {config.num_layers} layers"
    tokens = description.tokenizer
    table = Table(box=None, show_header=False, title=description.source, title_justify="left")
    rows = [
        ("family", f"{config.family}, {description.kind}"),
        ("layers", f"{config.num_layers}"),
        ("hidden size", f"{config.hidden_size}"),
        (
            "attention",
            f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} key/value heads",
        ),
        ("sliding window", window),
        ("rotary embedding", _ropes(config)),
        ("context", f"{config.max_position} tokens"),
        *_experts(config),
        ("biases", ", ".join(config.biases) or "none"),
        ("unembedding", "tied to the embedding" if config.tied else "its own"),
        ("parameters", f"{description.parameters:,}"),
        (
            "neurons per layer",
            ", ".join(f"{site} {width:,}" for site, width in description.neurons.items()),
        ),
        ("FFN neurons", f"{config.num_layers * config.neurons_per_layer:,}"),
        ("on disk", _sizes(description.stored) or "not here"),
        ("in memory", _sizes(description.memory)),
        (
            "tokenizer",
            f"{tokens['tokens']:,} tokens, BOS {tokens['bos']!r} "
            f"({'put first' if tokens['bos put first'] else 'not put first'}), "
            f"EOS {tokens['eos']!r}, {'a' if tokens['chat template'] else 'no'} chat template",
        ),
    ]
    if options := _options(config):
        rows.append(("beside Llama's", "; ".join(options)))
    if description.patches:
        rows.append(("patches", _patches(description.patches)))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _ropes(config: "ModelConfig") -> str:
    """The rotary embeddings, and which layers have which."""

    def describe(rope: "RopeConfig") -> str:
        factor = f" x {rope.factor:g}" if rope.factor != 1 else ""
        part = f", {rope.dim} of {config.head_dim} dimensions" if rope.dim is not None else ""
        return f"{rope.rope_type}{factor}, theta {rope.theta:g}{part}"

    text = "; of sliding layers ".join(map(describe, config.ropes))
    if config.rotary_layers is not None:
        text += f"; in {sum(config.rotary_layers)} of {config.num_layers} layers"
    return text


def _options(config: "ModelConfig") -> list[str]:
    """What the model does that Llama does not."""
    after = "norms after attention and the feed-forward"
    options = {
        "GELU (tanh form)": config.activation == "gelu_tanh",
        f"embedding times {config.embed_scale:g}": config.embed_scale != 1,
        f"norms by {config.norm_offset:g} + weight": config.norm_offset != 0,
        after if config.pre_norms else f"{after} only": config.post_norms,
        "queries and keys normed per head": config.qk_norm == "head",
        "queries and keys normed over their width": config.qk_norm == "width",
        f"scores times {config.score_scale:g}": config.query_scale is not None,
        f"scores capped at {config.attention_softcap or 0:g}": config.attention_softcap is not None,
        f"logits capped at {config.final_softcap or 0:g}": config.final_softcap is not None,
    }
    return [text for text, used in options.items() if used]


def _patches(patches: Sequence[Mapping[str, Any]]) -> str:
    """How many are in the parameters, which, and what they were made for."""
    names = [f"{p.get('method', 'changes')} {str(p.get('digest', '?'))[:12]}" for p in patches[:5]]
    more = f" and {len(patches) - 5} more" if len(patches) > 5 else ""
    first = patches[0]
    base = f"{first.get('base_name', 'a model')} (parameters {str(first.get('base', '?'))[:12]})"
    return f"{len(patches)} in the parameters, on {base}: {', '.join(names)}{more}"


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in sizes.items())
