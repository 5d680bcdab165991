"""Made-up questions in the layouts of the public benchmarks, for `trilobit eval --task-data`."""

import gzip
import json
from pathlib import Path
from typing import Any

LETTERS = "ABCDE"


def _labelled(index: int, count: int) -> dict[str, Any]:
    words = [f"thing {index}{letter.lower()}" for letter in LETTERS[:count]]
    choices = {"label": list(LETTERS[:count]), "text": words}
    return {"choices": choices, "answerKey": LETTERS[index % count]}


def rows(index: int) -> dict[str, dict[str, Any]]:
    """Question `index` of each file."""
    arc = {"query": f"Question: What is {index}?", "choices": ["one", "two", "a few", "many"], "gold": index % 4}
    return {
        "piqa_validation": {"goal": f"Open jar {index}", "sol1": "twist", "sol2": "drop it", "label": index % 2},
        "hellaswag_validation": {
            "ind": index, "activity_label": "Baking", "ctx_a": f"Cook {index} waits.", "ctx_b": "she", "ctx": "unused",
            "endings": ["eats.", "sleeps [x] on.", "leaves the room.", "sings."], "label": str(index % 4),
        },
        "arc_easy_test": arc,
        "arc_challenge_test": arc | {"choices": ["one", "two", "a few", "many"][: 3 + index % 2], "gold": index % 3},
        "winogrande_validation": {
            "sentence": f"Ann thanked Bea {index} times because _ had helped.", "option1": "Ann", "option2": "Bea",
            "answer": str(1 + index % 2),
        },
        "commonsense_qa_validation": {"question": f"Where is {index}?", "question_concept": "x", **_labelled(index, 5)},
        "openbookqa_validation": {"question_stem": f"Number {index} is", **_labelled(index, 4)},
        "social_i_qa_validation": {
            "context": f"Kim ate {index} figs.", "question": "Why?", "answerA": "hunger", "answerB": "a dare",
            "answerC": "no reason", "label": str(1 + index % 3),
        },
        "mmlu_test": {
            "question": f"What is {index}?", "subject": ["us_history", "virology"][index % 2],
            "choices": ["red", "green", "blue", "none"], "answer": index % 4,
        },
        "gsm8k_test": {"question": f"What is {index} + 1?", "answer": f"It is {index + 1}.\n#### {index + 1}"},
        "trivia_qa_validation": {
            "question": f"Who was {index}", "question_id": str(index),
            "answer": {"aliases": [f"King {index}", "The King"], "value": f"King {index}"},
        },
        "lambada_openai_test": {"context": f"He said {index} and then he said", "continuation": "nothing"},
    }  # fmt: skip


def write(folder: Path, count: int = 12) -> Path:
    """All files, with `count` questions each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in rows(0):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(rows(index)[name]) + "\n" for index in range(count))
    return folder
