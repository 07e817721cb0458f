"""The instruction encoder against the released tokenisation and transformers' own forward."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from step1x_edit.errors import CheckpointError, InvalidRequest
from step1x_edit.model.batched_vision import batch_vision
from step1x_edit.model.instruction import (
    RELEASE_V1,
    InstructionConfig,
    InstructionEncoder,
    InstructionTokenizer,
    load_text_encoder,
)
from step1x_edit.model.processor import PictureProcessor, build_processor
from step1x_edit.model.quoting import split_quoted
from step1x_edit.model.small_mllm import SMALL_CHAT_TEMPLATE, small_mllm_config

from .qwen import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    byte_processor,
    byte_tokenizer,
    qwen_tokenizer_from_tiktoken,
    tiny_config,
    tiny_encoder,
    tiny_mllm,
)

REFERENCE = Path(__file__).parents[1] / "reference" / "instruction_ids.json"
INSTRUCTIONS = ["make it blue", "把天空变成红色", 'write "HI" on it', ""]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pictures() -> list[Image.Image]:
    return [picture(64, 64, 0), picture(120, 60, 1), picture(40, 90, 2), picture(200, 200, 3)]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def encoder() -> InstructionEncoder:
    return tiny_encoder()


@pytest.fixture(scope="module")
def true_tokenizer():
    return qwen_tokenizer_from_tiktoken()


# ---------------------------------------------------------------- the true Qwen2.5 tokenizer


def release_tokenizer(tokenizer, **changes) -> InstructionTokenizer:
    processor = build_processor(tokenizer, CHAT_TEMPLATE, min_pixels=1, max_pixels=10**9)
    values = {"prefix": "x" * 200, "num_dropped_tokens": 1} | changes
    return InstructionTokenizer(processor, RELEASE_V1.model_copy(update=values))


def test_true_tokenizer_has_qwens_ids(true_tokenizer):
    assert true_tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(151643, 151657))
    text = "Hello world, 你好世界!\n<|im_end|>"
    assert true_tokenizer.decode(true_tokenizer.encode(text)) == text


def test_released_token_ids(true_tokenizer):
    rows = json.loads(REFERENCE.read_text())["rows"]
    assert len(rows) == 14
    tokenize = release_tokenizer(true_tokenizer)
    for row in rows:
        ids = tokenize([picture(64, 64)], [row["instruction"]]).input_ids[0].tolist()
        assert ids[ids.index(151653) :] == row["ids"], row["instruction"]


def test_release_pixel_limits_give_256_to_324_picture_tokens(true_tokenizer):
    tokens = release_tokenizer(true_tokenizer)([picture(64, 64), picture(1000, 1000)], ["a", "a"])
    assert tokens.mm_token_type_ids.sum(1).tolist() == [256, 324]


def test_text_before_the_picture_stays_plain(true_tokenizer):
    prefix = "x" * 160 + ' say "cat" now '
    tokenize = release_tokenizer(true_tokenizer, prefix=prefix)
    ids = tokenize([picture(64, 64)], ['draw "cat"']).input_ids[0].tolist()
    end = ids.index(151653)
    cat = true_tokenizer.encode("cat")
    assert len(cat) == 1
    assert cat[0] in ids[:end]
    assert cat[0] not in ids[end:]


def test_quote_left_open_by_the_prefix_is_refused(true_tokenizer):
    tokenize = release_tokenizer(true_tokenizer, prefix="x" * 160 + ' it"s ')
    with pytest.raises(CheckpointError, match="never closed"):
        tokenize([picture(64, 64)], ["a"])


# ---------------------------------------------------------------- quoted text


def test_split_quoted_pieces():
    pieces = split_quoted("""ab "c d" e'f""", offset=-1, apostrophe_quotes=False)
    assert [piece.text for piece in pieces] == ['ab "', "“c”", "“ ”", "“d”", "\" e'f"]
    assert [piece.quoted for piece in pieces] == [False, True, True, True, False]


def test_apostrophe_opens_a_quotation_only_when_switched_on():
    assert len(split_quoted("girl's hat", offset=-1, apostrophe_quotes=False)) == 1
    assert len(split_quoted("girl's hat", offset=-1, apostrophe_quotes=True)) == 6


def test_quotes_up_to_the_offset_do_not_count():
    text = 'ab"cd"ef'
    assert len(split_quoted(text, offset=5, apostrophe_quotes=False)) == 1
    assert len(split_quoted(text, offset=4, apostrophe_quotes=False)) == 3


