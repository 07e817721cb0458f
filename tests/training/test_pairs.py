import json
import shutil

import pytest
from PIL import Image

from step1x_edit.datagen.config import DataConfig
from step1x_edit.datagen.generate import generate, shard_paths
from step1x_edit.errors import InvalidRequest
from step1x_edit.training import pairs
from step1x_edit.training.data_config import PairData
from step1x_edit.training.pairs import check

from ..pair_sets import SENTENCES, write_metadata, write_pictures

SIZES = [(64, 64), (96, 48), (80, 60)]


def data(*datasets, **settings):
    return PairData.model_validate({"datasets": datasets, "size_level_px": 64, **settings})


def metadata(path, **settings):
    return {"kind": "metadata", "metadata_file": path, **settings}


def folder(path, **settings):
    return {"kind": "folder", "folder": path, **settings}


def shards(path, **settings):
    return {"kind": "shards", "folder": path, **settings}


def refusal(*datasets, **settings):
    """The one line that a bad dataset gives."""
    with pytest.raises(InvalidRequest) as error:
        check(data(*datasets, **settings))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def official(tmp_path):
    return write_metadata(tmp_path / "set", SIZES)


def edited(path, change):
    """The metadata file after a change of its entries."""
    entries = json.loads(path.read_text())
    change(entries, list(entries))
    path.write_text(json.dumps(entries))
    return path


# ---- good data


def test_metadata_gives_every_pair_in_order(official):
    told = []
    checked = check(data(metadata(official)), lambda *now: told.append(now))
    assert checked.num_examples == 3
    assert [dict(e.sentences) for e in checked.examples] == [{"": s} for s in SENTENCES[:3]]
    assert [e.size for e in checked.examples] == [(64, 64), (64, 32), (64, 32)]
    assert told == [(number, 6) for number in range(1, 7)]
    assert checked.examples[0].target.open().size == (64, 64)


def test_paths_may_be_relative_and_without_a_suffix(official, monkeypatch, tmp_path):
    entries = {"0": {"ref_image_path": "set/source/0.png", "caption": "x", "tags": "ignored"}}
    official.write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    (example,) = check(data(metadata(official, image_dir=official.parent / "target"))).examples
    assert example.target.file == official.parent / "target" / "0.png"
    assert example.source.file.samefile(official.parent / "source" / "0.png")


def test_an_example_without_a_source_is_text_to_image(official, caplog):
    edited(official, lambda entries, names: entries[names[1]].pop("ref_image_path"))
    examples = check(data(metadata(official))).examples
    assert [e.source is None for e in examples] == [False, True, False]
    assert "metadata.json: 1 examples have no ref_image_path" in caplog.text
    caplog.clear()
    drawn = check(data(metadata(official, text_to_image=True))).examples
    assert all(e.source is None for e in drawn)
    assert not caplog.text


def test_two_forms_of_folders_hold_the_same_pairs(tmp_path):
    apart, together = tmp_path / "apart", tmp_path / "together"
    together.mkdir()
    for number, (target, source) in enumerate(write_pictures(apart, SIZES)):
        target.with_suffix(".txt").write_text(f" {SENTENCES[number]}\n")
        shutil.copy(target, together / f"{number}.target.png")
        shutil.copy(source, together / f"{number}.source.png")
        (together / f"{number}.txt").write_text(SENTENCES[number])
    first, second = (check(data(folder(path))) for path in (apart, together))
    assert [e.sentences for e in first.examples] == [{"": s} for s in SENTENCES[:3]]
    assert [*first.hashes().values()] == [*second.hashes().values()]


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_shards_give_every_record_with_its_mask(tmp_path, form):
    out = tmp_path / "shards"
    generate(
        DataConfig(out=out, num=6, shard_size=4, sizes={"64x64": 1}, format=form, num_workers=1)
    )
    checked = check(data(shards(out)))
    assert checked.num_examples == 6
    assert all(set(e.sentences) == {"en", "zh"} and e.mask for e in checked.examples)
    last = checked.examples[-1]
    assert (last.source.open().size, last.mask.open().size) == ((64, 64), (64, 64))


def test_records_without_a_caption_are_counted_where_words_are_all(tmp_path):
    shares = {"tone": 0.5, "removal": 0.5}
    generate(
        DataConfig(
            out=tmp_path, num=12, shard_size=12, sizes={"64x64": 1}, shares=shares, num_workers=1
        )
    )
    checked = check(data(shards(tmp_path, text_to_image=True)))
    assert 0 < checked.num_examples < 12
    assert checked.left_out == {str(tmp_path): 12 - checked.num_examples}
    assert all(e.source is None and e.mask is None for e in checked.examples)


def test_the_hash_follows_every_picture_sentence_and_setting(official):
    def hashes(**engine):
        checked = check(data(metadata(official), {"kind": "engine", "share": 0.5, **engine}))
        return checked.hashes()

    first = hashes()
    assert list(first) == [str(official), "engine"]
    assert hashes(num_workers=0) == first
    assert hashes(seed=3)["engine"] != first["engine"]
    edited(official, lambda entries, names: entries[names[0]].update(caption="other"))
    second = hashes()
    assert second[str(official)] != first[str(official)]
    target = official.parent / "target" / "0.png"
    Image.new("RGB", (64, 64)).save(target)
    assert hashes()[str(official)] not in (first[str(official)], second[str(official)])


def test_many_files_are_looked_at_in_processes_of_their_own(official, monkeypatch):
    alone = check(data(metadata(official)))
    monkeypatch.setattr(pairs, "FEW_FILES", 0)
    told = []
    assert check(data(metadata(official)), lambda *now: told.append(now)) == alone
    assert told[-1] == (6, 6)
    (official.parent / "source" / "2.png").write_bytes(b"nothing")
    assert "2.png is no picture" in refusal(metadata(official))


