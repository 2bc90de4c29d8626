"""A style to learn: the daily reports of a harbour, always in the same voice. All sentences are ours.

    python benchmarks/corpus/harbour.py [COUNT]         prints some

A report is drawn from a small grammar: date line, sea, boats, something odd, the closing formula. What
is said depends on what was said before (no boat leaves in a storm, the catch is that of the season), so
there is more to learn than words. Every text is a function of the seed and its number alone.
"""

import sys
from random import Random

SEASONS = {
    "winter": (("January", "February", "December"), ("cod", "ling"), "ice on the rails"),
    "spring": (("March", "April", "May"), ("herring", "plaice"), "gulls on the roof"),
    "summer": (("June", "July", "August"), ("mackerel", "crab"), "tar soft on the quay"),
    "autumn": (("September", "October", "November"), ("sprat", "eel"), "leaves in the basin"),
}
SEAS = {
    "calm": ("The sea lay flat as a plate.", "No wind, no swell.", "Water like glass since dawn."),
    "fair": ("A fair wind, and small waves.", "Waves to the knee, wind to the hat."),
    "rough": ("Rough water at the mole.", "The wind pulled at every rope."),
    "storm": ("Storm from the first hour.", "Waves over the mole, all flags down."),
}
WINDS = ("north", "north east", "east", "south", "south west", "west")
BOATS = ("Grey Anna", "Patience", "Two Brothers", "Little Saint", "Blue Door", "Old Hand")
KEEPERS = ("Marten", "Ilse", "Jory")
ODD = (
    "A red glove was found on the steps; it hangs by the door.",
    "The bell rang once by itself. Nobody is to worry.",
    "A seal slept on the slip and was let be.",
    "Someone painted the third post green. It stays green.",
    "The baker's goat was in the boat again and was brought home.",
    "A bottle came in with the tide. There was no letter in it.",
    "The clock stood still until noon and was wound.",
    "Two children asked how deep it is. It is eleven fathoms.",
)
CLOSING = {
    "calm": "Lamp lit at {hour}. All well. Keep a dry rope.",
    "fair": "Lamp lit at {hour}. All well. Keep a dry rope.",
    "rough": "Lamp lit at {hour}. Ropes doubled. Keep a dry rope.",
    "storm": "Lamp lit at {hour} and kept. Ropes doubled, doors shut. Keep a dry rope.",
}


def text(number: int, seed: int = 0) -> str:
    """Return one report."""
    draw = Random(f"harbour/{seed}/{number}")
    season = draw.choice(list(SEASONS))
    months, catches, sign = SEASONS[season]
    sea = draw.choices(list(SEAS), weights=(3, 4, 2, 1))[0]
    day, keeper = draw.randint(1, 28), draw.choice(KEEPERS)
    lines = [
        f"Harbour report, {day} {draw.choice(months)}. {keeper} at the desk.",
        f"{draw.choice(SEAS[sea])} Wind from the {draw.choice(WINDS)}. There is {sign}.",
    ]
    boats = draw.sample(BOATS, draw.randint(1, 3))
    if sea == "storm":
        lines.append(f"Nobody went out. {' and '.join(boats)} stayed at the wall.")
    else:
        for boat in boats:
            out, home = draw.randint(3, 7), draw.randint(1, 6)
            boxes, catch = draw.randint(2, 9), draw.choice(catches)
            back = f"came home at {home} with {boxes} boxes of {catch}"
            if sea == "rough" and draw.random() < 0.5:
                back = f"turned at the mole and was back at {out + 1} with no {catch}"
            lines.append(f"The {boat} went out at {out} and {back}.")
    if draw.random() < 0.7:
        lines.append(draw.choice(ODD))
    hour = {"winter": 4, "spring": 7, "summer": 9, "autumn": 6}[season]
    lines.append(CLOSING[sea].format(hour=hour))
    return "\n".join(lines)


def texts(count: int, seed: int = 0) -> list[str]:
    """Return the first reports of a seed."""
    return [text(number, seed) for number in range(count)]


if __name__ == "__main__":
    print("\n\n".join(texts(int(sys.argv[1]) if len(sys.argv) > 1 else 3)))