@pytest.mark.parametrize("layout", ["picture_first", "instruction_first"])
def test_quoted_mask_marks_the_quoted_letters(layout):
    tokenize = InstructionTokenizer(byte_processor(), tiny_config(layout=layout))
    tokens = tokenize([picture(64, 64)], ['write "HI" on it'])
    letters = tokenize.processor.tokenizer.decode(tokens.input_ids[0][tokens.quoted[0]])
    assert letters == "HI"


def test_quotes_stay_whole_when_splitting_is_off():
    tokenize = InstructionTokenizer(byte_processor(), tiny_config(split_quotes=False))
    tokens = tokenize([picture(64, 64)], ['write "HI" on it'])
    assert not tokens.quoted.any()


# ---------------------------------------------------------------- tokens


def test_layouts_order_picture_and_instruction():
    for layout, text in (
        ("picture_first", "<|im_start|>P<|vision_start|><|image_pad|><|vision_end|>go<|im_end|>"),
        (
            "instruction_first",
            "<|im_start|>Pgo<|vision_start|><|image_pad|><|vision_end|><|im_end|>",
        ),
    ):
        tokenize = InstructionTokenizer(byte_processor(), tiny_config(layout=layout, prefix="P"))
        assert tokenize.render("go") == text


def test_vision_id_and_generation_prompt_are_data():
    processor = build_processor(byte_tokenizer(), CHAT_TEMPLATE, min_pixels=1, max_pixels=10**6)
    text = InstructionTokenizer(processor, tiny_config()).render("go")
    assert "Picture 1: <|vision_start|>" in text
    assert text.endswith("<|im_start|>assistant\n")
    bare = tiny_config(add_vision_id=False, add_generation_prompt=False)
    text = InstructionTokenizer(processor, bare).render("go")
    assert "Picture" not in text
    assert text.endswith("go<|im_end|>\n")


def test_tokens_equal_those_of_the_stock_processor(encoder):
    tokenizer = encoder.tokenizer
    tokens = tokenizer(pictures()[:3], [*INSTRUCTIONS[:2], ""])
    processor = tokenizer.processor
    processor.tokenizer.padding_side = "right"
    limits = {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}
    stock = processor(
        text=[tokenizer.render(text) for text in [*INSTRUCTIONS[:2], ""]],
        images=pictures()[:3],
        images_kwargs={"size": limits},
        padding=True,
        return_tensors="pt",
    )
    real = tokens.attention_mask
    assert torch.equal(real, stock["attention_mask"].bool())
    assert torch.equal(tokens.input_ids[real], stock["input_ids"][real])
    assert torch.equal(tokens.mm_token_type_ids, stock["mm_token_type_ids"])
    assert torch.equal(tokens.pixel_values, stock["pixel_values"])
    assert torch.equal(tokens.image_grid_thw, stock["image_grid_thw"])


@pytest.mark.parametrize("layout", ["picture_first", "instruction_first"])
def test_rotary_positions_equal_transformers(layout):
    encoder = tiny_encoder(layout=layout)
    tokens = encoder.tokenize(pictures(), INSTRUCTIONS)
    positions, _ = encoder.text_encoder.model.get_rope_index(
        tokens.input_ids,
        mm_token_type_ids=tokens.mm_token_type_ids,
        image_grid_thw=tokens.image_grid_thw,
        attention_mask=tokens.attention_mask,
    )
    real = tokens.attention_mask
    assert torch.equal(tokens.position_ids[:, real], positions[:, real])


def test_missing_picture_is_black(encoder):
    side = encoder.config.blank_size_px
    tokens = encoder.tokenize([None, Image.new("RGB", (side, side))], ["a cat", "a cat"])
    first, second = tokens.pixel_values.chunk(2)
    assert torch.equal(first, second)
    assert first.unique().numel() == 3  # black, normalised per channel


def test_tokenizer_works_in_another_process(encoder):
    copy = pickle.loads(pickle.dumps(encoder.tokenizer))
    ours, theirs = (run(pictures(), INSTRUCTIONS) for run in (encoder.tokenizer, copy))
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.pixel_values, theirs.pixel_values)


def test_too_long_is_refused_with_the_numbers(encoder):
    limit = encoder.config.max_length
    fits = "a" * (limit - 7)  # picture 4, vision start and end, chat end
    assert int(encoder.tokenize([picture(56, 56)], [fits]).lengths) == limit + 1
    with pytest.raises(InvalidRequest, match=rf"takes {limit + 2} tokens .* of {limit}: .* by 2 "):
        encoder.tokenize([picture(56, 56)], [fits + "aa"])


def test_reserved_tokens_are_refused(encoder):
    with pytest.raises(InvalidRequest, match=r"<\|image_pad\|>"):
        encoder.tokenize([picture(64, 64)], ["a <|image_pad|> b"])


