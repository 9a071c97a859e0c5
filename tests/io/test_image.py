"""`read_image`: every mode of PIL, rotation, damage."""

import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin

from pseudolabel.io import _decode, image_size, read_image
from pseudolabel.io._files import open_file

RNG = np.random.default_rng(0)
PHOTO = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (40, 30), Image.Resampling.BICUBIC
    )
)


def encode(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def expected(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def test_rgb_png_exactly(tmp_path):
    path = tmp_path / "größe 図 🐈.png"
    Image.fromarray(PHOTO).save(path)
    for name in (path, str(path)):
        image = read_image(name)
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert torch.equal(image, expected(PHOTO))
    assert image_size(path) == (30, 40)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("L", "JPEG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "JPEG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "PPM"),
        ("RGB", "TIFF"),
        ("LAB", "TIFF"),
    ],
)
def test_modes_as_pil_converts_them(tmp_path, mode, kind):
    path = tmp_path / "photo"
    lab = mode == "LAB"  # PIL converts from it, not to it
    source = (
        Image.frombytes("LAB", (40, 30), PHOTO.tobytes()) if lab else Image.fromarray(PHOTO).convert(mode)
    )
    path.write_bytes(data := encode(source, kind))
    reference = Image.open(io.BytesIO(data)).convert("RGB")
    image = read_image(path)
    assert torch.equal(image, expected(reference))
    assert image_size(path) == (30, 40)
    assert image.std() > 0.05


def test_gray_has_three_equal_channels(tmp_path):
    Image.fromarray(PHOTO[..., 0]).save(tmp_path / "gray.png")
    image = read_image(tmp_path / "gray.png")
    assert torch.equal(image, (torch.from_numpy(PHOTO[..., 0].copy()) / 255).expand(3, -1, -1))


