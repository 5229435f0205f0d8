"""Pictures from anybody: four formats and no other, bounded before they are decoded, whatever is in
them."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from cluster import pictures
from cluster.pictures import read_picture
from meshinfer import ImageSpec, limits
from meshinfer.errors import InvalidInput

SPEC = ImageSpec(input="x")
PHOTO = Path(pictures.__file__).parent / "data" / "photo.jpg"
FEW_PIXELS = 1 << 20
SIZE = (48, 32)


def photo() -> Image.Image:
    return Image.open(PHOTO, formats=["JPEG"]).resize(SIZE)


def saved(image: Image.Image, kind: str, **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- files made by hand ---------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, rows: bytes | None = None) -> bytes:
    """A grey PNG; ``more`` are chunks before its pixels."""
    rows = bytes((width + 1) * height) if rows is None else rows
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", head), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def claiming(data: bytes, width: int, height: int) -> bytes:
    """The same file with other sizes in its header; nothing behind it changes."""
    if data[:2] == b"BM":
        return data[:18] + struct.pack("<ii", width, height) + data[26:]
    if data[:2] == b"\xff\xd8":
        at = next(data.index(m) for m in (b"\xff\xc0", b"\xff\xc2") if m in data)
        return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]
    return png(width, height, rows=b"")


def long_canvas() -> bytes:
    """A small WebP with a canvas of 16384 x 16384, as animations may have."""
    inner = saved(photo(), "WEBP", lossless=True)[12:]
    side = struct.pack("<I", 16383)[:3]
    head = b"VP8X" + struct.pack("<IB3x", 10, 2) + side + side
    body = b"WEBP" + head + b"ANIM" + struct.pack("<IIH", 6, 0, 0) + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_each_of_the_four_formats_is_read(kind: str) -> None:
    how = {"lossless": True} if kind == "WEBP" else {}
    found = read_picture(saved(photo(), kind, **how), SPEC).pixels
    assert found.shape == (1, SIZE[1], SIZE[0], 3)
    error = np.abs(found[0].astype(int) - np.asarray(photo()).astype(int)).mean()
    assert error < (8 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("orientation", [*range(10), 65535])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_as_its_camera_was(kind: str, orientation: int) -> None:
    data = saved(Image.new("RGB", (4, 2)), kind, exif=turned(orientation))
    assert read_picture(data, SPEC).pixels.shape[1:3] == (
        (4, 2) if 5 <= orientation <= 8 else (2, 4)
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken(kind: str) -> None:
    first, *more = (Image.new("RGB", (8, 8), (i, 0, 0)) for i in (7, 80, 200))
    data = saved(first, kind, save_all=True, append_images=more, lossless=True, duration=40)
    assert (read_picture(data, SPEC).pixels[..., 0] == 7).all()


# --- what is refused ------------------------------------------------------------------------------


def refused(data: object) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        read_picture(data, SPEC)
    assert caught.value.hint
    return caught.value


def of_others() -> dict[str, bytes]:
    Image.init()
    found = {
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
        "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(12 + 192),
        "EPS with a command": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
        b"(%pipe%touch /tmp/x) (w) file\n%%EOF\n",
        "empty": b"",
    }
    for kind in sorted(Image.SAVE):
        if kind in (*pictures.FORMATS, "MPO"):  # an MPO is a JPEG with others behind it
            continue
        for mode in ("RGB", "P", "1"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    found[kind] = saved(Image.new(mode, (16, 16)), kind)
                break
            except (OSError, ValueError, KeyError):
                continue
    return found


@pytest.mark.parametrize(("kind", "data"), of_others().items(), ids=of_others())
def test_no_other_format_is_read(kind: str, data: bytes) -> None:
    assert "no picture that can be read" in refused(data).message


def test_the_other_formats_were_there_to_be_refused() -> None:
    assert {"GIF", "TIFF", "ICO", "PDF", "EPS", "TGA", "PPM", "JPEG2000"} <= set(of_others())
    opened = [Image.open(io.BytesIO(of_others()[kind])).format for kind in ("GIF", "TIFF", "EPS")]
    assert opened == ["GIF", "TIFF", "EPS"]


@pytest.mark.parametrize("cut", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_half_a_picture_is_none(kind: str, cut: float) -> None:
    data = saved(photo(), kind)
    refused(data[: int(len(data) * cut)])


CLAIMS = [
    *((kind, size) for kind in ("PNG", "BMP") for size in ((100_000, 100_000), (1, 70_000))),
    ("JPEG", (65_535, 65_535)),
    ("WEBP", (16_384, 16_384)),
]


@pytest.mark.parametrize(("kind", "size"), CLAIMS)
def test_a_header_that_claims_too_much_is_refused_before_anything_is_decoded(
    kind: str, size: tuple[int, int]
) -> None:
    data = long_canvas() if kind == "WEBP" else claiming(saved(photo(), kind), *size)
    tracemalloc.start()
    refused(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (-8, 8), (8, -(2**31))])
def test_sizes_that_are_none_are_refused(size: tuple[int, int]) -> None:
    refused(claiming(saved(photo(), "BMP"), *size))


BOMB = zlib.compress(bytes(64 << 20), 9)


@pytest.mark.parametrize(
    "more",
    [
        [chunk(b"zTXt", b"k\0\0" + BOMB)],
        [chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB)],
        [chunk(b"iCCP", b"k\0\0" + BOMB)],
        [chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(1 << 20))) for i in range(80)],
    ],
    ids=["zTXt", "iTXt", "iCCP", "many"],
)
def test_what_a_png_says_beside_its_pixels_is_bounded(more: list[bytes]) -> None:
    tracemalloc.start()
    refused(png(8, 8, *more))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    """A hundred bytes each, and each goes over all pixels."""
    data = saved(photo(), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    read_picture(data[:-2] + last * 50 + data[-2:], SPEC)
    assert "scans" in refused(data[:-2] + last * limits.IMAGE_SCANS + data[-2:]).message


def test_damaged_metadata_warns_nobody() -> None:
    entries = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" * 3
    data = png(8, 4, chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + entries))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(data, SPEC).pixels.shape == (1, 8, 4, 3)  # turned


def test_odd_transparency_warns_nobody() -> None:
    data = saved(photo().convert("P"), "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(data, SPEC).pixels.shape == (1, SIZE[1], SIZE[0], 3)


def test_more_bytes_than_a_picture_may_have_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = saved(photo(), "PNG")
    monkeypatch.setattr(limits, "IMAGE_FILE_BYTES", len(data) - 1)
    (tmp_path / "a.png").write_bytes(data)
    for given_as in (data, bytearray(data), memoryview(data), tmp_path / "a.png"):
        assert "bytes" in refused(given_as).message


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What is read without end shall end as a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_is_no_file_is_never_read(tmp_path: Path, little_memory: None) -> None:
    """They have no length, and no end."""
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path, tmp_path / "gone", "a\0b"):
        refused(path)


def test_a_model_that_takes_giant_pictures_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spec comes from the cluster."""
    spec = ImageSpec(input="x", size=(50_000, 50_000))
    with pytest.raises(InvalidInput, match="50000 x 50000"):
        read_picture(saved(photo(), "PNG"), spec)


