"""Palette PNGs and their colours."""

import hashlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, PngImagePlugin

from pseudolabel.io import colorize_mask, read_mask, voc_palette, write_mask


def test_voc_palette_by_the_definition():
    """Bit 3k + channel of an index is bit 7 - k of that channel."""
    for index in (0, 1, 20, 37, 128, 255):
        colour = [0, 0, 0]
        for bit in range(8):
            colour[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        assert voc_palette()[index].tolist() == colour
    assert voc_palette()[15].tolist() == [192, 128, 128]  # person
    assert voc_palette()[20].tolist() == [0, 64, 128]  # tvmonitor
    assert len(voc_palette().unique(dim=0)) == 256
    assert voc_palette().dtype == torch.uint8


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_round_trip(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("masks") / "größe 図.png"
    write_mask(path, torch.from_numpy(values))
    mask = read_mask(path)
    assert mask.dtype == torch.int64
    assert torch.equal(mask, torch.from_numpy(values).long())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dtypes_and_leading_axis(tmp_path, dtype, device):
    mask = torch.tensor([[[0, 1, 20], [3, 100, 127]]], dtype=dtype, device=device)
    write_mask(tmp_path / "a.png", mask)
    assert torch.equal(read_mask(tmp_path / "a.png"), mask[0].long().cpu())


def test_numpy_and_strided_masks(tmp_path):
    values = np.arange(12).reshape(3, 4)
    write_mask(tmp_path / "a.png", values)
    write_mask(tmp_path / "b.png", torch.from_numpy(values).T)
    assert read_mask(tmp_path / "a.png").tolist() == values.tolist()
    assert read_mask(tmp_path / "b.png").tolist() == values.T.tolist()


def test_other_programs_see_indices_and_colours(tmp_path):
    mask = torch.tensor([[0, 1, 15, 255]])
    write_mask(tmp_path / "a.png", mask)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        assert np.array(picture).tolist() == mask.tolist()
        colours = np.array(picture.convert("RGB"))
    assert colours.tolist() == [[[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]]


def test_own_palette_keeps_voc_colours_behind_it(tmp_path):
    palette = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    write_mask(tmp_path / "a.png", torch.tensor([[0, 1, 2, 255]]), palette=palette)
    with Image.open(tmp_path / "a.png") as picture:
        colours = np.array(picture.convert("RGB"))
    assert colours.tolist() == [[[1, 2, 3], [4, 5, 6], [0, 128, 0], [224, 224, 192]]]


def test_same_mask_same_bytes(tmp_path):
    mask = torch.arange(256).reshape(16, 16)
    write_mask(tmp_path / "a.png", mask)
    write_mask(tmp_path / "b.png", mask)
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("a.png", "b.png")}
    assert len(digests) == 1


def test_gray_png_is_read_as_indices(tmp_path):
    Image.fromarray(np.uint8([[0, 7, 255]])).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").tolist() == [[0, 7, 255]]


def png(depth, colour_type, row, extra=b""):
    """A PNG of one row, built by hand: PIL writes no grayscale of 2 or 4 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(row), 1, depth, colour_type, 0, 0, 0)
    bits = "".join(f"{value:0{depth}b}" for value in row)
    packed = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(b"\0" + packed))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_gray_of_few_bits_is_not_stretched(tmp_path, depth):
    row = list(range(min(2**depth, 16)))
    (tmp_path / "a.png").write_bytes(png(depth, 0, row))
    assert read_mask(tmp_path / "a.png").tolist() == [row]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_depth_of_a_png_with_a_chunk_before_its_header(tmp_path, depth):
    """PIL reads it, though it should not be."""
    row = list(range(min(2**depth, 16)))
    data, text = png(depth, 0, row), b"\0\0\0\x03tEXta\0b" + struct.pack(">I", zlib.crc32(b"tEXta\0b"))
    (tmp_path / "a.png").write_bytes(data[:8] + text + data[8:])
    assert read_mask(tmp_path / "a.png").tolist() == [row]


@pytest.mark.skipif(os.name != "posix", reason="an open file cannot be deleted")
def test_mask_is_opened_once(tmp_path, monkeypatch):
    """By the name it may be another file a moment later."""
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 0, [0, 1, 2, 3]))
    load = PngImagePlugin.PngImageFile.load

    def replace_and_load(picture):
        path.unlink()
        path.write_bytes(png(8, 0, [0, 1, 2, 3]))
        return load(picture)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", replace_and_load)
    assert read_mask(path).tolist() == [[0, 1, 2, 3]]


def test_animated_mask_is_refused(tmp_path):
    frames = [Image.new("L", (3, 2), index) for index in (1, 2)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"a\.png: .*more than one picture"):
        read_mask(tmp_path / "a.png")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palette_of_few_bits(tmp_path, bits):
    row = np.arange(2**bits, dtype=np.uint8)[None]
    picture = Image.fromarray(row).convert("L")
    picture.putpalette(voc_palette()[: 2**bits].numpy().tobytes())
    picture.save(tmp_path / "a.png", bits=bits)
    assert read_mask(tmp_path / "a.png").tolist() == row.tolist()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_are_no_mask(tmp_path, mode):
    Image.new(mode, (3, 2)).save(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match=rf"a\.png: .*colours \(PIL mode '{mode}'\).*voc_palette.*write_mask"
    ):
        read_mask(tmp_path / "a.png")


def test_16_bits_are_no_mask(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: .*16 bits"):
        read_mask(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "GIF"])
def test_only_png(tmp_path, kind):
    Image.new("L", (2, 2)).save(tmp_path / "a.png", kind)
    with pytest.raises(ValueError, match=rf"a\.png: .*must be a PNG.*{kind}"):
        read_mask(tmp_path / "a.png")


def test_rotated_mask_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (2, 3)).save(tmp_path / "a.png", exif=exif)
    with pytest.raises(ValueError, match="EXIF rotation"):
        read_mask(tmp_path / "a.png")


def test_truncated_empty_and_missing(tmp_path):
    write_mask(tmp_path / "a.png", torch.randint(0, 256, (50, 50)))
    data = (tmp_path / "a.png").read_bytes()
    for length in (0, 10, 100, len(data) // 2):
        (tmp_path / "a.png").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"a\.png: cannot read this picture"):
            read_mask(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        read_mask(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="max_pixels"):
        read_mask(tmp_path / "a.png", max_pixels=2499)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            torch.tensor([[256]]),
            ValueError,
            "mask: expected class indices in 0..255, got values from 256 to 256",
        ),
        (torch.tensor([[3, -1]]), ValueError, "from -1 to 3"),
        (torch.zeros(2, 2), TypeError, "mask: expected an integer tensor"),
        (torch.zeros(2, 2, dtype=torch.bool), TypeError, "mask: expected an integer tensor"),
        (
            torch.zeros(2, 2, 2, dtype=torch.int64),
            ValueError,
            r"mask: expected shape \(H, W\), got \(2, 2, 2\)",
        ),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"mask: expected shape \(H, W\), got \(4,\)"),
        (torch.zeros(0, 4, dtype=torch.int64), ValueError, r"mask: expected shape \(H, W\) with H >= 1"),
    ],
)
def test_wrong_masks_are_not_written(tmp_path, mask, error, message):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        write_mask(path, mask)
    assert path.read_bytes() == b"old"


def test_wrong_name_and_palette(tmp_path):
    mask = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.png"):
        write_mask(tmp_path / "a.jpg", mask)
    with pytest.raises(TypeError, match="palette: expected uint8"):
        write_mask(tmp_path / "a.png", mask, palette=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="palette: expected at most 256"):
        write_mask(tmp_path / "a.png", mask, palette=torch.zeros(257, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="palette: expected shape"):
        write_mask(tmp_path / "a.png", mask, palette=torch.zeros(3, 4, dtype=torch.uint8))
    assert not list(tmp_path.iterdir())


def test_colorize(device):
    mask = torch.tensor([[0, 1], [15, 255]], device=device)
    image = colorize_mask(mask)
    assert image.shape == (3, 2, 2)
    assert image.dtype == torch.float32
    assert image.device.type == device.type
    assert torch.equal(image[:, 1, 0].cpu() * 255, torch.tensor([192.0, 128.0, 128.0]))
    batch = colorize_mask(torch.stack([mask, mask.flip(0)]))
    assert torch.equal(batch, torch.stack([image, image.flip(1)]))
    own = colorize_mask(mask, torch.tensor([[255, 0, 0]], dtype=torch.uint8))
    assert own[:, 0, 0].tolist() == [1, 0, 0]
    assert torch.equal(own[:, 0, 1], image[:, 0, 1])


@pytest.mark.parametrize("mask", [torch.zeros(2, 2), torch.tensor([[300]]), torch.tensor([1])])
def test_colorize_checks(mask):
    with pytest.raises((TypeError, ValueError), match="mask: expected"):
        colorize_mask(mask)


def test_colours_equal_the_file(tmp_path):
    mask = torch.randint(0, 256, (5, 6), generator=torch.Generator().manual_seed(0))
    write_mask(tmp_path / "a.png", mask)
    with Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())) as picture:
        colours = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal((colorize_mask(mask) * 255).round().to(torch.uint8), colours)


def test_random_bytes(tmp_path):
    """A broken header is an error, whatever breaks."""

    @given(st.integers(8, 60), st.integers(0, 255))
    def check(position, value):
        data = bytearray(png(8, 0, list(range(30))))
        data[position] = value
        (tmp_path / "a.png").write_bytes(data)
        try:
            assert read_mask(tmp_path / "a.png", max_pixels=1000).min() >= 0
        except ValueError as error:
            assert "a.png" in str(error)  # noqa: PT017

    check()


def test_a_comment_stands_beside_the_pixels(tmp_path):
    mask, path = torch.tensor([[0, 3, 255]]), tmp_path / "a.png"
    write_mask(path, mask, comment="made by hand")
    assert torch.equal(read_mask(path), mask)
    with Image.open(path) as picture:
        assert picture.text == {"Comment": "made by hand"}
    write_mask(path, mask)
    with Image.open(path) as picture:
        assert picture.text == {}


@pytest.mark.parametrize("comment", ["größer", "a\0b", "a" * 65536, None])
def test_a_comment_that_no_file_holds(tmp_path, comment):
    with pytest.raises((ValueError, TypeError), match="comment"):
        write_mask(tmp_path / "a.png", torch.zeros(1, 1, dtype=torch.uint8), comment=comment)
    assert not list(tmp_path.iterdir())
