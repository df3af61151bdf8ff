"""What changing a query's neurons does: the probability change ratio, editing, faithfulness.

Sections "evaluation" and "applications" of arXiv 2406.10868, as tidy rows from `trials`.
"""

from collections.abc import Iterable

import numpy as np

from jaxneurons.engine import bootstrap
from jaxneurons.engine.bootstrap import Interval
from jaxneurons.model.config import ModelConfig
from jaxneurons.neurons.sets import NeuronSet, Site
from jaxneurons.qrnca import pcr
from jaxneurons.qrnca.baselines import MATCHED
from jaxneurons.qrnca.encoding import NO_GROUP
from jaxneurons.qrnca.method import PromptScores
from jaxneurons.qrnca.run import Run
from jaxneurons.qrnca.trials import OWN, Outcome, Outcomes
from jaxneurons.storage.tables import Row


def change_rows(run: Run, outcomes: Outcomes) -> list[Row]:
    """A row for each query, method and change.

    `related`: relative change of the answer's probability, mean over the query's prompts;
    `unrelated`: the same of its unrelated query, `matched`: with random neurons matched to the
    query's; `before`: the probability, model untouched; `share`: `completeness_share`.
    """
    rows = []
    shares: dict[tuple[str, str], float | None] = {}
    kinds = list(dict.fromkeys((method, change) for method, change, _ in outcomes.related))
    for query in run.queries:
        name = query.id
        for method, change in kinds:
            key = (method, change, name)
            if (method, name) not in shares:
                shares[method, name] = _share(run, outcomes, method, name)
            control = outcomes.matched.get(key)
            rows.append(
                {
                    "query": name,
                    "group": query.group,
                    "method": method,
                    "change": change,
                    "neurons": len(outcomes.sets[OWN if method == MATCHED else method][name]),
                    "before": float(outcomes.related[key].before.mean()),
                    "related": outcomes.related[key].change,
                    "unrelated": outcomes.unrelated[key].change,
                    "matched": None if control is None else control.change,
                    "share": shares[method, name],
                }
            )
    return rows


def evaluation_rows(rows: list[Row], *, seed: int = 0) -> list[Row]:
    """The table of the paper, with intervals: a row for each group (and all), method and change.

    Args:
      rows: `change_rows`.
      seed: of the bootstrap.

    Returns:
      `related`, `unrelated`, `pcr` and `absolute_pcr` (see `pcr.Ratio`), each with `_low` and
      `_high` (95 %, bootstrap over queries); and how faithful the sets are: `share`, what they hold
      of the sum of all attributions, and `beyond`, their related change less that of random neurons
      matched to them in layer and activation.
    """
    keys = list(dict.fromkeys((row["method"], row["change"]) for row in rows))
    table: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        for group in dict.fromkeys((NO_GROUP, row["group"])):
            table.setdefault((group, row["method"], row["change"]), []).append(row)
    averages = []
    for group in dict.fromkeys((NO_GROUP, *(row["group"] for row in rows))):
        for method, change in keys:
            members = table[group, method, change]
            related = _column(members, "related")
            ratio = pcr.ratio(related, _column(members, "unrelated"), seed=seed)
            share = [row["share"] for row in members if row["share"] is not None]
            if members[0]["matched"] is None:
                beyond = Interval(float("nan"), float("nan"), float("nan"))
            else:
                beyond = bootstrap.mean(related - _column(members, "matched"), seed=seed)
            averages.append(
                {
                    "group": group,
                    "method": method,
                    "change": change,
                    "queries": len(members),
                    "neurons": float(_column(members, "neurons").mean()),
                    **_spread("related", ratio.related),
                    **_spread("unrelated", ratio.unrelated),
                    **_spread("pcr", ratio.pcr),
                    **_spread("absolute_pcr", ratio.absolute),
                    "share": float(np.mean(share)) if share else None,
                    **_spread("beyond", beyond),
                }
            )
    return averages


def editing_rows(run: Run, outcomes: Outcomes, *, seed: int = 0) -> list[Row]:
    """Share of prompts whose answer turns: right by boosting, wrong by suppressing.

    A row for each group (and all), method and change: `prompts` that could turn, `turned` of them,
    `rate` with its interval (bootstrap over queries), and `unrelated`, the rate among the prompts
    of unrelated queries under the same neurons. The change "boost" is to turn wrong answers
    right, every other one the reverse.
    """
    keys = list(dict.fromkeys((method, change) for method, change, _ in outcomes.related))
    rows = []
    for group, members in {NO_GROUP: [query.id for query in run.queries], **run.groups}.items():
        for method, change in keys:
            up = change == "boost"
            # [query, 2]: prompts that turned, and that could.
            turned = np.array([_turned(outcomes.related[method, change, q], up) for q in members])
            other = np.array([_turned(outcomes.unrelated[method, change, q], up) for q in members])
            index = bootstrap.resamples(len(members), seed=seed)
            with np.errstate(invalid="ignore", divide="ignore"):
                draws = turned[index, 0].sum(1) / turned[index, 1].sum(1)
            rows.append(
                {
                    "group": group,
                    "method": method,
                    "change": change,
                    "turns": "wrong to right" if up else "right to wrong",
                    "prompts": int(turned[:, 1].sum()),
                    "turned": int(turned[:, 0].sum()),
                    **_spread("rate", bootstrap.interval(_divide(*turned.sum(0)), draws)),
                    "unrelated": _none(_divide(*other.sum(0))),
                }
            )
    return rows


def completeness_share(
    prompts: Iterable[PromptScores], neurons: NeuronSet, *, config: ModelConfig, site: Site
) -> float:
    """Share of all attribution (sum over every layer) that some neurons hold in a query's prompts.

    Scores that a prompt did not keep, below its threshold, count 0: a lower bound for neurons that
    are not QRNCA's. NaN where the sum is not positive.
    """
    flat = neurons.flat(config, (site,))
    held = whole = 0.0
    for prompt in prompts:
        held += float(prompt.scores[np.isin(prompt.neurons, flat)].sum(dtype=np.float64))
        whole += prompt.total
    return held / whole if whole > 0 else float("nan")


def _share(run: Run, outcomes: Outcomes, method: str, query: str) -> float | None:
    if method == MATCHED:
        return None  # they differ by prompt
    neurons = outcomes.sets[method][query]
    return _none(
        completeness_share(
            run.prompts[query], neurons, config=run.lm.config, site=run.settings.site
        )
    )


def _turned(outcome: Outcome, up: bool) -> tuple[int, int]:
    """Prompts whose answer turned, and that could."""
    can = ~outcome.right_before if up else outcome.right_before
    return int((can & (outcome.right_after != outcome.right_before)).sum()), int(can.sum())


def _divide(turned: np.integer, prompts: np.integer) -> float:
    return float(turned / prompts) if prompts else float("nan")


def _column(rows: list[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)


def _none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _spread(name: str, estimate: Interval) -> dict[str, float | None]:
    return {
        name: _none(estimate.value),
        f"{name}_low": _none(estimate.low),
        f"{name}_high": _none(estimate.high),
    }
