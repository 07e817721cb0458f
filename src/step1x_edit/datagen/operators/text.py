"""Text modification: the words on a sign change, go, or come."""

from dataclasses import replace

from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.scene import sample_scene
from step1x_edit.datagen.signs import Sign
from step1x_edit.datagen.vocabulary import COLOURS

LATIN = (
    "OPEN", "CLOSED", "SALE", "CAFE", "HOTEL", "STOP", "WELCOME", "PIZZA", "BOOKS", "MUSIC", "EXIT",
    "TAXI", "PARK", "BEACH", "HELLO", "THANKS", "LOVE", "PEACE", "DREAM", "SMILE", "SUMMER",
    "WINTER", "SPRING", "AUTUMN", "TODAY", "FRESH", "BREAD", "COFFEE", "TEA", "JUICE", "ZOO",
    "CITY", "HAPPY", "LUCKY", "MOON", "STAR", "RIVER", "GARDEN", "MUSEUM", "STUDIO", "2025", "2030",
    "100", "FREE", "NEW", "BEST", "GO", "YES", "NO",
)  # fmt: skip
CHINESE = (
    "欢迎", "你好", "谢谢", "新年快乐", "咖啡", "茶馆", "书店", "医院", "学校", "公园", "出口",
    "入口", "停车场", "超市", "面馆", "早餐", "水果", "花店", "电影院", "图书馆", "北京", "上海",
    "广州", "成都", "春天", "夏天", "秋天", "冬天", "月亮", "星星", "大海", "高山", "平安", "幸福",
    "加油", "今天", "明天", "免费", "打折", "开业",
)  # fmt: skip
CHINESE_SHARE = 0.45
BOARD_HEIGHT = 0.26
MARGIN = 0.06
"""Between the longest board and the picture's edge, of its width."""


def text(context: Context, width: int, height: int) -> Edit:
    """Change the words of a sign to others of the same script, take them off, or write some."""
    rng = context.rng
    scene = sample_scene(rng, context.atlas, width, height, num_objects=int(rng.choice([0, 1, 2])))
    words = CHINESE if rng.random() < CHINESE_SHARE else LATIN
    old, new = (str(word) for word in rng.choice(words, 2, replace=False))
    kind = str(rng.choice(["text_change", "text_removal", "text_addition"], p=[0.7, 0.15, 0.15]))
    letters = max(len(old), len(new)) * (1.0 if words is CHINESE else 0.66) + 0.8
    across = min(BOARD_HEIGHT * letters * min(width, height) / width, 1 - 2 * MARGIN)
    colour, top = str(rng.choice(list(COLOURS))), rng.random() < 0.6
    sign = Sign(
        "" if kind == "text_addition" else old,
        float(rng.uniform(across / 2 + MARGIN, 1 - across / 2 - MARGIN)) if across < 0.8 else 0.5,
        0.2 if top else 0.8,
        BOARD_HEIGHT,
        across,
        colour,
    )
    said = {"old_text": old, "new_text": new}
    before = replace(scene, signs=(sign,))
    after = replace(scene, signs=(replace(sign, text="" if kind == "text_removal" else new),))
    return Edit(before, after, kind, {"en": said, "zh": said})
