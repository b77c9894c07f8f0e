"""The page of a data set: counts, images of each class, what was found; nothing escapes."""

import re

from PIL import Image

from support.commands import rsb


def test_a_page_has_the_counts_images_of_each_class_and_what_was_found(make_folder, tmp_path):
    hostile = "<b>cat"
    root = make_folder(train={hostile: 9, "dog": 3}, val={hostile: 2, "dog": 1})
    (root / "val/dog/same.jpg").write_bytes((root / "train/dog/0.jpg").read_bytes())
    (root / "train/dog/bad.jpg").write_bytes(b"x")
    Image.new("L", (8, 8)).save(root / "train/dog/grey.png")
    done = rsb("check-data", "--data", root, "--workers", 1, "--page", tmp_path / "page")
    assert done.exit_code == 1, done.output  # a bad image
    text = (tmp_path / "page/index.html").read_text()
    assert "<b>cat" not in text and "&lt;b&gt;cat" in text
    assert len(re.findall(r'<img [^>]*src="data:image/jpeg', text)) == 6 + 4
    assert re.search(r"cat</td><td class=\"n\">9</td><td class=\"n\">2</td>", text)
    for name in ("train/dog/bad.jpg", "train/dog/grey.png", 'title="train/dog/0.jpg"'):
        assert name in text, name
    assert "<li>val/dog/same.jpg = train/dog/0.jpg</li>" in text
    assert str(root) not in text  # whoever gets the page has the images elsewhere
    assert str(tmp_path / "page/index.html") in done.output.replace("\n", "")


def test_a_page_that_cannot_be_written_is_refused_in_one_line(make_folder, tmp_path):
    root = make_folder(train={"a": 2, "b": 2}, val={"a": 1, "b": 1})
    (tmp_path / "file").touch()
    done = rsb("check-data", "--data", root, "--workers", 1, "--page", tmp_path / "file")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
