import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.filters import Judge, Limits, judged_well
from step1x_edit.datagen.photographs.endpoint import EndpointChat
from step1x_edit.datagen.photographs.mllm import Chat, MllmCaptioner, MllmJudge
from step1x_edit.datagen.photographs.roles import Captioner, Unsuitable
from step1x_edit.datagen.pipeline import make_triplet
from step1x_edit.errors import Step1XEditError

from .server import serving

DRAFT = {"en": "remove the cat", "zh": "去掉猫"}


@pytest.fixture(scope="module")
def triplet():
    return make_triplet(1, "removal", Atlas(), 64, 48)


def written(question):
    return "把猫去掉吧" if "Chinese" in question else ' "Take the cat away."\n'


def test_the_server_sees_both_pictures_and_the_key(triplet):
    with serving(written) as (url, requests):
        chat = EndpointChat(url, "a/model", api_key="secret")
        captioner = MllmCaptioner(chat)
        assert isinstance(chat, Chat)
        assert isinstance(captioner, Captioner)
        made = captioner.write(triplet.source, triplet.target, DRAFT)
    assert made == {"en": "Take the cat away.", "zh": "把猫去掉吧"}
    assert captioner.name == "a/model"
    path, headers, body = requests[0]
    assert path == "/v1/chat/completions"
    assert headers["authorization" if "authorization" in headers else "Authorization"] == (
        "Bearer secret"
    )
    assert body["model"] == "a/model"
    first, second, question = body["messages"][0]["content"]
    assert DRAFT["en"] in question["text"]
    for part, picture in ((first, triplet.source), (second, triplet.target)):
        kind, data = part["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64"
        sent = Image.open(io.BytesIO(base64.b64decode(data)))
        assert np.array_equal(np.asarray(sent), picture)


@pytest.mark.parametrize(
    "answer", ["", "去掉猫", "a\nb c", "x" * 300, "take\N{REPLACEMENT CHARACTER}"]
)
def test_an_unusable_caption_is_refused(triplet, answer):
    with serving(lambda _: answer) as (url, _), pytest.raises(Unsuitable, match="caption"):
        MllmCaptioner(EndpointChat(url, "m")).write(triplet.source, triplet.target, DRAFT)


@pytest.mark.parametrize(
    ("answer", "score"), [("9", 10.0), ("Score: 0", 0.0), ("2 or 3", math.nan), ("11", math.nan)]
)
def test_a_judge_gives_a_score_or_none(triplet, answer, score):
    with serving(lambda _: answer) as (url, requests):
        judge = MllmJudge(EndpointChat(url, "m"))
        assert isinstance(judge, Judge)
        assert judge.score(triplet) == pytest.approx(score, nan_ok=True)
        kept = judged_well(judge, Limits())(triplet) is None
        assert kept == (score == 10)
    assert triplet.instructions["en"] in requests[0][2]["messages"][0]["content"][-1]["text"]


def test_a_server_that_fails_is_named():
    with serving(lambda _: None) as (url, _), pytest.raises(Step1XEditError) as caught:
        EndpointChat(url, "m").ask([], "anyone?")
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
