"""Other wordings and other languages: what the model answers, and what is lost there.

arXiv 2502.17355, section 5. Each function takes a study's `Collection` and gives tables by name.
"""

from jaxneurons.prompts.relations import objects, wordings
from jaxneurons.relspec import method
from jaxneurons.relspec.collection import Collection
from jaxneurons.relspec.drops import TableRows, control_sets, measure, relation_sets
from jaxneurons.relspec.method import Prompt


def relations(study: Collection) -> TableRows:
    """What was asked, what the model knows, and how often it answers each template.

    `steps`: the most tokens generated after a detection prompt.
    """
    rows, templates = [], []
    validated = sum(len(prompts.validated) for prompts in study.prompts.values())
    for name, prompts in study.prompts.items():
        relation = study.relations[name]
        texts = relation.wordings(study.settings.templates)
        rows.append(
            {
                "relation": name,
                "subject_type": relation.subject_type,
                "facts": len(relation.triples),
                "subjects": len(objects(relation.triples)),
                "template": texts[prompts.template],
                "steps": max(study.steps(prompts.detection)),
                "detection": len(prompts.detection),
                "validated": len(prompts.validated),
                "detection_accuracy": len(prompts.validated) / len(prompts.detection),
                "evaluation": len(prompts.evaluation),
                "negatives": min(
                    study.settings.negatives * len(prompts.validated),
                    validated - len(prompts.validated),
                ),
                "known": not prompts.unknown,
                "reason": prompts.unknown,
            }
        )
        templates += [
            {
                "relation": name,
                "template": text,
                "asked": len(prompts.detection),
                "answered": round(accuracy * len(prompts.detection)),
                "accuracy": accuracy,
                "chosen": number == prompts.template,
            }
            for number, (text, accuracy) in enumerate(zip(texts, prompts.accuracies, strict=True))
        ]
    return {"relations": rows, "templates": templates}


def multilingual(study: Collection) -> TableRows:
    """The held-out facts in other languages, the same neurons off.

    As in the relation's own language, the template is the one answered most often on the detection
    facts, and a language in which too few of them are answered is unknown.
    """
    detection: dict[tuple[str, str, int], list[Prompt]] = {}
    texts: dict[tuple[str, str], tuple[str, ...]] = {}
    for name in study.known:
        relation, split = study.relations[name], study.prompts[name].split
        for language, translation in relation.translations.items():
            templates = wordings(translation.templates, study.settings.templates)
            texts[name, language] = templates
            for number, template in enumerate(templates):
                detection[name, language, number] = method.relation_prompts(
                    relation, split.detection, template, evaluation="det", language=language
                )
    if not detection:
        return {"languages": [], "multilingual": []}
    correct = study.answered("multilingual", detection)
    languages = []
    prompts: list[Prompt] = []
    for name, language in dict.fromkeys(key[:2] for key in detection):
        of_templates = [right for key, right in correct.items() if key[:2] == (name, language)]
        best = method.best_template(of_templates)
        answered = int(of_templates[best].sum())
        known = not method.too_few(answered, len(of_templates[best]), study.settings)
        template = texts[name, language][best]
        languages.append(
            {
                "relation": name,
                "language": language,
                "template": template,
                "steps": max(study.steps(detection[name, language, best]), default=0),
                "detection": len(of_templates[best]),
                "validated": answered,
                "known": known,
            }
        )
        if known:
            evaluation = study.prompts[name].split.evaluation
            prompts += method.relation_prompts(
                study.relations[name], evaluation, template, evaluation="eva", language=language
            )
    rows = []
    if prompts:
        random = study.random(study.settings.seeds)
        sets = relation_sets(study.neurons()) + control_sets(random)
        rows = measure(study, "multilingual", sets, prompts)
    return {"languages": languages, "multilingual": rows}


def templates(study: Collection) -> TableRows:
    """Template robustness: the held-out facts in another wording, the same neurons off.

    The wording of another set, or else of the same, that is answered most often on some of the
    detection facts.
    """
    detection: dict[tuple[str, str], list[Prompt]] = {}
    for name in study.known:
        relation, prompts = study.relations[name], study.prompts[name]
        main = relation.wordings(study.settings.templates)[prompts.template]
        sets_of_main = {name for name, texts in relation.templates.items() if main in texts}
        every = wordings(relation.templates, relation.templates)
        others = wordings(
            relation.templates, [s for s in relation.templates if s not in sets_of_main]
        )
        some = prompts.split.detection[: study.settings.evaluation]
        for text in others or [text for text in every if text != main]:
            detection[name, text] = method.relation_prompts(relation, some, text, evaluation="det")
    correct = study.answered("templates", detection)
    evaluation = []
    for name in dict.fromkeys(name for name, _ in detection):
        of_texts = {text: right for (owner, text), right in correct.items() if owner == name}
        best = list(of_texts)[method.best_template(list(of_texts.values()))]
        evaluation += method.relation_prompts(
            study.relations[name],
            study.prompts[name].split.evaluation,
            best,
            evaluation="eva-2",
        )
    if not evaluation:
        return {}
    sets = relation_sets(study.neurons()) + control_sets(study.random(study.settings.sweep_seeds))
    return {"robustness": measure(study, "templates", sets, evaluation)}
