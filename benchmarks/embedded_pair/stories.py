"""Short English stories made up by rule, to train the demonstration pair on.

A story introduces someone, a place, a thing and the weather, lets something go wrong, and tells what was tried
and how it ended. What is said early decides what is likely later: a harbour makes a lost thing fall into water,
fog spoils a search, a smith mends what a teacher cannot, and whoever practised wins more often. So a language
model has agreement, pronouns, references over several sentences and some cause and effect to learn, and the
same opening can end well, badly or neither.

The opening (`Story.setup`) never tells the end; it is the prompt of the preference data. Stories are split by a
hash of the opening, so no opening of the training split is ever held out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

T = TypeVar("T")
Mood = Literal["happy", "neutral", "sad"]
Split = Literal["train", "held_out"]

HELD_OUT_ONE_IN = 10
"""One opening in this many is held out."""


@dataclass(frozen=True)
class Story:
    """One story in two halves."""

    setup: str
    """Opening: who, where, with what, and what goes wrong. A few sentences, no leading or trailing space."""
    resolution: str
    """What was tried, what came of it, and how everyone felt. Two to four sentences."""
    mood: Mood
    """How the story ends, as the generator meant it."""

    @property
    def text(self) -> str:
        """The whole story."""
        return f"{self.setup} {self.resolution}"

    @property
    def split(self) -> Split:
        """Which split the story belongs to, from a hash of the opening."""
        digest = hashlib.sha256(self.setup.encode("utf-8")).digest()
        return "held_out" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else "train"


def stories(*, seed: int | str, split: Split) -> Iterator[Story]:
    """Endless stream of stories of one split.

    Args:
        seed: any integer or string; equal seeds give equal streams. The global random state is not used.
        split: "train" or "held_out".

    Raises:
        ValueError: for another split.

    Example:
        >>> from itertools import islice
        >>> [story.mood in ("happy", "neutral", "sad") for story in islice(stories(seed=0, split="train"), 2)]
        [True, True]
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"expected split 'train' or 'held_out', got {split!r}; pass one of the two")
    return _stream(seed, split)


def held_out_texts(n: int, *, seed: int) -> list[str]:
    """The first `n` held-out stories of a seed, as plain text."""
    return [story.text for story in islice(stories(seed=f"texts:{seed}", split="held_out"), n)]


def _stream(seed: int | str, split: Split) -> Iterator[Story]:
    # A string seed goes through SHA-512 in random.Random, the same on every platform and Python.
    rng = random.Random(f"stories:{seed}")
    while True:
        story = _tell(rng)
        if story.split == split:
            yield story


# ------------------------------------------------------------------------------------------------ the cast


@dataclass(frozen=True)
class _Person:
    name: str
    they: str
    them: str
    their: str
    trade: str = ""
    plural: bool = False

    @property
    def was(self) -> str:
        return "were" if self.plural else "was"

    @property
    def have(self) -> str:
        return "have" if self.plural else "has"

    @property
    def full(self) -> str:
        return f"{self.name} the {self.trade}" if self.trade else self.name


@dataclass(frozen=True)
class _Place:
    name: str
    by: str
    """Preposition of being there."""
    water: bool
    nooks: tuple[str, ...]
    """Where a lost thing may turn up."""