def test_cmyk_jpeg_colours_are_not_inverted(tmp_path):
    Image.new("RGB", (16, 16), (250, 30, 20)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    mean = read_image(tmp_path / "a.jpg").mean((1, 2))
    assert torch.allclose(mean, torch.tensor([250, 30, 20]) / 255, atol=0.05)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P with alpha", "RGB with a transparent colour"])
def test_transparency_is_blended_over_white(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "RGBA":
        Image.fromarray(np.uint8([[[100, 0, 0, 255], [100, 0, 0, 0], [0, 0, 0, 51]]])).save(path)
        red = [100, 255, 204]
    elif kind == "LA":
        Image.fromarray(np.uint8([[[100, 255], [7, 0], [0, 51]]])).save(path)
        red = [100, 255, 204]
    elif kind == "P with alpha":
        picture = Image.fromarray(np.uint8([[0, 1, 2]])).convert("P")
        picture.putpalette([100, 0, 0, 9, 9, 9, 0, 0, 0])
        picture.save(path, transparency=bytes([255, 0, 51]))
        red = [100, 255, 204]
    else:
        Image.fromarray(np.uint8([[[100, 0, 0], [7, 8, 9], [0, 0, 0]]])).save(path, transparency=(7, 8, 9))
        red = [100, 255, 0]
    assert (read_image(path)[0, 0] * 255).round().tolist() == red


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_gray_is_divided_by_65535(tmp_path, name):
    values = np.array([[0, 1, 256], [32768, 65534, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert torch.equal(image, torch.from_numpy(values.astype(np.float32) / 65535).expand(3, -1, -1))


def test_16_bit_big_endian_tiff_and_pgm(tmp_path):
    values = np.array([[0, 513], [40000, 65535]], dtype=np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535\n" + values.astype(">u2").tobytes())
    assert torch.equal(read_image(tmp_path / "a.pgm")[1], torch.from_numpy(values.astype(np.float32) / 65535))
    picture = Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes())
    picture.save(tmp_path / "a.tif")
    assert torch.equal(read_image(tmp_path / "a.tif")[1], torch.from_numpy(values.astype(np.float32) / 65535))


def png_16_bit(values):
    """A PNG of 1 to 4 channels of 16 bits, built by hand: PIL writes no such colours."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(planes, *, bits, photometric, planar=1, extra=(), compress=False, width=4, height=3):
    """A TIFF with a strip for each of `planes`, bytes, built by hand: PIL writes none with odd channels."""
    planes = [zlib.compress(plane) if compress else plane for plane in planes]
    offsets = [8 + sum(map(len, planes[:number])) for number in range(len(planes))]
    tags = [
        (256, [width]),
        (257, [height]),
        (258, bits),
        (259, [8 if compress else 1]),
        (262, [photometric]),
        (273, offsets),
        (277, [len(bits)]),
        (278, [height]),
        (279, [len(plane) for plane in planes]),
        (284, [planar]),
        *([(338, extra)] if extra else []),
    ]
    start = 8 + sum(map(len, planes)) + sum(map(len, planes)) % 2
    directory, behind = struct.pack("<H", len(tags)), b""
    for tag, values in tags:
        data = struct.pack(f"<{len(values)}H", *values)
        if len(data) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(behind)
            behind += data
            data = struct.pack("<I", place)
        directory += struct.pack("<HHI4s", tag, 3, len(values), data)
    content = b"II*\0" + struct.pack("<I", start) + b"".join(planes)
    return content.ljust(start, b"\0") + directory + bytes(4) + behind


def test_16_bit_colour_to_8_bits(tmp_path):
    values = RNG.integers(0, 65536, (3, 4, 3), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png_16_bit(values))
    image = read_image(tmp_path / "a.png").permute(1, 2, 0)
    assert torch.allclose(image, torch.from_numpy(values.astype(np.float32) / 65535), atol=1 / 255)


def gray_16(kind, values):
    """A file of 16-bit grayscale, in all the ways that PIL gives it."""
    if kind == "PGM":
        height, width = values.shape
        return f"P5 {width} {height} 65535\n".encode() + values.astype(">u2").tobytes()
    if kind == "plain PGM":
        height, width = values.shape
        return f"P2 {width} {height} 65535\n{' '.join(map(str, values.flatten()))}\n".encode()
    if kind == "big-endian TIFF":
        height, width = values.shape
        return encode(Image.frombytes("I;16B", (width, height), values.astype(">u2").tobytes()), "TIFF")
    options = {"compression": "tiff_lzw"} if kind == "compressed TIFF" else {}
    return encode(Image.fromarray(values), kind.split()[-1], **options)


GRAY_16 = ["PNG", "TIFF", "compressed TIFF", "big-endian TIFF", "PGM", "plain PGM"]


@pytest.mark.parametrize("kind", GRAY_16)
def test_12_bits_in_16(tmp_path, kind):
    """Dark beyond use as 16 bits, so refused, unless it is said how many bits are in use."""
    path = tmp_path / "photo"
    values = np.array([[0, 1, 2048], [17, 4094, 4095]], dtype=np.uint16)
    path.write_bytes(gray_16(kind, values))
    with pytest.raises(ValueError, match=r"photo: .*largest value is 4095 of 65535: .*depth=12 .*depth=16"):
        read_image(path)
    for depth in (12, 14, 16):
        image = read_image(path, depth=depth)
        assert torch.equal(image, torch.from_numpy(values / np.float32(2**depth - 1)).expand(3, -1, -1))
    with pytest.raises(
        ValueError, match=r"photo: .*depth: its largest value is 4095, more than depth=11 allows"
    ):
        read_image(path, depth=11)
    assert image_size(path) == (2, 3)


@pytest.mark.parametrize("kind", GRAY_16)
@pytest.mark.parametrize("largest", [0, 4096])
def test_16_bits_that_tell_their_range_or_nothing(tmp_path, kind, largest):
    (tmp_path / "a").write_bytes(gray_16(kind, np.array([[0, largest]], dtype=np.uint16)))
    assert read_image(tmp_path / "a")[0, 0].tolist() == [0, np.float32(largest) / np.float32(65535)]


@pytest.mark.parametrize("compress", [False, True])
def test_12_bit_tiff_says_its_depth_itself(tmp_path, compress):
    values = np.array([[0, 1], [2048, 4095]], dtype=np.float32)
    rows = b"".join(bytes.fromhex("".join(f"{int(value):03x}" for value in row)) for row in values)
    (tmp_path / "a.tif").write_bytes(
        tiff([rows], bits=[12], photometric=1, compress=compress, width=2, height=2)
    )
    assert torch.equal(read_image(tmp_path / "a.tif")[2], torch.from_numpy(values / 4095))


def test_pgm_of_4095_says_its_range_itself(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 4095\n" + np.array([100, 200], ">u2").tobytes())
    assert read_image(tmp_path / "a.pgm")[0, 0].tolist() == pytest.approx([100 / 4095, 200 / 4095], abs=1e-5)
    with pytest.raises(ValueError, match=r"a\.pgm: .*depth: only files of 16 bits leave open"):
        read_image(tmp_path / "a.pgm", depth=12)


def test_transparent_value_of_16_bit_gray_is_white(tmp_path):
    data = png_16_bit(np.array([[[0], [500], [65535]]]))
    key = b"tRNS" + (500).to_bytes(2, "big")
    chunk = b"\0\0\0\2" + key + struct.pack(">I", zlib.crc32(key))
    place = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:place] + chunk + data[place:])
    assert read_image(tmp_path / "a.png")[1, 0].tolist() == [0, 1, 1]


def colours_16(kind, values):
    height, width, channels = values.shape
    if kind == "PNG":
        return png_16_bit(values)
    if kind == "PPM":
        return f"P6 {width} {height} 65535\n".encode() + values.astype(">u2").tobytes()
    rows, photometric = values.astype("<u2").tobytes(), 5 if kind == "CMYK TIFF" else 2
    options = {"compress": kind == "compressed TIFF", "width": width, "height": height}
    return tiff([rows], bits=[16] * channels, photometric=photometric, **options)


@pytest.mark.parametrize(
    ("kind", "channels"),
    [("PNG", 2), ("PNG", 3), ("PNG", 4), ("PPM", 3), ("TIFF", 3), ("compressed TIFF", 3), ("CMYK TIFF", 4)],
)
def test_12_bits_in_16_bit_colour(tmp_path, kind, channels):
    values = np.full((2, 3, channels), 4095, np.uint16)
    if kind == "PNG":  # its transparency has all 16 bits
        values[..., -1 if channels in (2, 4) else channels :] = 65535
    values[0, 0, 0] = 0
    (tmp_path / "a").write_bytes(colours_16(kind, values))
    with pytest.raises(ValueError, match=r"a: .*lowest sixteenth of their 16 bits.*depth=16"):
        read_image(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a: .*depth: of 16-bit colour the upper 8 bits are read; depth=12"):
        read_image(tmp_path / "a", depth=12)
    meant = read_image(tmp_path / "a", depth=16)[:, 1] * 255
    if kind == "CMYK TIFF":  # four inks of 15
        assert meant.unique().tolist() == [pytest.approx(255 * (1 - 15 / 255) ** 2, abs=1)]
    else:
        assert meant.unique().tolist() == [pytest.approx(15.5, abs=0.51)]
    values[1, 0, 0] = 5000
    (tmp_path / "a").write_bytes(colours_16(kind, values))
    assert torch.equal(read_image(tmp_path / "a"), read_image(tmp_path / "a", depth=16))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_depth_is_for_16_bits(tmp_path, kind):
    (tmp_path / "a").write_bytes(encode(Image.fromarray(PHOTO), kind))
    with pytest.raises(ValueError, match=r"a: .*depth: only files of 16 bits"):
        read_image(tmp_path / "a", depth=8)


@pytest.mark.parametrize("depth", [0, -1, 17, 12.0, "12", True])
def test_wrong_depth(tmp_path, depth):
    with pytest.raises(ValueError, match=r"^depth: expected"):
        read_image(tmp_path / "no file is looked for", depth=depth)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4), 1).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a\.tif: .*'{mode}'.* no known range"):
        read_image(tmp_path / "a.tif")


def test_inverted_16_bit_tiff_is_refused(tmp_path):
    picture = Image.fromarray(np.zeros((4, 4), np.uint16))
    picture.save(tmp_path / "a.tif", tiffinfo={262: 0})
    with pytest.raises(ValueError, match="no known range"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_exif_orientation(tmp_path, orientation, kind, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "a"
    path.write_bytes(data := encode(Image.fromarray(PHOTO).convert(mode), kind, exif=exif, **options))
    picture = Image.open(io.BytesIO(data))
    reference = ImageOps.exif_transpose(picture).convert("RGB")
    image = read_image(path)
    assert torch.equal(image, expected(reference))
    assert image.is_contiguous()
    assert image_size(path) == tuple(image.shape[1:])
    assert tuple(image.shape[1:]) == ((40, 30) if 5 <= orientation <= 8 else (30, 40))


def test_png_with_its_orientation_behind_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(PHOTO), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    (tmp_path / "a.png").write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert image_size(tmp_path / "a.png") == (40, 30)
    assert torch.equal(read_image(tmp_path / "a.png"), expected(np.rot90(PHOTO, -1)))


def test_exif_orientation_of_16_bit(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.array([[0, 1, 2], [3, 4, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    turned = np.rot90(values, -1).astype(np.float32) / 65535
    assert torch.equal(read_image(tmp_path / "a.png")[0], torch.from_numpy(turned.copy()))


COLOURS = ("red", "lime", "blue")


# On Python 3.13 the writer of PIL is closed again when it is collected, and says that it cannot.
CLOSED_TWICE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def pages(kind, **options):
    """Three pictures of one colour each in a file."""
    first, *others = [Image.new("RGB", (4, 3), colour) for colour in COLOURS]
    return encode(first, kind, save_all=True, append_images=others, **options)


def tiff_with_copies(path, kinds):
    """Pages of the kinds that tag 254 tells: 1 a smaller copy, 4 a mask of transparency."""
    with TiffImagePlugin.AppendingTiffWriter(path, new=True) as file:
        for number, kind in enumerate(kinds):
            Image.new("RGB", (4, 3), COLOURS[number % 3]).save(file, "TIFF", tiffinfo={254: kind})
            file.newFrame()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("read", [read_image, image_size])
def test_several_pages_are_refused_unless_one_is_named(tmp_path, kind, read):
    path = tmp_path / "photo"
    path.write_bytes(pages(kind, **{"lossless": True} if kind == "WEBP" else {}))
    with pytest.raises(ValueError, match=r"photo: .*more than one picture.*page=0"):
        read(path)
    for page, colour in enumerate(np.eye(3)):
        found = read(path, page=page)
        assert found == (3, 4) if read is image_size else found[:, 0, 0].tolist() == colour.tolist()
    with pytest.raises(ValueError, match=r"photo: .*page: it has no page 3"):
        read(path, page=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_page_of_a_single_picture(tmp_path, kind):
    (tmp_path / "a").write_bytes(encode(Image.fromarray(PHOTO), kind))
    assert torch.equal(read_image(tmp_path / "a", page=0), read_image(tmp_path / "a"))
    for read in (read_image, image_size):
        with pytest.raises(ValueError, match=r"a: .*page: it has no page 1"):
            read(tmp_path / "a", page=1)


@pytest.mark.parametrize("page", [-1, 1.0, "1", True])
def test_wrong_page(tmp_path, page):
    for read in (read_image, image_size):
        with pytest.raises(ValueError, match=r"^page: expected"):
            read(tmp_path / "no file is looked for", page=page)


@CLOSED_TWICE
def test_pages_of_several_sizes_and_turns(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "a.tif", new=True) as file:
        for size, options in (((4, 3), {}), ((40, 30), {"exif": exif})):
            Image.fromarray(PHOTO).resize(size).save(file, "TIFF", **options)
            file.newFrame()
    assert image_size(tmp_path / "a.tif", page=0) == (3, 4)
    assert image_size(tmp_path / "a.tif", page=1) == (40, 30)
    assert torch.equal(read_image(tmp_path / "a.tif", page=1), expected(np.rot90(PHOTO, -1)))
    with pytest.raises(ValueError, match=r"a\.tif: .*pixels are more than max_pixels=1199"):
        read_image(tmp_path / "a.tif", page=1, max_pixels=1199)


def test_photo_with_its_preview(tmp_path):
    """MPO, as phones write it: a JPEG, and another one behind it."""
    photo, preview = Image.fromarray(PHOTO), Image.new("RGB", (40, 30), "red")
    (tmp_path / "a.jpg").write_bytes(encode(photo, "MPO", save_all=True, append_images=[preview]))
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.format == "MPO"
        reference = expected(picture.convert("RGB"))
    assert torch.equal(read_image(tmp_path / "a.jpg"), reference)
    assert image_size(tmp_path / "a.jpg") == (30, 40)
    assert read_image(tmp_path / "a.jpg", page=1)[:, 0, 0].tolist() == pytest.approx([1, 0, 0], abs=0.02)
    assert image_size(tmp_path / "a.jpg", page=1) == (30, 40)


@CLOSED_TWICE
@pytest.mark.parametrize("kinds", [(0, 1), (0, 1, 1), (0, 4, 5), (0, *[1] * 32)])
def test_smaller_copies_are_no_pages(tmp_path, kinds):
    tiff_with_copies(tmp_path / "a.tif", kinds)
    assert read_image(tmp_path / "a.tif")[:, 0, 0].tolist() == [1, 0, 0]
    assert read_image(tmp_path / "a.tif", page=1)[:, 0, 0].tolist() == [0, 1, 0]
    assert image_size(tmp_path / "a.tif") == (3, 4)


@CLOSED_TWICE
@pytest.mark.parametrize("kinds", [(0, 1, 0), (0, 2), (1, 0), (1,), (0, *[1] * 33)])
def test_copies_first_or_pages_among_them(tmp_path, kinds):
    tiff_with_copies(tmp_path / "a.tif", kinds)
    for read in (read_image, image_size):
        with pytest.raises(ValueError, match=r"a\.tif: .*more than one picture"):
            read(tmp_path / "a.tif")


def test_page_that_pil_cannot_read_is_a_page(tmp_path):
    data = pages("TIFF")
    photometric = struct.pack("<HHIHH", 262, 3, 1, 2, 0)
    place = data.rindex(photometric)
    (tmp_path / "a.tif").write_bytes(
        data[:place] + photometric.replace(b"\2\0", b"\x63\0") + data[place + 12 :]
    )
    with pytest.raises(ValueError, match=r"a\.tif: .*more than one picture"):
        read_image(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif", page=0)[:, 0, 0].tolist() == [1, 0, 0]
    assert read_image(tmp_path / "a.tif", page=1)[:, 0, 0].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"a\.tif: .*unknown pixel mode"):
        read_image(tmp_path / "a.tif", page=2)


PLANES = np.arange(60, dtype=np.uint8).reshape(5, 3, 4)


def as_planes(pixels):
    return [plane.tobytes() for plane in pixels]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("read", [read_image, image_size])
@pytest.mark.parametrize("planar", [1, 2])
def test_channels_that_are_no_colours_are_refused(tmp_path, read, channels, planar, compress):
    """PIL gives the first channel of some of these files, and refuses others."""
    pixels = PLANES[:channels]
    strips = as_planes(pixels) if planar == 2 else [np.moveaxis(pixels, 0, -1).tobytes()]
    settings = {"bits": [8] * channels, "extra": [0] * (channels - 1), "photometric": 1}
    (tmp_path / "a.tif").write_bytes(tiff(strips, planar=planar, compress=compress, **settings))
    with pytest.raises(ValueError, match=r"a\.tif: .*(its \d channels only the first|TIFF of many channels)"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("compress", [False, True])
def test_planes_of_colours(tmp_path, compress):
    strips = as_planes(PLANES[:3])
    (tmp_path / "a.tif").write_bytes(tiff(strips, bits=[8] * 3, photometric=2, planar=2, compress=compress))
    assert torch.equal(read_image(tmp_path / "a.tif"), torch.from_numpy(PLANES[:3].copy()) / 255)


def test_planes_of_16_bit_colours(tmp_path):
    """PIL mixes them up unless they are compressed: then they are refused."""
    values = PLANES[:3].astype("<u2") * 1000
    for compress in (True, False):
        content = tiff(as_planes(values), bits=[16] * 3, photometric=2, planar=2, compress=compress)
        (tmp_path / "a.tif").write_bytes(content)
        if compress:
            assert torch.equal(read_image(tmp_path / "a.tif"), torch.from_numpy(values >> 8) / 255)
        else:
            with pytest.raises(ValueError, match=r"a\.tif: .*its 3 planes of 16 bits cannot be read"):
                read_image(tmp_path / "a.tif")


def test_channels_behind_red_green_and_blue_are_left_out(tmp_path):
    strip = np.moveaxis(PLANES[:4], 0, -1).tobytes()
    (tmp_path / "a.tif").write_bytes(tiff([strip], bits=[8] * 4, photometric=2, extra=[0]))
    assert torch.equal(read_image(tmp_path / "a.tif"), torch.from_numpy(PLANES[:3].copy()) / 255)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (255, 0, 51)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").flatten().tolist() == pytest.approx([1, 0, 0.2])


FORMATS = {
    "JPEG": {},
    "progressive JPEG": {"progressive": True},
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "compressed TIFF": {"compression": "tiff_lzw"},
    "WEBP": {},
    "PPM": {},
}
ENCODED = {
    kind: encode(Image.fromarray(PHOTO), kind.split()[-1], **options) for kind, options in FORMATS.items()
}


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_file_is_refused_or_whole(tmp_path, monkeypatch, kind, tolerant):
    """At every length: an error, or, where only an end mark is missing, all pixels. Never half-grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    data, path = ENCODED[kind], tmp_path / "photo"
    path.write_bytes(data)
    whole = read_image(path)
    refused = 0
    lengths = {*range(0, len(data), max(1, len(data) // 60)), *range(max(0, len(data) - 15), len(data))}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        try:
            image = read_image(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
        else:
            assert torch.equal(image, whole), f"{length} of {len(data)} bytes"
    assert refused > 0.7 * len(lengths)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


@pytest.mark.parametrize("tolerant", [False, True])
def test_jpeg_whose_tail_is_zeros_is_refused(tmp_path, monkeypatch, tolerant):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    data = ENCODED["JPEG"]
    half = len(data) * 3 // 4
    (tmp_path / "a.jpg").write_bytes(data[:half] + bytes(len(data) - half))
    with pytest.raises(ValueError, match=r"a\.jpg: cannot read this picture"):
        read_image(tmp_path / "a.jpg")


def test_strict_decoding_in_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / "a.jpg"
    data = encode(Image.fromarray(PHOTO).resize((400, 300)), "JPEG")
    path.write_bytes(data[: len(data) // 2])
    refused = []

    def read():
        for _ in range(20):
            try:
                read_image(path)
            except ValueError:
                refused.append(True)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 80
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@given(kind=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_damaged_bytes_give_an_image_or_value_error(tmp_path_factory, kind, data):
    content = bytearray(ENCODED[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "photo"
    path.write_bytes(content)
    try:
        image = read_image(path, max_pixels=10_000)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert image.shape[0] == 3
        assert image.min() >= 0
        assert image.max() <= 1


@pytest.mark.parametrize(
    "content", [b"", b"x", b"not a picture\n" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff"]
)
@pytest.mark.parametrize("read", [read_image, image_size])
def test_no_picture(tmp_path, content, read):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    cause = "the file is empty" if not content else "JPEG|truncated|EOF|end of|format|index"
    with pytest.raises(ValueError, match=rf"a\.jpg: cannot read this picture: .*({cause})"):
        read(path)


def test_formats_that_start_programs_are_not_opened(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match="not a file of one of the formats"):
        read_image(tmp_path / "a.eps")


def test_broken_png_checksum(tmp_path):
    data = bytearray(ENCODED["PNG"])
    data[data.index(b"IDAT") + 20] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("read", [read_image, image_size])
def test_too_many_pixels(tmp_path, read):
    Image.new("L", (100, 50)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png", max_pixels=5000) is not None
    with pytest.raises(ValueError, match=r"a\.png: .*50 x 100 pixels are more than max_pixels=4999"):
        read(tmp_path / "a.png", max_pixels=4999)


@pytest.mark.parametrize("read", [read_image, image_size])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bomb(tmp_path, read, side):
    """A header that claims much more than there is: refused before anything is allocated for it."""
    data = bytearray(ENCODED["BMP"])
    data[18:26] = side.to_bytes(4, "little") + side.to_bytes(4, "little")
    (tmp_path / "a.bmp").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.bmp: cannot read this picture: .*(max_pixels|bomb)"):
        read(tmp_path / "a.bmp")


def with_scans(count, size=(64, 64), **options):
    """A progressive JPEG with so many empty scans behind its own."""
    data = encode(Image.new("RGB", (64, 64), (90, 120, 200)), "JPEG", progressive=True, **options)
    place = data.index(b"\xff\xc2") + 5
    data = data[:place] + struct.pack(">HH", *size) + data[place + 4 :]
    scan = b"\xff\xda\0\x08\x01\x01\0\x01\x3f\0" + b"\0"
    return data[:-2] + scan * count + b"\xff\xd9"


@pytest.fixture
def small_limit(monkeypatch):
    """The limits for pictures of the largest size, with a size that decodes at once."""
    monkeypatch.setattr(_decode, "MAX_PIXELS", 64 * 64)
    monkeypatch.setattr(_decode, "_MAX_RLE_PIXELS", 1000)


def test_scans_of_a_jpeg_are_counted(tmp_path, small_limit):
    """12 scans of the largest picture; an ordinary progressive one has 10."""
    path = tmp_path / "a.jpg"
    path.write_bytes(with_scans(2))
    assert read_image(path).shape == (3, 64, 64)
    assert image_size(path) == (64, 64)
    path.write_bytes(with_scans(3))
    with pytest.raises(ValueError, match=r"a\.jpg: .*go over 64 x 64 pixels 13 times"):
        read_image(path)
    path.write_bytes(with_scans(3, (32, 32)))
    assert read_image(path).shape == (3, 32, 32)


def test_thousands_of_scans_of_a_large_jpeg(tmp_path):
    (tmp_path / "a.jpg").write_bytes(with_scans(2000, (4000, 4000)))
    with pytest.raises(ValueError, match=r"a\.jpg: .*go over 4000 x 4000 pixels 2010 times"):
        read_image(tmp_path / "a.jpg")


def test_what_looks_like_a_scan_is_none(tmp_path, small_limit):
    """In a comment, and behind the end of the image; filling and restart markers hide none."""
    path, scans = tmp_path / "a.jpg", b"\xff\xda\0\x02" * 100
    path.write_bytes(with_scans(0, comment=scans) + scans)
    assert read_image(path).shape == (3, 64, 64)
    for hidden in (b"\xff\xff", b"\xff\xd0\xff", b"\xff\x02\xff\xff\xff", b"\xff\0\xff"):
        data = with_scans(100)
        path.write_bytes(
            data.replace(
                b"\0\xff\xda\0\x08\x01\x01\0\x01\x3f", b"\0" + hidden + b"\xda\0\x08\x01\x01\0\x01\x3f"
            )
        )
        with pytest.raises(ValueError, match=r"a\.jpg: .*1\d\d times"):
            read_image(path)


def test_scans_of_a_preview_count_for_the_preview(tmp_path, small_limit):
    photo = Image.fromarray(PHOTO)
    data = encode(photo, "MPO", save_all=True, append_images=[photo])
    (tmp_path / "a.jpg").write_bytes(data[:-2] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 100 + data[-2:])
    assert read_image(tmp_path / "a.jpg").shape == (3, 30, 40)
    with pytest.raises(ValueError, match=r"a\.jpg: .*30 x 40 pixels 101 times"):
        read_image(tmp_path / "a.jpg", page=1)


def test_scans_of_a_jpeg_in_a_tiff(tmp_path, capfd):
    """libtiff counts them."""
    for count in (2, 3):
        strip = with_scans(count)
        data = tiff([strip], bits=[8] * 3, photometric=6, width=64, height=64)
        (tmp_path / "a.tif").write_bytes(
            data.replace(struct.pack("<HHIHH", 259, 3, 1, 1, 0), struct.pack("<HHIHH", 259, 3, 1, 7, 0))
        )
        if count == 2:
            assert read_image(tmp_path / "a.tif").shape == (3, 64, 64)
        else:
            with pytest.raises(ValueError, match=r"a\.tif: cannot read this picture"):
                read_image(tmp_path / "a.tif")
    capfd.readouterr()  # libtiff writes to the terminal


def bmp_rle(width, height, runs):
    palette = b"".join(bytes((level, 0, 255 - level, 0)) for level in range(256))
    start = 54 + len(palette)
    sizes = struct.pack("<IHHI", start + len(runs), 0, 0, start)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + sizes + header + palette + runs


def test_run_lengths_of_a_bmp(tmp_path, small_limit):
    """PIL decodes them in Python."""
    (tmp_path / "a.bmp").write_bytes(bmp_rle(40, 25, b"\x28\xff\0\0" * 25))
    assert read_image(tmp_path / "a.bmp")[0].unique().tolist() == [0]
    (tmp_path / "a.bmp").write_bytes(bmp_rle(40, 26, b"\x01\xff\0\0" * 26))
    with pytest.raises(
        ValueError, match=r"a\.bmp: .*run-length coded BMP is read up to 1000 pixels, it has 1040"
    ):
        read_image(tmp_path / "a.bmp")


def test_tiles_over_one_another(tmp_path, small_limit):
    """Two strips in turn, so that PIL does not see that they are the same."""
    pixels = bytes(range(64)) * 64
    for count in (12, 13):
        data = tiff([pixels[:-64], pixels[-64:]] * count, bits=[8], photometric=1, width=64, height=64)
        (tmp_path / "a.tif").write_bytes(
            data.replace(struct.pack("<HHIHH", 278, 3, 1, 64, 0), struct.pack("<HHIHH", 278, 3, 1, 63, 0))
        )
        if count == 12:
            assert read_image(tmp_path / "a.tif").shape == (3, 64, 64)
        else:
            with pytest.raises(ValueError, match=r"a\.tif: .*64 x 64 pixels 13 times"):
                read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_late_frame_of_a_large_animation(tmp_path, monkeypatch, kind):
    first, *others = [Image.new("RGB", (64, 64), (17 * number, 0, 255)) for number in range(14)]
    options = {"lossless": True} if kind == "WEBP" else {}
    (tmp_path / "a").write_bytes(encode(first, kind, save_all=True, append_images=others, **options))
    monkeypatch.setattr(_decode, "MAX_PIXELS", 64 * 64)
    assert read_image(tmp_path / "a", page=11).shape == (3, 64, 64)
    with pytest.raises(ValueError, match=r"a: .*64 x 64 pixels 13 times"):
        read_image(tmp_path / "a", page=12)


def test_animation_that_grows(tmp_path, small_limit):
    """Frames of a GIF may be larger than its first."""

    def frame(size):
        data = encode(Image.new("L", size), "GIF")
        place = data.index(b"," + struct.pack("<HHHH", 0, 0, *size))
        return data[:place], data[place:-1]

    head, small = frame((1, 1))
    (tmp_path / "a.gif").write_bytes(head + small + frame((64, 64))[1] * 13 + b";")
    if read_image(tmp_path / "a.gif", page=11).shape != (3, 64, 64):
        pytest.skip("this version of Pillow crops them to the first")
    with pytest.raises(ValueError, match=r"a\.gif: .*64 x 64 pixels 13 times"):
        read_image(tmp_path / "a.gif", page=13)


def test_comments_of_a_plain_ppm(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P3 1 1 255\n" + b"#\n" * 1000 + b"255 0 0\n")
    assert read_image(tmp_path / "a.ppm").flatten().tolist() == [1, 0, 0]
    (tmp_path / "a.ppm").write_bytes(b"P3 1 1 255\n" + b"#\n" * 1001 + b"255 0 0\n")
    with pytest.raises(ValueError, match=r"a\.ppm: .*plain PPM is read up to 1000 comments"):
        read_image(tmp_path / "a.ppm")


def test_jpeg_of_a_terabyte(tmp_path):
    """Its scans are not counted for hours."""
    path = tmp_path / "a.jpg"
    path.write_bytes(ENCODED["JPEG"][:-100])
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"a\.jpg: .*a JPEG is read up to 1073741824 bytes"):
        read_image(path)


@pytest.mark.skipif(os.name != "posix", reason="an open file cannot be deleted")
def test_file_is_opened_once(tmp_path, monkeypatch):
    """By the name it may be another file a moment later."""
    opened = []
    monkeypatch.setattr(_decode, "open_file", lambda path: opened.append(path) or open_file(path))
    path = tmp_path / "a"
    for kind in ("JPEG", "PNG", "TIFF", "compressed TIFF", "BMP", "GIF", "WEBP", "PPM"):
        path.write_bytes(ENCODED[kind])
        whole = read_image(path)
        read = _decode.Image.open

        def replaced(file, read=read, **options):
            path.unlink()
            path.write_bytes(b"another file")
            return read(file, **options)

        monkeypatch.setattr(_decode.Image, "open", replaced)
        assert torch.equal(read_image(path), whole)
        monkeypatch.setattr(_decode.Image, "open", read)
    assert len(opened) == 16


def test_text_bomb_in_png(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 10_000_000, zip=True)
    Image.fromarray(PHOTO).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("read", [read_image, image_size])
def test_file_system_errors_stay(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        read(tmp_path / "missing.jpg")
    with pytest.raises(OSError, match=tmp_path.name):
        read(tmp_path)
