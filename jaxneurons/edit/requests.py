"""What is to be edited: requests, and the published formats that they come in.

`counterfact-edit` (case_id, prompt, target_new, subject, ground_truth, rephrase_prompt,
locality_prompt, locality_ground_truth), CounterFact (requested_rewrite, paraphrase_prompts,
neighborhood_prompts), zsRE (subject, src, alt, answers, rephrase, loc, loc_ans), and your own JSON
Lines or CSV (prompt, subject, target, optional paraphrases and neighbours).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EditRequest:
    """After this prompt the model is to say something else.

    Attributes:
      prompt: the text that the answer follows; holds the subject.
      subject: whose fact is edited, as it stands in the prompt.
      target: the new answer.
      ground_truth: the old one; "" if it is not known.
      paraphrases: other prompts that are to get the new answer.
      neighbours: prompts whose answers are to stay, with the answer (or "").
      portability: prompts that follow from the edit, with the answer that they should get.
      id: unique in its file.
    """

    prompt: str
    subject: str
    target: str
    ground_truth: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    portability: tuple[tuple[str, str], ...] = ()
    id: str = ""