_WOMEN = ("Mira", "Anna", "Lucy", "Rosa", "Nell", "Ida", "Clara", "Hanna")
_MEN = ("Tom", "Ben", "Otto", "Sam", "Felix", "Hugo", "Karl", "Leo")
_GROUPS = ("the two sisters", "the three children", "the twins")
# The trade decides what someone is good at, and mostly where the story plays.
_TRADES = {
    "baker": ("market", "village", "mill"),
    "sailor": ("harbour", "lake"),
    "shepherd": ("hill", "forest"),
    "smith": ("village", "market"),
    "teacher": ("school", "village"),
    "painter": ("lake", "hill", "garden"),
    "doctor": ("village", "harbour"),
    "gardener": ("garden", "market"),
}
_PLACES = {
    place.name: place
    for place in (
        _Place("market", "at", False, ("under a table", "behind a barrel", "between two stalls")),
        _Place("harbour", "at", True, ("under a boat", "behind a barrel", "in a net")),
        _Place("forest", "in", False, ("under a tree", "in the tall grass", "behind a rock")),
        _Place("lake", "at", True, ("in the tall grass", "under a boat", "behind a rock")),
        _Place("village", "in", False, ("under a bench", "behind a wall", "in front of the church")),
        _Place("garden", "in", False, ("under a tree", "behind a wall", "between the roses")),
        _Place("mill", "at", True, ("behind a wheel", "under a bench", "in a sack of flour")),
        _Place("hill", "on", False, ("behind a rock", "in the tall grass", "under a tree")),
        _Place("school", "at", False, ("under a bench", "behind a door", "in a box")),
    )
}
_THINGS = ("bell", "ring", "book", "lamp", "kite", "key", "coat", "map", "flute", "clock", "mirror", "hat", "cup")
_LOOKS = ("silver", "golden", "wooden", "red", "blue", "green", "small", "old", "heavy", "little")
_KIN = ("grandmother", "grandfather", "mother", "father", "uncle", "aunt")
_KIN_THEM = dict(zip(_KIN, ("her", "him", "her", "him", "him", "her"), strict=True))
_ANIMALS = ("dog", "cat", "donkey", "goat", "horse", "lamb")
_WEATHER = {
    "sun": ("The sun was shining.", "It was a warm and clear day."),
    "rain": ("It was raining hard.", "Rain fell on the roofs, and the road was wet."),
    "fog": ("A thick fog lay over the land.", "The fog was so thick that nobody could see far."),
    "snow": ("Snow covered the road.", "It was very cold, and snow was falling."),
    "wind": ("A strong wind was blowing.", "The wind blew hard from the north."),
}
_TIMES = ("One morning", "One evening", "One day", "Last winter", "Last summer", "Long ago", "On Sunday")