# ---- bad data: one line each, before the first step


def test_a_missing_picture(official):
    (official.parent / "source" / "1.png").unlink()
    message = refusal(metadata(official))
    assert "source/1.png: no such file" in message
    (official.parent / "target" / "2.png").unlink()
    assert refusal(metadata(official)).endswith("(1 more problem)")


def test_a_picture_that_does_not_decode(official):
    path = official.parent / "target" / "2.png"
    path.write_bytes(path.read_bytes()[:900])
    assert f"{path} is broken or cut off" in refusal(metadata(official))


def test_a_broken_source_of_many_is_one_problem(official):
    def share(entries, names):
        for name in names:
            entries[name]["ref_image_path"] = entries[names[0]]["ref_image_path"]

    edited(official, share)
    (official.parent / "source" / "0.png").write_bytes(b"")
    message = refusal(metadata(official))
    assert "source/0.png is empty (0 bytes)" in message
    assert "more problem" not in message


def test_broken_json_with_line_and_column(official):
    official.write_text('{\n  "a.png": {"caption": "x",}\n}')
    assert f"{official}: line 2, column 28: " in refusal(metadata(official))


def test_a_target_that_is_listed_twice(official):
    official.write_text('{"a.png": {"caption": "x"}, "a.png": {"caption": "y"}}')
    assert f"{official}: 'a.png' stands there twice" in refusal(metadata(official))


@pytest.mark.parametrize("text", ["[]", "3", "null", '"words"'])
def test_json_that_is_no_object(official, text):
    official.write_text(text)
    assert "must be an object" in refusal(metadata(official))


def test_a_metadata_file_that_is_not_there(tmp_path):
    assert "absent.json: No such file" in refusal(metadata(tmp_path / "absent.json"))


@pytest.mark.parametrize(
    ("caption", "said"),
    [(7, "is the number 7"), (["a"], "is a list"), (None, "is missing"), (" ", "is an empty text")],
)
def test_a_caption_that_is_no_sentence(official, caption, said):
    edited(official, lambda entries, names: entries[names[1]].update(caption=caption))
    message = refusal(metadata(official))
    assert "1.png" in message
    assert f"the caption {said}" in message


@pytest.mark.parametrize("entry", [3, None, ["a", "b"], {"caption": "x", "ref_image_path": 3}])
def test_an_entry_of_the_wrong_form(official, entry):
    edited(official, lambda entries, names: entries.update({names[0]: entry}))
    assert f"{official}: " in refusal(metadata(official))


def test_source_and_target_of_different_sizes(official):
    Image.new("RGB", (64, 60)).save(official.parent / "source" / "0.png")
    message = refusal(metadata(official))
    assert "target/0.png is 64 × 64 px" in message
    assert "source/0.png 64 × 60 px" in message


def test_a_picture_that_is_too_elongated(official):
    for part in ("source", "target"):
        Image.new("RGB", (900, 10)).save(official.parent / part / "0.png")
    assert "900 × 10 px is too elongated" in refusal(metadata(official))


def test_nothing_in_it(official, tmp_path):
    official.write_text("{}")
    assert f"{official} holds 0 examples" in refusal(metadata(official))
    assert "holds no shards" in refusal(shards(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds 0 pairs" in refusal(folder(empty))
    assert "is no folder" in refusal(folder(tmp_path / "absent"))


def test_a_path_outside_the_root(official, tmp_path):
    root = official.parent
    assert check(data(metadata(official), root=root)).num_examples == 3
    outside = tmp_path / "outside.png"
    shutil.copy(root / "target" / "0.png", outside)
    for path in (
        str(outside),
        "../outside.png",
        str(root / "target" / ".." / ".." / "outside.png"),
    ):
        edited(
            official,
            lambda entries, names, path=path: entries[names[0]].update(ref_image_path=path),
        )
        message = refusal(metadata(official), root=root)
        assert "outside.png is outside the root" in message
    (root / "link.png").symlink_to(outside)
    edited(official, lambda entries, names: entries[names[0]].update(ref_image_path="link.png"))
    assert "link.png is outside the root" in refusal(metadata(official), root=root)
    assert "outside the root" in refusal(metadata(official), root=root / "target")
    assert "outside the root" in refusal(folder(tmp_path), root=root)
    assert "outside the root" in refusal(shards(tmp_path), root=root)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("target/1.txt", "'1' has no instruction: write it to"),
        ("target/1.png", "'1' has no target picture"),
        ("source/1.png", "'1' has no source picture"),
    ],
)
def test_a_folder_that_lacks_a_part(tmp_path, gone, said):
    for target, _ in write_pictures(tmp_path, SIZES):
        target.with_suffix(".txt").write_text("make it darker")
    (tmp_path / gone).unlink()
    assert said in refusal(folder(tmp_path))


def test_two_pictures_of_one_name(tmp_path):
    pairs = write_pictures(tmp_path, SIZES)
    for target, _ in pairs:
        target.with_suffix(".txt").write_text("make it darker")
    source = pairs[2][1]
    Image.open(source).save(source.with_suffix(".bmp"))
    assert "two sources of '2'" in refusal(folder(tmp_path))


def test_an_instruction_file_without_words(tmp_path):
    for target, _ in write_pictures(tmp_path, SIZES[:1]):
        target.with_suffix(".txt").write_bytes(b"\xff\xfe")
    assert "0.txt holds no sentence in UTF-8" in refusal(folder(tmp_path))


def test_a_damaged_shard(tmp_path):
    generate(DataConfig(out=tmp_path, num=2, shard_size=2, sizes={"64x64": 1}, num_workers=1))
    (path,) = shard_paths(tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert f"{path} is damaged" in refusal(shards(tmp_path))
