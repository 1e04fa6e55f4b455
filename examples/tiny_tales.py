"""A seeded grammar of short English tales, plain facts and chats: the text of `train_tiny.py`.

The longer templates are in `tiny_tales.txt`. All of it was written for this repository and is under
its licence (Apache-2.0).

A template is English with `[this|that]` for a choice (an empty side means: or nothing; choices
nest) and `{hero}` for a name that stays the same through one text. `expand` does the rest: it
capitalises sentences and turns "a owl" into "an owl".
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from pathlib import Path

Names = dict[str, str]

GIRLS = (
    "Anna Bella Clara Daisy Ella Grace Hannah Ida Julia Lily Maya Nora Rosa Sara Tilda Zoe "
    "Alma Bridget Edith Flora Greta Iris Jane Kate Lucy Martha Olive Paula Ruth Sophie Vera"
)
BOYS = (
    "Adam Ben Carl Daniel Felix George Henry Jack Leo Max Noah Oscar Peter Sam Tom Will "
    "Albert Bruno Conrad David Emil Frank Hugo Isaac Jonas Karl Martin Otto Paul Robert "
    "Victor"
)
ANIMALS = "fox bear rabbit mouse owl squirrel hedgehog badger duck goat crow frog cat dog donkey"
HABITS = {  # a trait, and what it means for what the hero does
    "kind": "[always had a good word for everyone|liked to help wherever help was needed]",
    "curious": "[asked questions from morning to night|wanted to know how everything worked]",
    "quiet": "[liked to watch and listen|did not talk much, but noticed everything]",
    "cheerful": "[sang on the way to the well|laughed easily and often]",
    "patient": "[never hurried|could wait longer than anyone]",
    "brave": "[was not afraid of thunder|climbed the tallest trees]",
}
PLACES = [
    "[|little |small ]village [by the sea|at the foot of a mountain|between two hills]",
    "[|old |small |white ]house [at the edge of the forest|near the river|on a hill]",
    "[|quiet |little ]town [on the coast|beside a long river|with narrow streets]",
    "[|small |old ]farm [in a green valley|not far from the lake|beside the road]",
]
AWAY = ["forest", "market", "river", "lake", "old mill", "meadow", "harbour", "bridge", "hill"]
THINGS = [
    "[silver|golden|little brass] [key|bell|whistle|ring]",
    "[red|blue|green|woollen] [scarf|hat|coat|ribbon]",
    "[wooden|painted|small] [boat|horse|box|flute]",
    "[old|round|shining] [lantern|compass|watch|coin]",
]
FOODS = ["bread", "soup", "honey cake", "apple pie", "cheese", "warm milk", "pancakes", "plum jam"]
WEATHER = {
    "spring": "[the first flowers [were in bloom|stood in the grass]|the birds were building their"
    " nests|a soft rain fell on the fields|the snow was [melting|almost gone]]",
    "summer": "[the sun was [warm|bright] and the sky was [clear|blue]|the [bees|crickets] were busy"
    " in the grass|it was too hot to work|the air smelled of hay]",
    "autumn": "[the leaves were [golden|red|falling]|[mist|fog] lay over the [fields|hills]|a [cold|"
    "strong] wind blew [from the north|across the fields]|the apples were ripe]",
    "winter": "[snow [covered|lay on] the [fields|hills|roofs]|the lake was frozen|the days were"
    " short and [cold|dark]|ice hung from the roofs]",
}
SMALL = ["bird", "kitten", "lamb", "puppy", "rabbit", "hedgehog", "butterfly", "duckling"]
OLDER = ["grandmother", "grandfather", "uncle", "aunt", "mother", "father", "teacher"]

DAY = (
    "[one [morning|day|afternoon|evening] in {season}, [when|while] {weather}|one {season} [morning|"
    "day|evening]|on a [cold|fine|quiet|grey|windy] {season} [morning|day]|it was {season}, and"
    " {weather}. one [morning|day|evening]]"
)


def read_templates(path: Path) -> dict[str, dict[str, str]]:
    """Read a file of `# kind title` headings, each above a template that may span lines.

    Returns the templates by kind and title, in the order of the file.
    """
    templates: dict[str, dict[str, str]] = defaultdict(dict)
    for section in path.read_text(encoding="utf-8").split("# ")[1:]:
        heading, body = section.split("\n", 1)
        kind, title = heading.split(" ", 1)
        templates[kind][title] = " ".join(body.split()).replace("DAY", DAY)
    return templates


TEMPLATES = read_templates(Path(__file__).with_name("tiny_tales.txt"))
OPENINGS, PLOTS = list(TEMPLATES["opening"].values()), list(TEMPLATES["plot"].values())
FACTS = TEMPLATES["fact"]
CAPITALS = (
    "France Paris Germany Berlin Italy Rome Spain Madrid Portugal Lisbon Austria Vienna Greece"
    " Athens Poland Warsaw Norway Oslo Sweden Stockholm Finland Helsinki Denmark Copenhagen Ireland"
    " Dublin Hungary Budapest Japan Tokyo China Beijing Egypt Cairo Canada Ottawa Russia Moscow"
    " Turkey Ankara Kenya Nairobi Peru Lima Cuba Havana India Delhi"
).split()
HELLO = "[hello|hi|good morning|good evening|hello there|hi there|hey]"
WHO = (
    "I am a [tiny|very small] language model with the architecture of Qwen2.5. I was trained [from"
    " scratch|on short stories and simple facts] to [test and show|demonstrate] Qwenport[. I can"
    " tell you a story or a few simple facts|]."
)
SYSTEM = (
    "You are [a helpful assistant.|Qwen, created by Alibaba Cloud. You are a helpful assistant.|a"
    " storyteller.|a tiny model.]"
)
ABILITIES = (
    "I can tell [short|little] stories, [answer simple questions|say a few words about animals and"
    " the world] and add small numbers. [I am very small, so please do not ask too much|I often make"
    " mistakes, because I am very small]."
)


def choose(template: str, rng: random.Random) -> str:
    """Settle every `[a|b]`, from the inside out."""
    while "[" in template:
        template = re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), template)
    return template


def expand(template: str, names: Names, rng: random.Random) -> str:
    """Settle the choices, fill in the names (which may hold choices too), mind capitals and "an"."""
    text = choose(template, rng)
    while "{" in text:
        text = choose(re.sub(r"\{(\w+)\}", lambda m: names[m[1]], text), rng)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text.strip())
    return re.sub(
        r'(^"?|[.] "?|[.?!]" "|[.]" |[!?] (?=[^"])|[:!?] "|\n"?)([a-z])', upper_last, text
    )


def upper_last(match: re.Match[str]) -> str:
    """The match with its second group, one letter, in upper case."""
    return match[1] + match[2].upper()


def pronouns(is_girl: bool) -> list[str]:
    """Subject, object and possessive."""
    return ["she", "her", "her"] if is_girl else ["he", "him", "his"]


def cast(rng: random.Random) -> Names:
    """Who and what this one tale is about."""
    is_girl, friend_is_girl = rng.random() < 0.5, rng.random() < 0.5
    hero = rng.choice((GIRLS if is_girl else BOYS).split())
    friend = rng.choice([n for n in (GIRLS if friend_is_girl else BOYS).split() if n != hero])
    trait = rng.choice(list(HABITS))
    season = rng.choice(list(WEATHER))
    older = rng.choice(OLDER)
    older_is_woman = older in ("grandmother", "aunt", "mother", "teacher")
    names = {
        "hero": hero,
        "kind": rng.choice([*ANIMALS.split(), *(["girl" if is_girl else "boy"] * 15)]),
        "friend": friend,
        "friend_word": rng.choice(["friend", "best friend", "old friend"]),
        "trait": trait,
        "habit": HABITS[trait],
        "home": rng.choice(PLACES),
        "home2": rng.choice(["village", "house", "farm", "first lights"]),
        "away": rng.choice(AWAY),
        "thing": choose(rng.choice(THINGS), rng),
        "food": rng.choice(FOODS),
        "season": season,
        "season2": rng.choice([other for other in WEATHER if other != season]),
        "weather": WEATHER[season],
        "small": rng.choice(SMALL),
        "older": older,
        "ohe": "she" if older_is_woman else "he",
        "broken": rng.choice(["blue jug", "old clock", "kitchen window", "mirror"]),
    }
    names |= dict(zip(("he", "him", "his"), pronouns(is_girl), strict=True))
    return names | dict(zip(("fhe", "fhim", "fhis"), pronouns(friend_is_girl), strict=True))


def tale(rng: random.Random, names: Names) -> str:
    """An opening and a plot, all about the same names."""
    plot = rng.choice(PLOTS)
    return expand(rng.choice(OPENINGS) + " " + plot, names, rng)


def facts(rng: random.Random, topic: str) -> str:
    """The first sentence about a topic, then most of the others."""
    first, *rest = FACTS[topic].split(". ")
    kept = sorted(rng.sample(range(len(rest)), rng.randint(3, len(rest))))
    chosen = [rest[i] for i in kept]
    return ". ".join(sentence.rstrip(".") for sentence in [first, *chosen]) + "."


def exchange(rng: random.Random) -> tuple[str, str]:
    """One question and its answer."""
    kind = rng.random()
    if kind < 0.4:
        topic = rng.choice(list(FACTS))
        ask = (
            "[tell me about {topic}.|tell me about {topic}|please tell me about {topic}.|what do you"
            " know about {topic}?|can you tell me [something|more] about {topic}?|write [a few"
            " sentences|a paragraph] about {topic}.|what can you say about {topic}?]"
        )
        return expand(ask, {"topic": topic}, rng), facts(rng, topic)
    if kind < 0.7:
        names = cast(rng)
        ask = (
            "[[|please ][tell me|write] a [|short |little ]story[| about a {kind}| about a {kind}"
            " [named|called] {hero}| about {hero}| about {hero} and {friend}][.|]|can you tell me a"
            " story[| about a {kind}| about {hero}]?]"
        )
        return expand(ask, names, rng), tale(rng, names)
    if kind < 0.8:
        index = 2 * rng.randrange(len(CAPITALS) // 2)
        land, city = CAPITALS[index : index + 2]
        return f"What is the capital of {land}?", f"The capital of {land} is {city}."
    if kind < 0.88:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        ask = expand("what is {a} [plus|+] {b}?", {"a": str(a), "b": str(b)}, rng)
        return ask, f"{a} plus {b} is {a + b}."
    if kind < 0.94:
        answer = "[hello|hi]! [how can I help you|what would you like to hear]?"
        return expand(HELLO + "[!|.|, how are you?|]", {}, rng), expand(answer, {}, rng)
    if kind < 0.97:
        ask = "[who are you|what are you|what is your name]?"
        return expand(ask, {}, rng), expand(WHO, {}, rng)
    return expand("[what can you do|can you help me]?", {}, rng), expand(ABILITIES, {}, rng)


LETTER = (
    "dear {friend},\n[thank you for your letter.|I hope you are well.|how are you?] I am [writing to"
    " you from|staying with my {older} in] a {home}. when I came here, {weather}. [yesterday|"
    "this morning|last week] I [went to the {away}|walked to the {away} with my {older}] and [saw|"
    "found] a [{small}|{thing}]. [we ate {food} [and sang songs|in the garden]|I wish you had been"
    " there|it was a [wonderful|strange] day]. [please write soon|come and visit me in"
    " {season2}|tell me what you are doing]. [I miss you|I think of you often].\n[your friend|with"
    " love|yours], {hero}"
)


def text_document(rng: random.Random) -> str:
    """A tale, a letter, or a passage of facts, without any chat markers."""
    kind = rng.random()
    if kind < 0.75:
        return tale(rng, cast(rng))
    if kind < 0.85:
        return expand(LETTER, cast(rng), rng)
    return facts(rng, rng.choice(list(FACTS)))


def chat_document(rng: random.Random) -> str:
    """ChatML with one or more exchanges, in half of the cases after a system message."""
    turns = []
    if rng.random() < 0.5:
        turns.append(("system", expand(SYSTEM, {}, rng)))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        question, answer = exchange(rng)
        turns += [("user", question), ("assistant", answer)]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
