"""The vocabulary: sites, neurons, sets of them."""

import csv
import dataclasses
import functools
import hashlib
import io
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import check_site, neuron_place, site_axis, site_widths
from jaxneurons.storage.csv_file import read_csv

Site = Literal["up", "gate", "act", "down", "q", "k", "v", "o"]
SITES: tuple[Site, ...] = get_args(Site)
FFN = ("up", "gate", "down")
"""Outputs of the feed-forward layer's matrices: what arXiv 2502.17355 calls FFN neurons."""
ATTENTION = ("q", "k", "v", "o")

_INDEX = 32
"""Bits of a code that hold the index; the layer is above them."""
_MOST = (1 << 31, 1 << _INDEX)
"""Layers and indices are below these: a code is an int64."""
_SHOWN = 12
"""A set of at most so many neurons shows them all."""


class Neuron(NamedTuple):
    """One coordinate of a site: layer and index, both from 0."""

    layer: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


def site_width(config: ModelConfig, site: str) -> int:
    """Neurons of a site in one layer."""
    check_site(site)
    return site_widths(config)[site]


def neuron_count(config: ModelConfig, sites: Iterable[str]) -> int:
    """Neurons of some sites in the whole model."""
    return config.num_layers * sum(site_width(config, site) for site in sites)


def show_neuron(neuron: Sequence[int], site: str, config: ModelConfig) -> str:
    """A neuron for people: "(layer, index)", or "(layer, expert, index)" of an expert's neurons.

    Args:
      neuron: layer and index in the site's row, where expert e has those from e * width on.
      site: its site.
      config: the model's shape.
    """
    layer, index = neuron
    place = neuron_place(index, config) if site_axis(site) == "intermediate" else (index,)
    return f"({', '.join(map(str, (layer, *place)))})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NeuronSet:
    """A set of neurons of any sites, with the algebra of sets: `|`, `&`, `-`, `<=`, `in`, `len`.

    Attributes:
      codes: by site, ascending and unique int64: layer * 2**32 + index. Make one with `of`.

    Raises:
      ConfigError: an unknown site, or codes that are none.
    """

    codes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        clean = {}
        for site in SITES:
            codes = np.unique(_whole(self.codes.get(site, ())))
            if len(codes):
                codes.setflags(write=False)
                clean[site] = codes
        for site in self.codes:
            check_site(site)
        object.__setattr__(self, "codes", clean)

    @classmethod
    def of(cls, **sites: Iterable[Any]) -> "NeuronSet":
        """From (layer, index) pairs by site: `NeuronSet.of(up=[(3, 17)], down=[(0, 5)])`.

        Pairs are of any kind of whole numbers, or the rows of an array.

        Raises:
          ConfigError: an unknown site, or numbers that are negative, not whole or too large.
        """
        return cls({site: _encode(pairs) for site, pairs in sites.items()})

    @classmethod
    def of_experts(cls, config: ModelConfig, **sites: Iterable[Any]) -> "NeuronSet":
        """From (layer, expert, index) by site, of a model with experts.

        Args:
          config: the model's shape.
          **sites: `up`, `gate` or `act`, with triples of whole numbers.

        Raises:
          ConfigError: a model without experts, another site, or numbers that are no neuron's.
        """
        if not config.experts:
            raise ConfigError("this model has no experts: use `NeuronSet.of`, of (layer, index)")
        pairs: dict[str, list[tuple[Any, Any]]] = {}
        for site, triples in sites.items():
            check_site(site)
            if site_axis(site) != "intermediate":
                raise ConfigError(f"neurons of site {site!r} belong to no expert")
            for layer, expert, index in triples:
                if not (0 <= expert < config.experts and 0 <= index < config.intermediate_size):
                    raise ConfigError(
                        f"expert {expert}, neuron {index}: this model has {config.experts} experts "
                        f"of {config.intermediate_size} neurons, both counted from 0"
                    )
                pairs.setdefault(site, []).append(
                    (layer, expert * config.intermediate_size + index)
                )
        return cls.of(**pairs)

    def shown(self, config: ModelConfig) -> str:
        """All members for people, by site: see `show_neuron`."""
        return "; ".join(
            f"{site} "
            + ", ".join(show_neuron(pair, site, config) for pair in self.pairs(site).tolist())
            for site in self.codes
        )

    @classmethod
    def of_flat(cls, flat: np.ndarray, config: ModelConfig, sites: Iterable[str]) -> "NeuronSet":
        """From positions in the concatenated, flattened [layer, width] tables of `sites`.

        Raises:
          ConfigError: positions that are not in these tables.
        """
        sites = tuple(sites)
        flat, codes, start = _whole(flat), {}, 0
        if len(flat) and flat.max() >= (size := neuron_count(config, sites)):
            raise ConfigError(f"position {int(flat.max())} is not among {size} neurons")
        for site in sites:
            width = site_width(config, site)
            here = flat[(flat >= start) & (flat < start + config.num_layers * width)] - start
            codes[site] = (here // width << _INDEX) + here % width
            start += config.num_layers * width
        return cls(codes)

    def flat(self, config: ModelConfig, sites: Iterable[str]) -> np.ndarray:
        """[n]: positions in the tables of `sites`, of the members there; reverses `of_flat`."""
        positions, start = [], 0
        for site in sites:
            width = site_width(config, site)
            positions.append(start + self.pairs(site) @ (width, 1))
            start += config.num_layers * width
        return np.concatenate(positions) if positions else np.zeros(0, np.int64)

    def pairs(self, site: str) -> np.ndarray:
        """[n, 2]: layer and index of the neurons of a site, ascending."""
        codes = self.codes.get(site, np.zeros(0, np.int64))
        return np.stack([codes >> _INDEX, codes & ((1 << _INDEX) - 1)], axis=1)

    def __iter__(self) -> Iterator[tuple[str, Neuron]]:
        for site in self.codes:
            for layer, index in self.pairs(site).tolist():
                yield site, Neuron(layer, index)

    def __len__(self) -> int:
        return sum(map(len, self.codes.values()))

    def __contains__(self, neuron: object) -> bool:
        site, pair = neuron  # type: ignore[misc]
        try:
            code = _encode([pair])
        except ConfigError:  # no neuron of any model
            return False
        return bool(np.isin(code, self.codes.get(site, ())).all())

    def __or__(self, other: "NeuronSet") -> "NeuronSet":
        return self._with(other, np.union1d)

    def __and__(self, other: "NeuronSet") -> "NeuronSet":
        return self._with(other, np.intersect1d)

    def __sub__(self, other: "NeuronSet") -> "NeuronSet":
        return self._with(other, np.setdiff1d)

    def __le__(self, other: "NeuronSet") -> bool:
        return not self - other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NeuronSet) and self.digest == other.digest

    def __repr__(self) -> str:
        if len(self) <= _SHOWN:
            sites = (
                f"{site}={[tuple(pair) for pair in self.pairs(site).tolist()]}"
                for site in self.codes
            )
            return f"NeuronSet.of({', '.join(sites)})"
        sites = (f"{len(codes)} {site}" for site, codes in self.codes.items())
        return f"<NeuronSet of {len(self)} neurons: {', '.join(sites)}>"

    def __hash__(self) -> int:
        return hash(self.digest)

    def _with(
        self, other: "NeuronSet", operation: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> "NeuronSet":
        empty = np.zeros(0, np.int64)
        return NeuronSet(
            {
                site: operation(self.codes.get(site, empty), other.codes.get(site, empty))
                for site in SITES
            }
        )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the members: equal sets have equal digests."""
        sha = hashlib.sha256()
        for site, codes in self.codes.items():
            sha.update(f"{site}:{len(codes)}:".encode())
            sha.update(codes.astype("<i8").tobytes())
        return sha.hexdigest()

    def check(self, config: ModelConfig) -> None:
        """Raise `DataError` unless every neuron exists in a model of this shape."""
        for site in self.codes:
            layers, indices = self.pairs(site).T
            width = site_width(config, site)
            for name, values, size in (
                ("layer", layers, config.num_layers),
                ("neuron", indices, width),
            ):
                if values.min() < 0 or values.max() >= size:
                    wrong = int(values.min() if values.min() < 0 else values.max())
                    which = "indices" if name == "neuron" else "layers"
                    raise DataError(
                        f"site {site!r}: {name} {wrong} is not in this model, which has {size}: "
                        f"{which} go from 0 to {size - 1}; these neurons belong to another model, "
                        "or were counted from 1"
                    )

    def scales(
        self, config: ModelConfig, factor: float | int = 0.0, *, sites: Iterable[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Multipliers [layer, width] by site, `factor` at the members and 1 elsewhere, float32.

        Args:
          config: the model's shape.
          factor: 0 turns neurons off.
          sites: sites to return; default: those with members.

        Raises:
          DataError: a neuron that this model does not have, or of a site that is left out.
        """
        self.check(config)
        chosen = tuple(self.codes if sites is None else sites)
        if any(site not in chosen for site in self.codes):
            raise DataError(
                f"these neurons are of {', '.join(self.codes)}, not of {', '.join(chosen)} alone"
            )
        scales = {}
        for site in chosen:
            scales[site] = np.ones((config.num_layers, site_width(config, site)), np.float32)
            layers, indices = self.pairs(site).T
            scales[site][layers, indices] = factor
        return scales

    def layer_counts(self, num_layers: int) -> dict[str, np.ndarray]:
        """Members in each layer, [layer] by site."""
        return {
            site: np.bincount(self.pairs(site)[:, 0], minlength=num_layers) for site in self.codes
        }

    def random_like(self, config: ModelConfig, rng: np.random.Generator) -> "NeuronSet":
        """As many random neurons in the same layers of the same sites, none of them a member.

        See `controls.layer_matched`.

        Raises:
          DataError: a layer has not enough other neurons.
        """
        from jaxneurons.neurons.controls import layer_matched

        return layer_matched(self, config, rng)


def _whole(values: Any) -> np.ndarray:
    """[n] int64 of whole numbers from 0 on."""
    numbers = np.asarray(values)
    if numbers.size and numbers.dtype.kind not in "iu":
        raise ConfigError(f"whole numbers are needed, got {numbers.reshape(-1)[0]!r}")
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << 63:
        raise ConfigError(f"numbers from 0 to 2**63 - 1 are needed, got {int(numbers.min())}")
    return numbers.astype(np.int64).reshape(-1)


def _encode(pairs: Iterable[Any]) -> np.ndarray:
    """[n] int64: the codes of pairs of layer and index."""
    rows = pairs if isinstance(pairs, np.ndarray) else list(pairs)
    if not len(rows):
        return np.zeros(0, np.int64)
    first = rows[0]
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iu":
        try:
            rows = np.array([[operator.index(n) for n in pair] for pair in rows], object)
        except (TypeError, ValueError):
            raise ConfigError(
                f"neurons are pairs of whole numbers, layer and index; got {first!r}"
            ) from None
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise ConfigError(f"neurons are pairs of layer and index, got {first!r}")
    for name, column, most in zip(("layer", "neuron"), rows.T, _MOST, strict=True):
        low, high = int(column.min()), int(column.max())
        if low < 0:
            raise ConfigError(f"layers and neurons are counted from 0, got {low}")
        if high >= most:
            raise ConfigError(f"{name} {high} is in no model: the most is {most - 1}")
    table = rows.astype(np.int64)
    return (table[:, 0] << _INDEX) + table[:, 1]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Neurons of one site in an order that counts: the best first, or as they were drawn.

    Iterates as a set does: site and neuron.

    Attributes:
      ranking: (layer, index), the first first.
      site: of all of them.
    """

    ranking: tuple[Neuron, ...]
    site: Site

    def __post_init__(self) -> None:
        check_site(self.site)

    @property
    def neurons(self) -> NeuronSet:
        """The neurons as a set."""
        return NeuronSet.of(**{self.site: self.ranking})

    def __iter__(self) -> Iterator[tuple[str, Neuron]]:
        for neuron in self.ranking:
            yield self.site, neuron

    def __len__(self) -> int:
        return len(self.ranking)


def stack_scales(
    sets: Sequence[NeuronSet],
    config: ModelConfig,
    factor: float | int = 0.0,
    *,
    sites: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """`NeuronSet.scales` of several sets: [set, layer, width] by site, float32.

    Args:
      sets: whose neurons are multiplied; an empty one leaves the model untouched.
      config: the model's shape.
      factor: 0 turns neurons off.
      sites: sites to return in any case, beside those of any set.

    Raises:
      DataError: a neuron that this model does not have.
    """
    chosen = tuple(dict.fromkeys([*sites, *(site for members in sets for site in members.codes)]))
    scales = [members.scales(config, factor, sites=chosen) for members in sets]
    return {site: np.stack([of_set[site] for of_set in scales]) for site in chosen}


def neuron_table(neurons: NeuronSet, **columns: Mapping[str, np.ndarray]) -> str:
    """A set as CSV: site, layer, index and, from [layer, width] tables by site, more columns.

    `read_neurons` reads it back.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["site", "layer", "index", *columns])
    for site, (layer, index) in neurons:
        values = (f"{table[site][layer, index]:.9g}" for table in columns.values())
        writer.writerow([site, layer, index, *values])
    return text.getvalue()


_NUMBER = re.compile(r"[0-9]{1,18}")


def read_neurons(path: str | os.PathLike[str]) -> NeuronSet:
    """Read a set of neurons from CSV with the columns site, layer and index.

    Raises:
      DataError: a file that cannot be read or is not of this format; names the line.
    """
    path = Path(path)
    pairs: dict[str, list[tuple[int, int]]] = {}
    for line, row in read_csv(path, ("site", "layer", "index")):
        site, numbers = row["site"].strip(), [row["layer"].strip(), row["index"].strip()]
        if site not in SITES or not all(_NUMBER.fullmatch(number) for number in numbers):
            raise DataError(
                f"{path}: line {line}: needs a site ({', '.join(SITES)}), a layer and an index"
            )
        pair = (int(numbers[0]), int(numbers[1]))
        try:
            _encode([pair])
        except ConfigError as error:
            raise DataError(f"{path}: line {line}: {error}") from None
        pairs.setdefault(site, []).append(pair)
    return NeuronSet.of(**pairs)