# --- mutations ------------------------------------------------------------------------------------


def seeds() -> list[bytes]:
    image, exif = photo(), turned(6)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    movie = {"save_all": True, "append_images": [image.rotate(90)], "duration": 40}
    grey = image.convert("L")
    return [
        saved(image, "PNG", exif=exif, icc_profile=profile),
        saved(image.convert("P"), "PNG", transparency=0),
        saved(image.convert("LA"), "PNG"),
        saved(image, "PNG", **movie),
        saved(image, "JPEG", exif=exif, icc_profile=profile, comment=b"hello"),
        saved(grey, "JPEG", progressive=True),
        saved(image.convert("CMYK"), "JPEG"),
        saved(image, "WEBP", exif=exif, icc_profile=profile),
        saved(image.convert("RGBA"), "WEBP", lossless=True),
        saved(image, "WEBP", **movie),
        saved(image, "BMP"),
        saved(grey, "BMP"),
        run_lengths(),
    ]


def run_lengths() -> bytes:
    """A BMP of 16 x 16 as runs, with an absolute run and a delta."""
    body = b"\x10\x07\0\0" * 14 + b"\0\x04abcd\x0c\x01\0\0" + b"\0\x02\x03\0\x0d\x05\0\x01"
    offset = 14 + 40 + 1024
    head = struct.pack("<IiiHHIIiiII", 40, 16, 16, 1, 8, 1, len(body), 0, 0, 256, 0)
    return (
        b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + head + bytes(1024) + body
    )


