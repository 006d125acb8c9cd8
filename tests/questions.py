"""Questions with answers in a context, and questions with choices, for the tests."""

from __future__ import annotations

import random

from conftest import NEUTRAL
from datasets import Dataset

from hf_multitask import Task

PEOPLE = ("maria", "john")
FILLING = tuple(word for word in NEUTRAL if word not in PEOPLE)


def question_tasks(**changes) -> list[Task]:
    """A classifier, answers in a context, and choices."""
    return [
        Task("tone", "single_label_classification", labels=("negative", "positive"), dataset="reviews"),
        Task("who", "question_answering", max_length=24, stride=6, **changes),
        Task("next", "multiple_choice", **changes),
    ]


def answers_in_context(seed: int = 0, rows: int = 24, longest: int = 50) -> Dataset:
    """Who comes behind a word that the question names; in every fifth context, nobody does."""
    draw = random.Random(seed)
    found = []
    for i in range(rows):
        words = [draw.choice(FILLING) for _ in range(draw.randint(6, longest))]
        asked, place = draw.choice(("good", "sad")), draw.randint(1, len(words) - 1)
        answer = " ".join(draw.sample(PEOPLE, draw.randint(1, 2)))
        answers: dict[str, list] = {"text": [], "answer_start": []}
        if i % 5 != 4:
            context = " ".join([*words[:place], asked, ""])
            answers = {"text": [answer], "answer_start": [len(context)]}
            words = [*words[:place], asked, answer, *words[place:]]
        found.append({"question": f"it was {asked}", "context": " ".join(words), "answers": answers})
    return Dataset.from_list(found)


def choices(seed: int = 0, rows: int = 16) -> Dataset:
    """Which of two to four texts has the mood that is asked for."""
    draw = random.Random(seed)
    moods = {"good": ("great", "fine", "happy"), "bad": ("awful", "poor", "sad")}
    found = []
    for i in range(rows):
        asked, other = draw.sample(list(moods), 2)
        count = 2 + i % 3
        label = draw.randrange(count)
        texts = [
            " ".join([*draw.choices(FILLING, k=draw.randint(1, 5)), draw.choice(moods[asked if k == label else other])])
            for k in range(count)
        ]
        found.append({"question": f"the film was {asked}", "choices": texts, "label": label})
    return Dataset.from_list(found)


def question_datasets(seed: int = 0, **sizes: int) -> dict[str, Dataset]:
    """Rows of the tasks that have questions."""
    return {"who": answers_in_context(seed, sizes.get("who", 24)), "next": choices(seed, sizes.get("next", 16))}
