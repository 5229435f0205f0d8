"""What a 64-bit Pi would install: wheels only, no torch, at most 90 MB. Asks the package index."""

from __future__ import annotations

import pytest
from wheel_set import GLIBC, Unresolved, Wheel, faults, missing, requirements, resolve


@pytest.mark.parametrize("python", sorted(GLIBC))
def test_the_base_install_is_wheels_for_a_pi(python: str) -> None:
    wheels = resolve(requirements(), python)
    assert faults(wheels) == []
    assert {"numpy", "onnxruntime", "pyzmq"} <= {wheel.name for wheel in wheels}
    tagged = [wheel for wheel in wheels if "aarch64" in wheel.url]
    assert tagged, "none of them is of the target"
    assert all(wheel.url.endswith("-any.whl") or wheel in tagged for wheel in wheels)


def test_what_has_no_wheel_is_not_built() -> None:
    with pytest.raises(Unresolved, match="docopt"):
        resolve(["docopt==0.6.2"], "3.11")  # published as source alone


def wheel(name: str, nbytes: int = 1, *, url: str = "", requires: tuple[str, ...] = ()) -> Wheel:
    return Wheel(name, "1", url or f"https://index/{name}-1-py3-none-any.whl", nbytes, requires)


@pytest.mark.parametrize(
    ("wheels", "word"),
    [
        ([wheel("a", url="https://index/a-1.tar.gz")], "source"),
        ([wheel("torch")], "no place"),
        ([wheel("nvidia-cublas-cu12")], "no place"),
        ([wheel("ray")], "no place"),
        ([wheel("a", 45_000_000), wheel("b", 45_000_001)], "b 45.0, a 45.0"),
    ],
)
def test_a_fault_is_told(wheels: list[Wheel], word: str) -> None:
    (told,) = faults(wheels)
    assert word in told


def test_a_set_without_faults_has_none() -> None:
    assert faults([wheel("a", 45_000_000), wheel("b", 45_000_000)]) == []


def test_markers_hold_for_the_target_and_not_for_the_python_that_asks() -> None:
    found = [
        wheel("a", requires=('old; python_version < "3.12"', 'arm; platform_machine == "aarch64"')),
        wheel("b", requires=("a>=1", 'x; sys_platform == "win32"', 'y; extra == "more"')),
    ]
    assert missing(found, "3.11") == ["arm", "old"]
    assert missing(found, "3.13") == ["arm"]
