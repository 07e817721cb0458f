"""A multimodal language model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp …)."""

import base64
import io
import re

from huggingface_hub import InferenceClient
from PIL import Image

from step1x_edit.datagen.backgrounds import Picture
from step1x_edit.errors import Step1XEditError

MAX_TOKENS = 200


class EndpointChat:
    """Asks a server's chat completions: an `mllm.Chat`.

    Args:
        url: Of the API, as ``http://host:8000/v1``.
        model: Its name on that server.
        api_key: Sent as the bearer token; None for a server that asks for none.
        timeout_s: For one answer.
    """

    def __init__(
        self, url: str, model: str, api_key: str | None = None, timeout_s: float = 120.0
    ) -> None:
        self.name = model
        self._url = url
        # Without a key of ours the client would send the user's own one for the hub.
        self._client = InferenceClient(base_url=url, api_key=api_key or "none", timeout=timeout_s)

    def ask(self, pictures: list[Picture], question: str) -> str:
        """See `mllm.Chat`.

        Raises:
            Step1XEditError: The server refuses, or does not answer in time.
        """
        content = [{"type": "image_url", "image_url": {"url": _data_url(p)}} for p in pictures]
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        try:
            reply = self._client.chat_completion(
                [message], model=self.name, max_tokens=MAX_TOKENS, temperature=0.0
            )
            answer = reply.choices[0].message.content
        except Exception as error:  # of the client, of its HTTP library, of the reply's form
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Step1XEditError(f"{self._url} gave no answer ({reason})") from error
        return answer or ""

    def rate(self, pictures: list[Picture], question: str) -> float:
        """See `mllm.Chat`: the only digit of the answer."""
        numbers = re.findall(r"\d+", self.ask(pictures, question))
        return float(numbers[0]) if len(numbers) == 1 and len(numbers[0]) == 1 else float("nan")


def _data_url(picture: Picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