class _Draw:
    """The random choices of a teller."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, options: Sequence[T]) -> T:
        return options[self._rng.randrange(len(options))]

    def chance(self, p: float) -> bool:
        return self._rng.random() < p

    def mood(self, happy: float, neutral: float) -> Mood:
        if self.chance(happy):
            return "happy"
        return "neutral" if self.chance(neutral / (1.0 - happy)) else "sad"


@dataclass(frozen=True)
class _Scene:
    """What the opening has fixed for the rest of the story."""

    hero: _Person
    friend: _Person
    place: _Place
    look: str
    thing: str
    giver: str
    weather: str

    @property
    def a_thing(self) -> str:
        return f"{'an' if self.look[0] in 'aeiou' else 'a'} {self.look} {self.thing}"

    @property
    def the_thing(self) -> str:
        return f"the {self.look} {self.thing}"


def _tell(rng: random.Random) -> Story:
    draw = _Draw(rng)
    scene = _scene(draw)
    setup = _opening(draw, scene)
    plot = draw.pick((_lost, _lost, _trapped, _errand, _contest, _quarrel, _stranger))
    trouble, resolution, mood = plot(draw, scene)
    resolution = [*resolution, _ending(draw, scene, mood)]
    return Story(_join([*setup, *trouble]), _join(resolution), mood)


def _join(sentences: Sequence[str]) -> str:
    return " ".join(_capital(sentence) for sentence in sentences)


def _capital(sentence: str) -> str:
    start = 1 if sentence[0] == '"' else 0
    return sentence[:start] + sentence[start].upper() + sentence[start + 1 :]


# --------------------------------------------------------------------------------------------- the opening


def _scene(draw: _Draw) -> _Scene:
    if draw.chance(0.15):
        hero = _Person(draw.pick(_GROUPS), "they", "them", "their", plural=True)
        home: tuple[str, ...] = tuple(_PLACES)
    else:
        trade = draw.pick(tuple(_TRADES))
        hero = _single(draw, draw.chance(0.5), trade)
        home = _TRADES[trade] if draw.chance(0.75) else tuple(_PLACES)
    friend = _single(draw, draw.chance(0.5), "")
    while friend.name == hero.name:
        friend = _single(draw, draw.chance(0.5), "")
    return _Scene(
        hero=hero,
        friend=friend,
        place=_PLACES[draw.pick(home)],
        look=draw.pick(_LOOKS),
        thing=draw.pick(_THINGS),
        giver=draw.pick(_KIN),
        weather=draw.pick(tuple(_WEATHER)),
    )


def _single(draw: _Draw, woman: bool, trade: str) -> _Person:
    if woman:
        return _Person(draw.pick(_WOMEN), "she", "her", "her", trade)
    return _Person(draw.pick(_MEN), "he", "him", "his", trade)


def _opening(draw: _Draw, s: _Scene) -> list[str]:
    hero, friend, place = s.hero, s.friend, s.place
    sentences = [
        draw.pick(
            (
                f"{draw.pick(_TIMES)}, {hero.full} went to the {place.name} with {hero.their} friend {friend.name}.",
                f"{draw.pick(_TIMES)}, {hero.full} and {hero.their} friend {friend.name} met {place.by} "
                f"the {place.name}.",
                f"{hero.full} lived {draw.pick(('near', 'not far from'))} the {place.name} with {friend.name}.",
            )
        )
    ]
    if draw.chance(0.75):
        sentences.append(draw.pick(_WEATHER[s.weather]))
    return sentences


def _carried(draw: _Draw, s: _Scene) -> str:
    """The sentence that brings in the thing a later sentence returns to."""
    hero = s.hero
    return draw.pick(
        (
            f"{hero.they} carried {s.a_thing} that {hero.their} {s.giver} had given {hero.them}.",
            f"in {hero.their} bag there was {s.a_thing}, a gift from {hero.their} {s.giver}.",
            f"{hero.name} had bought {s.a_thing} for {hero.their} {s.giver}.",
        )
    )


# ----------------------------------------------------------------------------------------------- the plots
# Each returns what goes wrong (end of the opening), what follows, and the mood of the end.


def _lost(draw: _Draw, s: _Scene) -> tuple[list[str], list[str], Mood]:
    hero, friend, place = s.hero, s.friend, s.place
    wet = place.water and draw.chance(0.7)
    if wet:
        how = draw.pick(
            (
                f"but {hero.they} slipped, and the {s.thing} fell into the water.",
                f"suddenly the {s.thing} fell out of {hero.their} hands and sank in the deep water.",
            )
        )
    elif s.weather == "wind" and s.thing in ("kite", "hat", "map", "coat"):
        how = f"the wind tore the {s.thing} away and blew it far over the trees."
    else:
        thief = draw.pick(("a black bird", "a fox", "a thief"))
        how = draw.pick(
            (
                f"but {thief} came and took the {s.thing}.",
                f"when {hero.they} looked into the bag, the {s.thing} was gone.",
                f"on the way {hero.they} dropped the {s.thing} and did not notice it.",
            )
        )
    skill = 0.2 if hero.trade == ("sailor" if wet else "shepherd") else 0.0
    murk = 0.15 if s.weather in ("fog", "rain") else 0.0
    mood = draw.mood(0.38 + skill - murk, 0.22)
    if wet:
        tried = draw.pick(
            (
                f"{hero.name} jumped into the water and swam down to the bottom.",
                f"{friend.name} took a long net and pulled it through the water.",
            )
        )
    else:
        tried = draw.pick(
            (
                f"{hero.name} and {friend.name} searched for it until it was dark.",
                f"{friend.name} took a lamp and looked for it everywhere {place.by} the {place.name}.",
                f"they asked everyone they met, and {friend.name} called for help.",
            )
        )
    nook = "on the bottom" if wet else draw.pick(place.nooks)
    came = {
        "happy": (
            f"at last {draw.pick((hero, friend)).name} found {s.the_thing} {nook}.",
            f"{s.the_thing} was {nook}, and nothing was missing.",
        ),
        "neutral": (
            f"they did not find {s.the_thing}, but {hero.their} {s.giver} gave {hero.them} another one.",
            f"they found something else {nook}, and {hero.name} kept it.",
        ),
        "sad": (
            f"they found {s.the_thing} {nook}, but it was broken.",
            f"nobody ever saw {s.the_thing} again.",
        ),
    }
    return [_carried(draw, s), how], [tried, draw.pick(came[mood])], mood


def _trapped(draw: _Draw, s: _Scene) -> tuple[list[str], list[str], Mood]:
    hero, friend, place = s.hero, s.friend, s.place
    animal = draw.pick(_ANIMALS)
    tool, where = draw.pick(
        (("rope", "had fallen into a deep well"), ("knife", "was caught in a net"), ("axe", "lay under a fallen tree"))
    )
    trouble = [
        draw.pick(
            (
                f"there they heard the cry of {draw.pick(('a young', 'a white', 'a black'))} {animal} that {where}.",
                f"{hero.their} {animal} ran ahead, and soon they saw that it {where}.",
            )
        )
    ]
    ready = draw.chance(0.5)
    trouble.append(
        draw.pick(
            (f"luckily {friend.name} had brought {_a(tool)}.", f"{hero.name} had {_a(tool)} in {hero.their} bag.")
        )
        if ready
        else f"they needed {_a(tool)}, but they had none."
    )
    healer = 0.15 if hero.trade in ("doctor", "shepherd") else 0.0
    mood = draw.mood((0.5 if ready else 0.25) + healer, 0.2)
    if ready:
        tried = draw.pick(
            (
                f"{hero.name} used the {tool} with great care while {friend.name} held the {animal}.",
                f"with the {tool} in {hero.their} hand, {hero.name} went slowly to the {animal}.",
            )
        )
    else:
        tried = draw.pick(
            (
                f"{friend.name} ran back to the {place.name} to fetch {_a(tool)}.",
                f"{hero.name} tried to free the {animal} with bare hands.",
            )
        )
    came = {
        "happy": (
            f"soon the {animal} was free, and it followed {hero.them} home.",
            f"the {animal} came out alive and licked {hero.their} hands.",
        ),
        "neutral": (
            f"the {animal} got free by itself and ran away.",
            f"a farmer came, freed the {animal} and took it with him.",
        ),
        "sad": (
            f"they came too late, and the {animal} was dead.",
            f"the {animal} was free, but its leg was broken.",
        ),
    }
    return trouble, [tried, draw.pick(came[mood])], mood


def _errand(draw: _Draw, s: _Scene) -> tuple[list[str], list[str], Mood]:
    hero, friend = s.hero, s.friend
    load = draw.pick(("medicine", "a letter", "bread"))
    trouble = [
        draw.pick(
            (
                f"{hero.their} {s.giver} was ill, and {hero.they} had to bring {_KIN_THEM[s.giver]} {load}.",
                f"{hero.name} had to carry {load} to {hero.their} {s.giver} before night.",
            )
        ),
        draw.pick(
            (
                "but the bridge over the river was broken.",
                "but a big tree lay across the road.",
                "but the gate was locked, and nobody had the key.",
            )
        ),
    ]
    bad = 0.15 if s.weather in ("snow", "rain") else 0.0
    mood = draw.mood(0.42 - bad, 0.25)
    tried = draw.pick(
        (
            f"{friend.name} knew another way through the forest, and they ran.",
            f"{hero.name} climbed over the wall and went on alone.",
            "together they built a small raft out of old wood.",
            f"{hero.name} waited an hour and then tried to go around it.",
        )
    )
    came = {
        "happy": (
            f"{hero.they} arrived in time, and the {s.giver} soon was well again.",
            f"before night {hero.they} stood at the door with {load}.",
        ),
        "neutral": (
            f"{hero.they} came late, but the {s.giver} had not been waiting.",
            f"a neighbour had already brought {load}.",
        ),
        "sad": (
            f"{hero.they} came too late, and the house was dark and empty.",
            f"on the way {hero.they} lost {load if load != 'a letter' else 'the letter'} in the dark.",
        ),
    }
    return trouble, [tried, draw.pick(came[mood])], mood


def _contest(draw: _Draw, s: _Scene) -> tuple[list[str], list[str], Mood]:
    hero, friend, place = s.hero, s.friend, s.place
    art, made = draw.pick((("run", "race"), ("sing", "song"), ("paint", "picture"), ("bake", "cake")))
    diligent = draw.chance(0.5)
    trouble = [
        f"there was a contest {place.by} the {place.name}, and {hero.name} wanted to {art}.",
        draw.pick(
            (
                f"{hero.they} had practised every day for a month.",
                f"every evening {hero.they} had worked hard for it.",
            )
        )
        if diligent
        else draw.pick(
            (
                f"{hero.they} had not practised at all.",
                f"but {hero.they} had slept too long and came late.",
            )
        ),
    ]
    gifted = 0.15 if (hero.trade, art) in (("baker", "bake"), ("painter", "paint")) else 0.0
    mood = draw.mood((0.5 if diligent else 0.2) + gifted, 0.25)
    tried = draw.pick(
        (
            f"when the bell rang, {hero.name} began to {art}, and everyone watched.",
            f"{friend.name} stood in the crowd and called {hero.their} name.",
            f"first came {friend.name}, and then it was the turn of {hero.name}.",
        )
    )
    came = {
        "happy": (
            f"the {made} of {hero.name} was the best, and {hero.they} won {s.a_thing}.",
            f"{hero.they} won the first prize, {s.a_thing}.",
        ),
        "neutral": (
            f"{hero.they} came second, and {friend.name} won {s.a_thing}.",
            f"the {made} was neither good nor bad, and someone else won.",
        ),
        "sad": (
            f"the {made} went wrong, and the people turned away.",
            f"{hero.they} fell, and {hero.they} came last.",
        ),
    }
    return trouble, [tried, draw.pick(came[mood])], mood


def _quarrel(draw: _Draw, s: _Scene) -> tuple[list[str], list[str], Mood]:
    hero, friend = s.hero, s.friend
    trouble = [
        _carried(draw, s),
        draw.pick(
            (
                f"{friend.name} wanted to have the {s.thing} too, and they began to quarrel.",
                f"{friend.name} took the {s.thing} without asking and broke it.",
                f"{hero.name} said that {friend.name} had stolen the {s.thing}.",
            )
        ),
    ]
    handy = 0.15 if hero.trade == "smith" else 0.0
    mood = draw.mood(0.35 + handy, 0.25)
    tried = draw.pick(
        (
            f"for a long time they did not speak, and {friend.name} went home.",
            f'the next day {friend.name} came back and said, "I was wrong."',
            f'"we can mend it," said {hero.name}, and {hero.they} took out {hero.their} tools.',
            f'"keep it, then," said {hero.name} and turned around.',
        )
    )
    came = {
        "happy": (
            f"in the end they shared {s.the_thing} and were friends again.",
            f"{s.the_thing} was soon as good as new, and {hero.they} gave it to {friend.name}.",
        ),
        "neutral": (
            f"they put {s.the_thing} in a box and did not speak of it.",
            f"after a week nobody remembered {s.the_thing}.",
        ),
        "sad": (
            f"{friend.name} moved to another town and never came back.",
            f"{s.the_thing} stayed broken, and so did the friendship.",
        ),
    }
    return trouble, [tried, draw.pick(came[mood])], mood


def _stranger(draw: _Draw, s: _Scene) -> tuple[list[str], list[str], Mood]:
    hero, place = s.hero, s.place
    guest = draw.pick((("an old woman", "woman", "she"), ("an old man", "man", "he"), ("a poor boy", "boy", "he")))
    wish = draw.pick(("bread", "a warm bed", "some milk"))
    kind = draw.chance(0.6)
    trouble = [
        f"{guest[0]} came to {hero.them} and asked for {wish}.",
        f"{hero.name} gave the {guest[1]} what {guest[2]} needed."
        if kind
        else draw.pick(
            (f"{hero.name} sent the {guest[1]} away.", f"but {hero.name} did not want to help the {guest[1]}.")
        ),
    ]
    mood = draw.mood(0.55 if kind else 0.15, 0.25)
    tried = draw.pick(
        (
            f"a year later {hero.name} lost {hero.their} way {place.by} the {place.name}.",
            f"that night a fire broke out in the house of {hero.name}.",
            f"in winter there was nothing left to eat, and {hero.name} {s.hero.was} hungry.",
        )
    )
    came = {
        "happy": (
            f"then the {guest[1]} came and helped {hero.them}, and brought {s.a_thing} too.",
            f"the {guest[1]} remembered {hero.them} and opened the door.",
        ),
        "neutral": (
            f"{hero.they} never saw the {guest[1]} again, and the danger passed.",
            f"a neighbour helped a little, and {hero.they} went on.",
        ),
        "sad": (
            f"the {guest[1]} walked past, and nobody helped {hero.them}.",
            f"{hero.they} called and called, but nobody came.",
        ),
    }
    return trouble, [tried, draw.pick(came[mood])], mood


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _ending(draw: _Draw, s: _Scene, mood: Mood) -> str:
    hero, friend = s.hero, s.friend
    endings = {
        "happy": (
            f"{hero.name} {hero.was} very happy and laughed all the way home.",
            f"{hero.they} thanked {friend.name} and smiled.",
            "that evening they danced and sang until midnight.",
            f"{friend.name} hugged {hero.them}, and both were glad.",
            f"{hero.their} {s.giver} was proud, and there was a great feast.",
            f"they cheered, and {hero.name} smiled at {friend.name}.",
        ),
        "neutral": (
            f"{hero.name} went home and ate {hero.their} supper.",
            "the next day was like any other day.",
            f"then {hero.they} went back to work.",
            f"{friend.name} said nothing, and they walked on.",
            f"after that {hero.they} stayed at home for a while.",
        ),
        "sad": (
            f"{hero.name} cried all the way home.",
            f"{hero.they} sat down beside {friend.name} and wept.",
            f"{hero.they} {hero.was} sad for many weeks.",
            f"with tears in {hero.their} eyes, {hero.name} went home alone.",
            f"{friend.name} sighed, and {hero.name} felt lonely.",
            f"since that day {hero.name} {hero.have} been sad and silent.",
        ),
    }
    return draw.pick(endings[mood])