SEEDS = seeds()


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def mutated(data: st.DataObject, seed: bytes) -> bytes:
    """Flips and cuts anywhere; in a PNG also in a chunk whose checksum is then right again."""
    if seed[:4] == b"\x89PNG" and data.draw(st.booleans()):
        parts = list(png_chunks(seed))
        i = data.draw(st.integers(0, len(parts) - 1))
        parts[i] = (parts[i][0], mutated_bytes(data, parts[i][1]))
        return seed[:8] + b"".join(chunk(*part) for part in parts)
    return mutated_bytes(data, seed)


def mutated_bytes(data: st.DataObject, seed: bytes) -> bytes:
    made = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 5))):
        if not made:
            break
        near = min(len(made), 200)  # headers are where it hurts
        at = data.draw(st.one_of(st.integers(0, near - 1), st.integers(0, len(made) - 1)))
        match data.draw(st.sampled_from(["set", "set", "flip", "cut", "add", "double"])):
            case "set":
                made[at] = data.draw(st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF]))
            case "flip":
                made[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del made[at : at + data.draw(st.integers(1, 40))]
            case "add":
                made[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "double":
                made[at:at] = made[at : at + data.draw(st.integers(1, 40))]
    return bytes(made)


@pytest.fixture(scope="module")
def few_pixels() -> Iterator[None]:
    """So that a header that claims as much as it may costs no second each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "IMAGE_PIXELS", FEW_PIXELS)
        yield


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(len(SEEDS)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_picture_is_a_picture_or_refused(
    few_pixels: None, seed: int, data: st.DataObject
) -> None:
    given_ = mutated(data, SEEDS[seed])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = read_picture(given_, SPEC)
        except InvalidInput:
            return
    assert found.pixels.dtype == np.uint8 and found.pixels.size <= 3 * FEW_PIXELS


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_a_seed_is_a_picture(seed: int) -> None:
    assert read_picture(SEEDS[seed], SPEC).pixels.any() or seed == len(SEEDS) - 1


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"])
)
def test_noise_is_no_picture(noise: bytes, head: bytes) -> None:
    refused(head + noise)


# --- what is said of pictures, as JSON ------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"input":' * 100_000,
        '{"input": "x", "scale": %s}' % ("9" * 400),
        '{"input": "x", "scale": NaN}',
        '{"input": "x", "scale": 0}',
        '{"input": "x", "mean": [Infinity, 0, 0]}',
        '{"input": "x", "std": [1, 1, 1e999]}',
        '{"input": "x", "size": [1e999, 1]}',
        '{"input": "x", "size": [0, 5]}',
        '{"input": "x", "size": [5, -1]}',
        '{"input": "x", "size": [5]}',
        "[]",
        "null",
        "",
        "{}",
    ],
)
def test_a_spec_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        ImageSpec.from_json(text)
    assert caught.value.hint and len(caught.value.message) < 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ("input", "layout", "colour", "scale", "mean", "std", "size", "output")


@given(st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON, st.booleans())
def test_any_json_is_a_spec_or_refused(value: object, named: bool) -> None:
    value = {"input": "x", **value} if named and isinstance(value, dict) else value
    try:
        spec = ImageSpec.from_json(json.dumps(value))
    except InvalidInput:
        return
    assert ImageSpec.from_json(spec.to_json()) == spec
