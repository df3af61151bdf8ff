"""Every table of QRNCA, as a results file: the lab model's world, and facts of real models.

    python benchmarks/query_neurons.py --out runs/query_neurons --write docs/query_neurons.md

Runs what `jaxneurons qrnca locate --rule adaptive`, `evaluate`, `edit`, `predict` and `analyse`
run; with `--data` also on the published domain questions (`subject_qa.json`). What is finished in
`--out` is not computed again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from results_page import markdown, spread

import jaxneurons as jn

Row = dict[str, Any]
SETTINGS = jn.qrnca.QRNCAConfig(quadrature=jn.Quadrature())
KINDS = ("up", "gate", "act")
MOVES = {"boost": "Boosted (activations doubled)", "suppress": "Suppressed (activations zero)"}


INTRODUCTION = """# What QRNCA's neurons do, in full

Written by `python benchmarks/query_neurons.py --out DIR --data subject_qa.json --write
docs/query_neurons.md`; without `--data`, all but the last section. Two cores of an AMD EPYC server,
float32, rule `adaptive`.

In brackets: 95 % bootstrap intervals over queries. *Related*: mean relative change of the right
answer's probability with the query's own neurons changed at the last position; *unrelated*: with
those of a query of another group. *PCR*: the ratio of the two; *absolute PCR*: that of the means of
absolute changes, which do not cancel. *Beyond*: related change less that of random neurons matched
in layer and activation. *Share*: of the sum of all attributions (negative ones count, so it can
exceed 100 %), held by the neurons; scores below the run's threshold count 0. Probabilities are
those of the whole answer, by teacher forcing; all answers here are one token.
"""


class Study(NamedTuple):
    """What is asked of which model.

    Attributes:
      name: of its run directory.
      model: source.
      queries: a bundled name or a file.
      about: what they are.
      kinds: queries on which kinds of neurons are compared; 0: none.
      against: the run that asks the same in another form.
    """

    name: str
    model: str
    queries: str
    about: str
    kinds: int = 0
    against: str | None = None


STUDIES = (
    Study("lab", "lab", "lab", "multi-choice questions by domain", kinds=60),
    Study("lab-languages", "lab", "lab-languages", "multi-choice questions by language"),
    Study("lab-cloze", "lab", "lab-cloze", "texts to be completed by domain", 60, against="lab"),
    Study("facts", "smollm2-135m", "facts", "facts to be completed that the model knows", kinds=54),
    Study("facts-gemma", "gemma3-270m", "facts", "facts to be completed", kinds=54),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every table of QRNCA.")
    parser.add_argument("--out", type=Path, required=True, help="run directories")
    parser.add_argument("--write", type=Path, help="results file; default: standard output")
    parser.add_argument("--data", type=Path, help="published domain questions, subject_qa.json")
    parser.add_argument("--only", nargs="*", help="names of studies")
    options = parser.parse_args()
    studies = list(STUDIES)
    if options.data:
        about = "published multi-choice questions by subject"
        studies.append(Study("domain", "smollm2-135m", str(options.data), about))
    text = [INTRODUCTION]
    for study in studies:
        if not options.only or study.name in options.only:
            text += section(study, options.out)
    done = "\n".join(text)
    if options.write:
        options.write.write_text(done, encoding="utf-8")
    else:
        print(done)


def section(study: Study, out: Path) -> list[str]:
    """All tables of a study."""
    lm = jn.load(study.model)
    queries = jn.qrnca.bundled_queries(study.queries)
    path = out / study.name
    run = jn.qrnca.locate(lm, queries, settings=SETTINGS, out=path)
    evaluation = jn.qrnca.evaluate(run, out=path)
    trials = evaluation.facts["seconds"]
    table = evaluation.rows("evaluation")
    edited = jn.qrnca.edit(run, out=path).rows("editing")
    analyses = jn.qrnca.analyse(
        run,
        kinds=KINDS if study.kinds else (),
        kinds_limit=study.kinds,
        against=out / study.against if study.against else None,
        out=path,
    )
    facts = run.facts
    answers, seconds = facts["answers"], facts["seconds"]["attribution"]
    text = [
        f"## `{study.name}`: {len(queries)} {study.about}, model `{study.model}`\n",
        f"{facts['prompts']} prompts, {share(answers['accuracy'])} answered right; "
        f"{facts['neurons_per_query']['mean']:.1f} neurons a query, "
        f"{len(run.common)} common ones left out. Attribution {seconds:.0f} s, trials "
        f"{trials:.1f} s ({trials / seconds:.0%}). Largest completeness gap "
        f"{facts['completeness']['gap_max']:.1e} in probability.\n",
    ]
    everyone = [row for row in table if row["group"] == "all"]
    for change, title in MOVES.items():
        text += markdown(
            f"**{title}**",
            ("", "neurons", "related", "unrelated", "PCR", "absolute PCR", "beyond", "share"),
            (
                (
                    row["method"],
                    f"{row['neurons']:.1f}",
                    spread(row, "related", signed),
                    spread(row, "unrelated", signed),
                    spread(row, "pcr", number),
                    spread(row, "absolute_pcr", number),
                    spread(row, "beyond", signed),
                    share(row["share"]),
                )
                for row in everyone
                if row["change"] == change
            ),
        )
    own = {(row["group"], row["change"]): row for row in table if row["method"] == "QRNCA"}
    text += markdown(
        "**QRNCA by group**",
        ("", "queries", "neurons", "boost: related", "PCR", "suppress: related", "PCR"),
        (
            (
                count["group"],
                str(count["queries"]),
                f"{count['mean']:.1f}",
                *(
                    cell
                    for change in MOVES
                    for cell in (
                        spread(own[count["group"], change], "related", signed),
                        spread(own[count["group"], change], "pcr", number),
                    )
                ),
            )
            for count in analyses.rows("counts")
        ),
    )
    turned = [row for row in edited if row["group"] == "all"]
    for change in MOVES:
        rows = [row for row in turned if row["change"] == change]
        if not rows[0]["prompts"]:
            text.append(f"None was there to turn from {rows[0]['turns']}.\n")
            continue
        what = f"Answers turned from {rows[0]['turns']}, of {rows[0]['prompts']} that could"
        text += markdown(
            f"**{what}**",
            ("", "turned", "share", "by an unrelated query's neurons"),
            (
                (
                    row["method"],
                    str(row["turned"]),
                    spread(row, "rate", share),
                    share(row["unrelated"]),
                )
                for row in rows
            ),
        )
    if all(query.options[0] for query in queries):
        text += prediction(jn.qrnca.predict(run, out=path).rows("prediction"))
    if study.kinds:
        text += kinds(analyses.rows("kind_overlap"), analyses.rows("kinds"))
    if study.against:
        agreed = analyses.rows("against")[0]
        other = f"with another fact's there: {agreed['jaccard_other_query']:.3f}"
        text.append(
            f"Neurons shared with those of the same {agreed['queries']} facts in "
            f"`{study.against}`: Jaccard {agreed['jaccard']:.3f}, average overlap "
            f"{agreed['average_overlap']:.3f}; {other}.\n"
        )
    return text


def prediction(rows: Sequence[Row]) -> list[str]:
    return markdown(
        "**Questions answered from a group's neurons alone** (protocol: `jn.qrnca.predict`)",
        ("", "neurons", "right"),
        (
            (
                " ".join(filter(None, (row["readout"], row["pool"] and f"({row['pool']})"))),
                f"{row['neurons']:.0f}" if row["neurons"] else "",
                spread(row, "accuracy", share),
            )
            for row in rows
            if row["group"] == "all"
        ),
    )


def kinds(pairs: Sequence[Row], effects: Sequence[Row]) -> list[str]:
    text = markdown(
        f"**Kinds of neurons**, on {pairs[0]['queries']} queries (`act` is `up` times the SiLU of "
        "`gate`: scaling either is the same, so the two must agree)",
        ("", "boost: related", "PCR", "beyond", "suppress: related", "PCR", "beyond"),
        (
            (
                f"`{site}`",
                *(
                    cell
                    for change in MOVES
                    for row in effects
                    if (row["site"], row["method"], row["change"]) == (site, "QRNCA", change)
                    for cell in (
                        spread(row, "related", signed),
                        spread(row, "pcr", number),
                        spread(row, "beyond", signed),
                    )
                ),
            )
            for site in dict.fromkeys(row["site"] for row in effects)
        ),
    )
    return text + markdown(
        "**Do they name the same neurons?**",
        ("", "Jaccard", "average overlap", "Jaccard, another query's"),
        (
            (
                f"`{row['site']}`, `{row['other']}`",
                f"{row['jaccard']:.2f}",
                f"{row['average_overlap']:.2f}",
                f"{row['jaccard_other_query']:.2f}",
            )
            for row in pairs
        ),
    )


def signed(value: float) -> str:
    digits = 2 if abs(value) < 0.01 else 1 if abs(value) < 10 else 0
    return f"{100 * value:+,.{digits}f} %"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


if __name__ == "__main__":
    main()