def test_elongated_picture_is_refused(encoder):
    with pytest.raises(InvalidRequest, match="402 x 2 px"):
        encoder.tokenize([picture(402, 2)], ["a"])


def test_cut_beyond_the_chat_is_refused():
    with pytest.raises(CheckpointError, match="num_dropped_tokens 217"):
        tiny_encoder(num_dropped_tokens=217).tokenize([picture(64, 64)], ["a"])


def test_uneven_batch_is_refused(encoder):
    with pytest.raises(ValueError, match="1 pictures for 2"):
        encoder.tokenize([picture(64, 64)], ["a", "b"])


# ---------------------------------------------------------------- features


def stock_features(encoder: InstructionEncoder, image: Image.Image, text: str) -> torch.Tensor:
    """Last hidden state of transformers' own full forward, without our positions or padding."""
    tokens = encoder.tokenize([image], [text])
    output = encoder.text_encoder(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask.long(),
        pixel_values=tokens.pixel_values,
        image_grid_thw=tokens.image_grid_thw,
        mm_token_type_ids=tokens.mm_token_type_ids,
        output_hidden_states=True,
    )
    return output.hidden_states[-1][0]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_features_equal_the_full_forward(attention):
    encoder = tiny_encoder(num_dropped_tokens=3)
    encoder.text_encoder.set_attn_implementation(attention)
    result = encoder.encode(encoder.tokenize(pictures(), INSTRUCTIONS))
    assert result.features.shape == (4, 96, 32)
    for row, (image, text) in enumerate(zip(pictures(), INSTRUCTIONS, strict=True)):
        expected = stock_features(encoder, image, text)[3:]
        assert int(result.mask[row].sum()) == len(expected)
        assert result.mask[row, : len(expected)].all()
        assert relative_error(result.features[row, : len(expected)], expected) <= 1e-5
        assert not result.features[row, len(expected) :].any()


@torch.no_grad()
def test_features_of_a_row_do_not_depend_on_the_batch(encoder):
    together = encoder.encode(encoder.tokenize(pictures(), INSTRUCTIONS))
    for row, (image, text) in enumerate(zip(pictures(), INSTRUCTIONS, strict=True)):
        alone = encoder.encode(encoder.tokenize([image], [text]))
        assert torch.equal(alone.mask[0], together.mask[row])
        assert relative_error(together.features[row], alone.features[0]) <= 1e-5


@torch.no_grad()
def test_features_see_picture_and_instruction(encoder):
    def run(image: Image.Image, text: str) -> torch.Tensor:
        return encoder.encode(encoder.tokenize([image], [text])).features

    base = run(picture(64, 64), "make it red")
    assert relative_error(run(picture(64, 64, seed=5), "make it red"), base) > 1e-3
    assert relative_error(run(picture(64, 64), "make it sad"), base) > 1e-2


@torch.no_grad()
def test_without_padding_features_end_with_the_longest_row():
    encoder = tiny_encoder(pad_to_max_length=False, num_dropped_tokens=2)
    tokens = encoder.tokenize(pictures(), INSTRUCTIONS)
    result = encoder.encode(tokens)
    assert result.features.shape[1] == int(tokens.lengths.max()) - 2
    assert torch.equal(result.mask.sum(1), tokens.lengths - 2)


def test_gradients_reach_both_towers():
    encoder = tiny_encoder()
    model = encoder.text_encoder.train()
    tokens = encoder.tokenize(pictures(), INSTRUCTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        result = encoder.encode(tokens)
    result.features.float().square().sum().backward()
    assert result.features.isfinite().all()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Softmax over keys does not see a constant added to every key.
    assert {name for name in without if not name.endswith("k_proj.bias")} == set()


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[(64, 64)] * 3, [(64, 64), (120, 60), (40, 90)]])
def test_batched_vision_equals_the_stock_tower(sizes):
    encoder = tiny_encoder()
    tokens = encoder.tokenize([picture(*size) for size in sizes], INSTRUCTIONS[:3])
    names = list(encoder.text_encoder.state_dict())
    before = encoder.encode(tokens).features
    batch_vision(encoder.text_encoder)
    assert list(encoder.text_encoder.state_dict()) == names
    assert relative_error(encoder.encode(tokens).features, before) <= 1e-5


def test_moved_tokens_keep_every_field(encoder):
    tokens = encoder.tokenize([picture(64, 64)], ["a"])
    assert tokens.to("meta").pixel_values.device.type == "meta"
    assert tokens.to("meta").lengths.device.type == "meta"


# ---------------------------------------------------------------- configuration and folders


