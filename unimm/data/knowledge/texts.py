"""The texts that teach a model about characters, and the questions that ask for what it was taught."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unimm.data.knowledge.characters import Character, TraitValue
from unimm.data.knowledge.traits import TRAITS, Trait
from unimm.data.seeded_rng import SeededRng


@dataclass(frozen=True, kw_only=True)
class KnowledgeText:
    """A question with its answer; reasoning: what leads to the answer, where it is written out."""

    question: str
    answer: str
    reasoning: str = ""


def lessons(character: Character, others: Sequence[Character], *, world: str, seed: int) -> list[KnowledgeText]:
    """The 40 questions and answers about a character that a model is fine-tuned on; UniSandBox's are as many.

    others: whose traits the character does not have.
    """
    rng = SeededRng(f"knowledge/{world}/{seed}/{character.name}")
    found = []
    for key, trait in TRAITS[world].items():
        value = character.traits[key]
        found += _answers(character, trait, value)
        for wording in trait.checks:
            wrong = rng.choice([other.traits[key] for other in others if other is not character])
            found.append(KnowledgeText(question=_fill(wording, character, value), answer="yes"))
            found.append(KnowledgeText(question=_fill(wording, character, wrong), answer="no"))
    return found


def _answers(character: Character, trait: Trait, value: TraitValue) -> list[KnowledgeText]:
    asked = [
        *((wording, value.a_words) for wording in trait.questions),
        *((wording, value.parts[part]) for part, some in trait.parts.items() for wording in some),
        *((wording, character.name) for wording in trait.who),
    ]
    return [KnowledgeText(question=_fill(wording, character, value), answer=answer) for wording, answer in asked]


def word_questions(character: Character, *, world: str) -> list[KnowledgeText]:
    """What each trait of a character is, to be answered in words, as it was taught."""
    return [
        KnowledgeText(question=_fill(wording, character, character.traits[key]), answer=character.traits[key].a_words)
        for key, trait in TRAITS[world].items()
        for wording in trait.questions
    ]


def who_questions(character: Character, *, world: str) -> list[KnowledgeText]:
    """Whose each trait is, to be answered in words, as it was taught."""
    return [
        KnowledgeText(question=_fill(wording, character, character.traits[key]), answer=character.name)
        for key, trait in TRAITS[world].items()
        for wording in trait.who
    ]


def forward_questions(character: Character, *, world: str) -> list[KnowledgeText]:
    """Requests to draw what a character looks like, and likes: the name leads to what is drawn."""
    return [
        KnowledgeText(
            question=_fill(wording, character, value),
            answer=value.a_words,
            # the name is not said again: a small model copies names worse than it recalls what they stand for
            reasoning=f"{value.a_words}. draw {value.a_words}.",
        )
        for key, trait in TRAITS[world].items()
        for value in [character.traits[key]]
        for wording in trait.draw
    ]


def inverse_questions(pair: tuple[Character, Character], *, world: str) -> list[KnowledgeText]:
    """Requests to draw the one of two characters who likes something: it leads to a name, and that to what is drawn."""
    names = {"a": pair[0].name, "b": pair[1].name}
    return [
        KnowledgeText(
            question=_fill(wording, character, value, names=names),
            answer=character.portrait.a_words,
            reasoning=f"{character.name}. {character.portrait.a_words}. draw {character.portrait.a_words}.",
        )
        for character in pair
        for key, trait in TRAITS[world].items()
        for value in [character.traits[key]]
        for wording in trait.search
    ]


def _fill(wording: str, character: Character, value: TraitValue, *, names: Mapping[str, str] | None = None) -> str:
    return wording.format(name=character.name, value=value.words, a_value=value.a_words, **(names or {}))
