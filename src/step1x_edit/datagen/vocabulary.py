"""The words of the data engine: objects, colours and positions, in English and Chinese.

One table each, read by the scene renderer (which sprite, which RGB), the captions and the
tokenizer's training text.
"""

from typing import NamedTuple


class ObjectEntry(NamedTuple):
    """One drawable thing."""

    zh: str
    """Its Chinese name."""
    code_point: str
    """The emoji whose drawing it is, as the atlas package names the file."""


OBJECTS: dict[str, ObjectEntry] = {
    "cat": ObjectEntry("猫", "1f408"),
    "dog": ObjectEntry("狗", "1f415"),
    "rabbit": ObjectEntry("兔子", "1f407"),
    "elephant": ObjectEntry("大象", "1f418"),
    "penguin": ObjectEntry("企鹅", "1f427"),
    "duck": ObjectEntry("鸭子", "1f986"),
    "fish": ObjectEntry("鱼", "1f420"),
    "turtle": ObjectEntry("乌龟", "1f422"),
    "butterfly": ObjectEntry("蝴蝶", "1f98b"),
    "tree": ObjectEntry("树", "1f333"),
    "cactus": ObjectEntry("仙人掌", "1f335"),
    "sunflower": ObjectEntry("向日葵", "1f33b"),
    "mushroom": ObjectEntry("蘑菇", "1f344"),
    "apple": ObjectEntry("苹果", "1f34e"),
    "banana": ObjectEntry("香蕉", "1f34c"),
    "strawberry": ObjectEntry("草莓", "1f353"),
    "pizza": ObjectEntry("披萨", "1f355"),
    "hamburger": ObjectEntry("汉堡", "1f354"),
    "cake": ObjectEntry("蛋糕", "1f382"),
    "car": ObjectEntry("汽车", "1f697"),
    "bus": ObjectEntry("公交车", "1f68c"),
    "bicycle": ObjectEntry("自行车", "1f6b2"),
    "boat": ObjectEntry("帆船", "26f5"),
    "rocket": ObjectEntry("火箭", "1f680"),
    "house": ObjectEntry("房子", "1f3e0"),
    "umbrella": ObjectEntry("雨伞", "2602-fe0f"),
    "balloon": ObjectEntry("气球", "1f388"),
    "gift": ObjectEntry("礼物", "1f381"),
    "football": ObjectEntry("足球", "26bd"),
    "guitar": ObjectEntry("吉他", "1f3b8"),
    "clock": ObjectEntry("闹钟", "23f0"),
    "chair": ObjectEntry("椅子", "1fa91"),
    "hat": ObjectEntry("帽子", "1f3a9"),
    "backpack": ObjectEntry("书包", "1f392"),
    "book": ObjectEntry("书", "1f4d5"),
    "key": ObjectEntry("钥匙", "1f511"),
    "star": ObjectEntry("星星", "2b50"),
    "crown": ObjectEntry("皇冠", "1f451"),
    "bell": ObjectEntry("铃铛", "1f514"),
    "snowman": ObjectEntry("雪人", "26c4"),
    "robot": ObjectEntry("机器人", "1f916"),
    "shoe": ObjectEntry("鞋", "1f45f"),
    "shirt": ObjectEntry("衬衫", "1f455"),
    "teddy bear": ObjectEntry("泰迪熊", "1f9f8"),
}


class ColourEntry(NamedTuple):
    """One nameable colour."""

    zh: str
    rgb: tuple[float, float, float]
    """sRGB in [0, 1]: the hue of the tinted middle tones."""


COLOURS: dict[str, ColourEntry] = {
    "red": ColourEntry("红色", (0.86, 0.10, 0.12)),
    "orange": ColourEntry("橙色", (0.97, 0.52, 0.08)),
    "yellow": ColourEntry("黄色", (0.97, 0.85, 0.12)),
    "green": ColourEntry("绿色", (0.16, 0.66, 0.22)),
    "blue": ColourEntry("蓝色", (0.13, 0.33, 0.88)),
    "purple": ColourEntry("紫色", (0.54, 0.20, 0.76)),
    "pink": ColourEntry("粉色", (0.97, 0.48, 0.72)),
    "white": ColourEntry("白色", (0.93, 0.93, 0.93)),
    "black": ColourEntry("黑色", (0.13, 0.13, 0.14)),
}

POSITIONS: dict[str, tuple[str, float]] = {
    "left": ("左边", 0.22),
    "middle": ("中间", 0.50),
    "right": ("右边", 0.78),
}
"""Name → (Chinese, centre of the object as a fraction of the picture's width)."""


IRREGULAR_PLURALS = {"fish": "fish", "cactus": "cacti", "snowman": "snowmen"}


def plural(noun: str) -> str:
    """The English plural of a key of `OBJECTS`, with or without words before it."""
    *before, last = noun.split(" ")
    if last in IRREGULAR_PLURALS:
        last = IRREGULAR_PLURALS[last]
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "es" if last.endswith(("s", "x", "ch", "sh")) else "s"
    return " ".join((*before, last))


def where(position: str) -> str:
    """A key of `POSITIONS` as English says it: "on the left", "in the middle"."""
    return f"{'in' if position == 'middle' else 'on'} the {position}"
