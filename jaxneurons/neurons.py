"""The vocabulary: sites, neurons, sets of them."""

from typing import Literal, NamedTuple, get_args

from jaxneurons.config import ModelConfig
from jaxneurons.errors import ConfigError, near_matches

Site = Literal["up", "gate", "act", "down", "q", "k", "v", "o"]
SITES: tuple[str, ...] = get_args(Site)


class Neuron(NamedTuple):
    """One coordinate of a site: layer and index, both from 0."""

    layer: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


def check_site(site: str) -> None:
    """Raise `ConfigError` with near matches unless `site` is one of `SITES`."""
    if site not in SITES:
        raise ConfigError(f"unknown site {site!r}; {near_matches(site, SITES)}")


def site_width(config: ModelConfig, site: str) -> int:
    """Neurons of a site in one layer."""
    check_site(site)
    return {
        "up": config.intermediate_size,
        "gate": config.intermediate_size,
        "act": config.intermediate_size,
        "down": config.hidden_size,
        "q": config.query_width,
        "k": config.kv_width,
        "v": config.kv_width,
        "o": config.hidden_size,
    }[site]