def test_config_round_trip(tmp_path):
    config = tiny_config(prefix='前缀 "x"', layout="instruction_first")
    assert InstructionConfig.load(config.save(tmp_path / "new")) == config
    assert InstructionConfig.load(tmp_path / "new") == config
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["instruction.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour: Extra inputs"),
        ({"max_length": 0}, "max_length: .*greater than"),
        ({"min_pixels": 10**9}, "min_pixels 1000000000 is above"),
        ({"layout": "upside_down"}, "layout"),
    ],
)
def test_bad_config_is_refused_in_one_line(tmp_path, change, message):
    file = tiny_config().save(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as error:
        InstructionConfig.load(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_or_broken_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        InstructionConfig.load(tmp_path)
    (tmp_path / "instruction.json").write_text("{")
    with pytest.raises(CheckpointError, match="Invalid JSON"):
        InstructionConfig.load(tmp_path)


def test_released_model_without_its_prefix_refuses():
    with pytest.raises(CheckpointError, match=r"Qwen25VL_7b_PREFIX.*--official-source") as error:
        InstructionTokenizer(byte_processor(), RELEASE_V1)
    assert "\n" not in str(error.value)
    filled = RELEASE_V1.with_prefix("p" * 1058)
    assert InstructionTokenizer(byte_processor(), filled).config.prefix == "p" * 1058
    assert RELEASE_V1.prefix is None


def test_model_folder_round_trip(tmp_path, encoder):
    encoder.text_encoder.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.processor.save_pretrained(tmp_path / "processor")
    encoder.config.save(tmp_path)
    files = {file.name for file in (tmp_path / "processor").iterdir()}
    assert {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} <= files
    assert "chat_template.jinja" in files
    loaded = InstructionEncoder.from_pretrained(tmp_path)
    assert loaded.config == encoder.config
    tokens = encoder.tokenize(pictures(), INSTRUCTIONS)
    again = loaded.tokenize(pictures(), INSTRUCTIONS)
    assert torch.equal(tokens.input_ids, again.input_ids)
    with torch.no_grad():
        assert torch.equal(loaded.encode(again).features, encoder.encode(tokens).features)


def test_published_folder_loads_with_the_config_of_its_release(tmp_path, encoder):
    encoder.text_encoder.save_pretrained(tmp_path / "text_encoder")
    processor = encoder.tokenizer.processor
    processor.save_pretrained(tmp_path / "processor")
    jinja = tmp_path / "processor" / "chat_template.jinja"
    template = jinja.read_text()
    jinja.unlink()  # older exports keep the template in JSON
    older = tmp_path / "processor" / "chat_template.json"
    older.write_text(json.dumps({"chat_template": template}))
    loaded = InstructionEncoder.from_pretrained(
        tmp_path, config=RELEASE_V1.with_prefix("p" * 300), dtype=torch.bfloat16
    )
    assert loaded.tokenizer.processor.chat_template == SMALL_CHAT_TEMPLATE
    assert loaded.text_encoder.dtype == torch.bfloat16


def test_processor_needs_no_torchvision():
    assert find_spec("torchvision") is None, "this environment cannot show it"
    assert PictureProcessor.get_attributes() == ["image_processor", "tokenizer"]


def test_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no processor folder") as error:
        PictureProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_text_encoder_is_read_strictly(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_text_encoder(tmp_path)
    model = tiny_mllm(byte_processor())
    state = model.state_dict()
    weight = state.pop("model.visual.merger.ln_q.weight")
    state["model.visual.merger.extra"] = weight.clone()
    state["model.language_model.norm.weight"] = torch.ones(5)
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"1 missing .*1 unexpected .*1 mismatched"):
        load_text_encoder(tmp_path)


def test_small_config_refuses_widths_that_do_not_divide():
    with pytest.raises(ValueError, match=r"hidden_size 100 .* 4 heads"):
        small_mllm_config(byte_tokenizer(), hidden_size=100)


def test_tokenizer_of_another_family_is_refused():
    tokenizer = byte_tokenizer(special_tokens=SPECIAL_TOKENS[:3])
    strange = build_processor(tokenizer, SMALL_CHAT_TEMPLATE, min_pixels=1, max_pixels=10**6)
    with pytest.raises(CheckpointError, match=r"not one of Qwen2\.5-VL's"):
        InstructionTokenizer(strange, tiny_config())


def test_tokens_are_immutable(encoder):
    tokens = encoder.tokenize([picture(64, 64)], ["a"])
    changed = replace(tokens, lengths=tokens.lengths + 1)
    assert int(changed.lengths) == int(tokens.lengths) + 1
