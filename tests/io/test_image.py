"""`read_image`: every mode of PIL, rotation, damage."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from pseudolabel.io import image_size, read_image

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


def png_16_bit_rgb(values):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_16_bit_colour_to_8_bits(tmp_path):
    values = RNG.integers(0, 65536, (3, 4, 3), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png_16_bit_rgb(values))
    image = read_image(tmp_path / "a.png").permute(1, 2, 0)
    assert torch.allclose(image, torch.from_numpy(values.astype(np.float32) / 65535), atol=1 / 255)


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


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[:, 0, 0].tolist() == [1, 0, 0]


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
