import re

import pytest

from step1x_edit.datagen.config import DataConfig
from step1x_edit.datagen.generate import generate
from step1x_edit.datagen.inspect import write_page
from step1x_edit.datagen.operators import OPERATORS
from step1x_edit.errors import InvalidRequest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "a & b"
    shares = dict.fromkeys(OPERATORS, 1.0)
    generate(
        DataConfig(out=out, num=80, shard_size=40, sizes={"48x32": 1}, shares=shares, num_workers=1)
    )
    return out


def test_the_page_shows_every_category_with_its_pictures(folder, tmp_path):
    told = []
    page = write_page(folder, tmp_path / "page.html", 3, lambda *done: told.append(done))
    text = page.read_text(encoding="utf-8")
    assert told == [(1, 2), (2, 2)]
    assert "<h1>a &amp; b</h1><p>80 records" in text
    for category in OPERATORS:
        section = text.split(f"<h2>{category}</h2>")[1].split("<h2>")[0]
        figures = section.count("<figure>")
        assert 1 <= figures <= 3
        assert section.count("data:image/webp;base64,") == 3 * figures
    assert not re.search(r'src="(?!data:)', text)


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match="holds no shards"):
        write_page(tmp_path, tmp_path / "page.html")


def test_a_damaged_shard_leaves_the_old_page(folder, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    (tmp_path / "shard-000000.tar").write_bytes(b"not a tar")
    with pytest.raises(InvalidRequest, match="damaged"):
        write_page(tmp_path, page)
    assert page.read_text() == "old"
