"""A multimodal language model that writes instructions and judges edits.

`Chat` is the model: `QwenChat` runs one here, `endpoint.EndpointChat` asks a server. What is asked
is the same for both.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from step1x_edit.datagen.backgrounds import Picture
from step1x_edit.datagen.photographs.roles import Unsuitable
from step1x_edit.datagen.records import Triplet

if TYPE_CHECKING:
    pass

LANGUAGES = {"en": "English", "zh": "Chinese"}
INSTRUCTION = (
    "The first picture was edited into the second one. A rough instruction for this edit is: "
    '"{draft}". Say in one short {language} sentence what to do, as a person would ask for it, and '
    "name what can be seen. Answer with that sentence alone."
)
JUDGEMENT = (
    'The first picture was edited into the second one with the instruction "{instruction}". '
    "How well does the second picture follow it while the rest stays as it was and looks real? "
    "Answer with one digit from 0 (not at all) to 9 (perfectly)."
)
MOST_LETTERS = 200
MAX_NEW_TOKENS = 64


@runtime_checkable
class Chat(Protocol):
    """A model that sees pictures and answers."""

    name: str

    def ask(self, pictures: list[Picture], question: str) -> str:
        """The answer."""
        ...

    def rate(self, pictures: list[Picture], question: str) -> float:
        """The answer to a question for a digit, 0 to 9; NaN where it is none."""
        ...


class MllmCaptioner:
    """Writes an edit's instruction in both languages: a `roles.Captioner`."""

    def __init__(self, chat: Chat) -> None:
        self.chat, self.name = chat, chat.name

    def write(self, source: Picture, target: Picture, draft: dict[str, str]) -> dict[str, str]:
        """See `roles.Captioner`."""
        written = {}
        for key, language in LANGUAGES.items():
            question = INSTRUCTION.format(draft=draft[key], language=language)
            answer = self.chat.ask([source, target], question).strip().strip('"“”')
            if not _usable(answer, key):
                raise Unsuitable("caption unusable")
            written[key] = answer
        return written


class MllmJudge:
    """Scores how well an edit follows its instruction: a `filters.Judge`."""

    def __init__(self, chat: Chat) -> None:
        self.chat, self.name = chat, chat.name

    def score(self, triplet: Triplet) -> float:
        """0 to 10; NaN, which passes no limit, where the model gave no score."""
        question = JUDGEMENT.format(instruction=triplet.instructions["en"])
        return self.chat.rate([triplet.source, triplet.target], question) * 10 / 9


class QwenChat:
    """A Qwen2.5-VL of a folder.

    Args:
        folder: The model's and its processor's files, as published.
        device: Where it runs, as torch names it.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        from step1x_edit.datagen.photographs.neural import loaded
        from step1x_edit.model.processor import PictureProcessor

        self.name = folder.name
        self._model: Any = loaded(Qwen2_5_VLForConditionalGeneration, str(folder)).to(device)
        self._processor = PictureProcessor.from_pretrained(folder)

    def ask(self, pictures: list[Picture], question: str) -> str:
        """See `Chat`; the likeliest answer, without chance."""
        inputs = self._inputs(pictures, question)
        made = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = made[0, inputs["input_ids"].shape[1] :]
        return str(self._processor.tokenizer.decode(new, skip_special_tokens=True))

    def rate(self, pictures: list[Picture], question: str) -> float:
        """See `Chat`; the digits' mean by the model's probabilities (G-Eval, Liu et al. 2023)."""
        import torch

        tokenizer = self._processor.tokenizer
        digits = [tokenizer.encode(str(digit))[-1] for digit in range(10)]
        with torch.inference_mode():
            logits = self._model(**self._inputs(pictures, question)).logits[0, -1, digits]
        return float(logits.float().softmax(-1).cpu() @ torch.arange(10.0))

    def _inputs(self, pictures: list[Picture], question: str) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "image"} for _ in pictures]
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        processor: Any = self._processor
        prompt = processor.tokenizer.apply_chat_template(
            [message], chat_template=processor.chat_template, tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        images = [Image.fromarray(np.ascontiguousarray(picture)) for picture in pictures]
        inputs = processor(text=[prompt], images=images, return_tensors="pt")
        return dict(inputs.to(self._model.device))


def _usable(answer: str, language: str) -> bool:
    """One line, not too long, in the language asked for."""
    chinese = bool(re.search(r"[一-鿿]", answer))
    legible = "\n" not in answer and "\N{REPLACEMENT CHARACTER}" not in answer
    return legible and 2 < len(answer) <= MOST_LETTERS and chinese == (language == "zh")
