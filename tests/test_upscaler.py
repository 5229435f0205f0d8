"""The shipped upscaler must beat bicubic on photographs it never saw, measured anew each time."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "train_upscaler"


def load_script() -> ModuleType:
    """The script as a module, though its name has no suffix."""
    loader = SourceFileLoader("train_upscaler", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    return ort.InferenceSession(str(script.MODEL), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def metadata(session: ort.InferenceSession) -> dict[str, str]:
    return session.get_modelmeta().custom_metadata_map


@pytest.fixture(scope="module")
def scores() -> dict[str, tuple[float, float]]:
    pytest.importorskip("skimage", reason="the held-out photographs are in the scikit-image wheel")
    return script.evaluate(script.MODEL)


def test_beats_bicubic_on_every_held_out_photograph(scores: dict[str, tuple[float, float]]) -> None:
    assert list(scores) == list(script.HELD_OUT)
    for name, (rival, model) in scores.items():
        assert model > rival, f"{name}: {model:.2f} dB against bicubic's {rival:.2f} dB"
    assert np.mean([model - rival for rival, model in scores.values()]) >= 0.8


def test_psnr_in_the_metadata_is_what_is_measured(
    scores: dict[str, tuple[float, float]], metadata: dict[str, str]
) -> None:
    # Kernels of other processors may round a few pixels the other way, no more.
    for name, stated in json.loads(metadata["psnr"]).items():
        assert (stated["bicubic"], stated["model"]) == pytest.approx(scores[name], abs=0.05)


def test_no_held_out_photograph_was_trained_on(metadata: dict[str, str]) -> None:
    assert json.loads(metadata["held_out"]) == list(script.HELD_OUT)
    assert json.loads(metadata["trained_on"]) == list(script.TRAINED_ON)
    assert not set(script.HELD_OUT) & set(script.TRAINED_ON)
    # The other side of a stereo pair is nearly the same picture.
    assert not any(name.startswith("motorcycle") for name in script.TRAINED_ON)


def test_says_how_an_image_becomes_its_input_and_under_which_licence(
    session: ort.InferenceSession, metadata: dict[str, str]
) -> None:
    image = json.loads(metadata["meshinfer.image"])
    assert image == script.IMAGE
    assert [image["input"]] == [value.name for value in session.get_inputs()]
    assert [image["output"]] == [value.name for value in session.get_outputs()]
    assert metadata["licence"] == "Apache-2.0"


def test_is_small_enough_to_ship() -> None:
    assert script.MODEL.stat().st_size < 1_000_000
    assert script.PHOTO.stat().st_size < 100_000


def test_beats_bicubic_on_the_demo_photo(session: ort.InferenceSession) -> None:
    # Needs no scikit-image: the photo is held out, and both rivals get the same JPEG of it.
    assert script.DEMO in script.HELD_OUT
    photo = Image.open(script.PHOTO).convert("RGB")
    truth = photo.crop((0, 0, photo.width // 2 * 2, photo.height // 2 * 2))
    small = script.degrade(truth)
    rival = script.psnr(truth, script.bicubic(small))
    assert script.psnr(truth, script.upscale(session, small)) > rival


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (33, 18)])
def test_doubles_any_size_and_stays_in_range(
    session: ort.InferenceSession, size: tuple[int, int]
) -> None:
    width, height = size
    x = np.random.default_rng(0).random((1, 3, height, width), np.float32)
    (y,) = session.run(None, {"image": x})
    assert y.shape == (1, 3, 2 * height, 2 * width)
    assert y.min() >= 0
    assert y.max() <= 1


def test_borders_are_not_darkened_by_zero_padding(session: ort.InferenceSession) -> None:
    # A flat picture must stay flat: the skip's border factor restores what padding takes away.
    y = np.asarray(script.upscale(session, Image.new("RGB", (24, 16), (180, 120, 60))), np.int16)
    assert np.abs(y - [180, 120, 60]).max() <= 6
