import pytest
import torch
from PIL import Image

from pseudolabel import io
from pseudolabel.cli import main
from pseudolabel.cli._panels import _colors_of, class_colors, draw_panels, show_cam, show_mask


def view(data, *more):
    out = data.root / "picture.png"
    code = main(["view", str(data.images), str(data.truth), "--out", str(out), *more])
    with Image.open(out) as picture:
        return picture.size, code


def test_columns_and_rows(data, capsys):
    small, code = view(data, "--limit", "2")
    assert code == 0
    cams = data.root / "cams"
    cams.mkdir()
    for name, labels in zip(data.names, data.labels, strict=True):
        io.write_cam(cams / f"{name}.npz", torch.rand(6, 5, 6), labels, size=(40, 48))
    large, code = view(data, "--truth", str(data.truth), "--cams", str(cams), "--limit", "4")
    assert code == 0
    assert large[0] - small[0] == 2 * (240 + 12)  # two more columns
    assert large[1] - small[1] >= 2 * 200  # two more rows of 40 x 48 at a width of 240


def test_a_mask_of_another_size_than_its_photo_is_named_and_left_out(data, capsys):
    io.write_mask(data.truth / "photo1.png", torch.zeros(7, 9, dtype=torch.uint8))
    _, code = view(data)
    assert code == 1
    err = capsys.readouterr().err
    assert "photo1" in err
    assert "(7, 9)" in err


def test_nothing_to_show(data, capsys):
    (data.root / "empty").mkdir()
    out = data.root / "picture.png"
    assert main(["view", str(data.images), str(data.root / "empty"), "--out", str(out)]) == 2
    assert "no mask here" in capsys.readouterr().err
    assert not out.exists()


def test_out_must_be_png(data, capsys):
    assert main(["view", str(data.images), str(data.truth), "--out", "picture.jpg"]) == 2
    assert ".png" in capsys.readouterr().err


def test_classes_beyond_those_of_a_mask(data):
    """An archive may hold them; they take the colours anew."""
    cams = data.root / "cams"
    cams.mkdir()
    for name in data.names:
        labels = torch.zeros(400)
        labels[[3, 254, 399]] = 1
        io.write_cam(cams / f"{name}.npz", torch.rand(3, 5, 6), labels, size=(40, 48))
    _, code = view(data, "--cams", str(cams))
    assert code == 0
    colors = _colors_of(torch.tensor([4, 254, 255, 256, 400]))
    assert torch.equal(colors, class_colors()[[4, 254, 255, 3, 147]])


def test_show_mask_colors_classes_and_dims_background():
    image = torch.full((3, 4, 8), 0.5)
    mask = torch.zeros(4, 8, dtype=torch.int64)
    mask[:, 4:] = 2
    shown = show_mask(image, mask, opacity=1.0)
    assert torch.allclose(shown[:, 0, 7], class_colors()[2])
    assert torch.allclose(shown[:, 0, 0], torch.full((3,), 0.4))
    assert torch.equal(shown[:, :, 4], torch.ones(3, 4))  # the border


def test_show_cam_takes_the_color_of_the_strongest_class():
    image = torch.zeros(3, 1, 3)
    cam = torch.tensor([[[1.0, 0.2, 0.0]], [[0.0, 0.8, 0.0]]])
    shown = show_cam(image, cam, torch.tensor([0, 4]))
    assert torch.allclose(shown[:, 0, 0], 0.9 * class_colors()[1])
    assert torch.allclose(shown[:, 0, 1], 0.72 * class_colors()[5])
    assert torch.equal(shown[:, 0, 2], torch.zeros(3))
    assert torch.equal(show_cam(image, cam[:0], torch.tensor([], dtype=torch.int64)), image)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (900, 3)])
def test_panels_of_any_size(size):
    picture = draw_panels(
        [[torch.rand(3, *size)]], ["photo"], row_names=["a name"], legend={1: "cat", 255: "ignore"}
    )
    assert picture.mode == "RGB"
    assert picture.height <= 3 * 240 + 120
