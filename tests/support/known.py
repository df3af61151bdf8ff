"""Relations that a random model "knows": their objects are what it says, before anything is off."""

import json
import re

import numpy as np

from jaxneurons.engine.ablation import Shape, ablated
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.prompts.answers import encode_prompt
from jaxneurons.prompts.matching import answers

WORDINGS = {
    "in": ["{} is in", "The land of {} is"],
    "speak": ["People who live in {} speak", "In {} they say"],
    "capital": ["The capital of {} is", "{} has the capital"],
    "option": ["Which option is {}?", "Answer of {}:"],
}
KINDS = {"in": "city", "speak": "country", "capital": "country", "option": "letter"}


def said(lm, texts, steps=8):
    """What the model says after each text, one at a time."""
    prompts = [encode_prompt(lm.tokenizer, text) for text in texts]
    ((_, found),) = ablated(
        lm.params, [NeuronSet()], prompts, config=lm.config, steps=steps, shape=Shape(1, 8)
    )
    return [lm.tokenizer.decode(one) for one in found]


def write_relations(directory, lm, *, facts=24, names=tuple(WORDINGS), unknown=0, tries=12):
    """Relation files in the format of LRE whose first wording the model answers.

    `unknown`: so many facts of the first relation have another answer; `tries`: subjects that are
    asked of for each fact that is wanted.
    """
    directory.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    for name in names:
        plain, other = WORDINGS[name]
        subjects = list(
            dict.fromkeys("".join(rng.choice(letters, 4)) for _ in range(tries * facts))
        )
        samples = []
        for subject, text in zip(
            subjects, said(lm, [plain.replace("{}", s) for s in subjects]), strict=True
        ):
            # A word or two, and what shows that the last one ends there.
            found = re.match(r"\s*([A-Za-z]+(?: [A-Za-z]+)?)(?=[ .,:?\n])", text)
            if found and answers(text, found.group(1)):
                samples.append({"subject": subject, "object": found.group(1)})
        samples = samples[:facts]
        assert len(samples) == facts, (name, len(samples))
        for sample in samples[:unknown] if name == names[0] else []:
            sample["object"] = "zzz zzz"
        for sample in samples:
            sample["translations"] = {"de": {"subject": sample["subject"], "object": "Wien"}}
        (directory / f"{name}.json").write_text(
            json.dumps(
                {
                    "name": name,
                    "prompt_templates": [plain],
                    "prompt_templates_zs": [other],
                    "neutral_template": "They talk about {}",
                    "properties": {"domain_name": KINDS[name]},
                    "translations": {"de": {"prompt_templates": ["Von {} ist es"]}},
                    "samples": samples,
                }
            )
        )
    return directory
