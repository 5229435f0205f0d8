"""A Debian for aarch64 in a folder, with MeshInfer installed in it by deploy/install.sh, to be run
by qemu-user: without root, chroot and binfmt_misc, and nothing of this system is changed.

Packages are unpacked, not installed. ``python3`` there is a script: it runs Debian's own in qemu,
under the script's name. So ``sys.executable`` is the script, and whatever starts that (a virtual
environment, pip, a worker's supervisor) has the host's kernel start qemu again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = ("python3-venv", "ca-certificates", "coreutils", "libc-bin", "libstdc++6")
BOARDS = {
    "pi3": ("cortex-a53", "0xd03", "fp asimd evtstrm crc32 cpuid"),
    "pi4": ("cortex-a72", "0xd08", "fp asimd evtstrm crc32 cpuid"),
    "pi5": (
        "cortex-a76",
        "0xd0b",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc "
        "dcpop asimddp",
    ),
}
"""qemu's name of the processor of each, and what Linux says of it in /proc/cpuinfo."""

QEMU = ("qemu-aarch64-static", "qemu-aarch64")
_EMULATED = ("uname", "getconf")  # what install.sh asks of the system
_NOT_OF_THE_SYSTEM = ("usr", "bin", "sbin", "lib", "lib64", "etc")
_PACKAGES_S, _INSTALL_S, _ASK_S = 600, 2400, 60


class Unready(Exception):
    """It cannot be made here. ``code``: the exit code, 75 where trying again may help, else 78."""

    def __init__(self, text: str, hint: str, code: int = 78) -> None:
        super().__init__(text)
        self.hint, self.code = hint, code


@dataclass(frozen=True, slots=True)
class Arm:
    """What was made. ``python``: of the environment that has MeshInfer; ``about``: in words."""

    python: Path
    about: str

    def environment(self) -> dict[str, str]:
        """For a process there: MeshInfer is that of this checkout, the rest is what pip chose."""
        return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def made(folder: Path, board: str, mirror: str, say: Callable[[str], None]) -> Iterator[Arm]:
    """Make it in ``folder``, or what is missing of it; nobody else uses it meanwhile. Raises
    ``Unready``."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise Unready(
            f"this is {platform.machine()}, and x86_64 is what is wanted here",
            "on a device of aarch64: sh deploy/install.sh, and meshinfer worker --token",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Unready(f"another run uses {folder}", "wait, or give --cache", 75) from None
        qemu = _qemu(folder, mirror, say)
        root = folder / "root"
        of_root = (
            f"{folder} {RELEASE} {mirror} {PACKAGES}"  # programs name it: moved, it works no more
        )
        if _stamp(root) != of_root:
            _make_root(root, mirror, say)
            (root / "made").write_text(of_root)
        _make_programs(folder, qemu, board)
        inputs = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "deploy/install.sh")]
        of_env = hashlib.sha256(b"\0".join([of_root.encode(), *inputs])).hexdigest()
        if _stamp(folder / "env") != of_env:
            _install(folder, say)
            (folder / "env" / "made").write_text(of_env)
        python = folder / "env" / "bin" / "python"
        yield Arm(python, _about(python, qemu, board))


def _stamp(folder: Path) -> str:
    try:
        return (folder / "made").read_text()
    except OSError:
        return ""


# --- packages


def _qemu(folder: Path, mirror: str, say: Callable[[str], None]) -> Path:
    """This system's, or one that is fetched."""
    for name in QEMU:
        if found := shutil.which(name):
            return Path(found)
    own = folder / QEMU[0]
    if not own.exists():
        say(f"fetching   qemu-user-static from {mirror}, 63 MB")
        with _fetched(["qemu-user-static:amd64"], mirror, needed=False) as (debs, work):
            for deb in debs:
                _unpack(deb, work / "qemu")
            shutil.copy2(work / "qemu" / "usr" / "bin" / QEMU[0], own.with_suffix(".part"))
            own.with_suffix(".part").replace(own)
    return own


def _make_root(root: Path, mirror: str, say: Callable[[str], None]) -> None:
    """Unpack Python and all that it needs. What is of the running system comes from the host: qemu
    looks here first, and a folder /proc or /tmp here would hide those."""
    say(f"fetching   Debian {RELEASE} for aarch64 from {mirror}, 25 MB")
    shutil.rmtree(root, ignore_errors=True)
    with _fetched(PACKAGES, mirror) as (debs, _):
        for deb in debs:
            _unpack(deb, root)
    for path in root.iterdir():
        if path.name not in _NOT_OF_THE_SYSTEM:
            shutil.rmtree(path)
    for name in ("bin", "sbin", "lib"):
        if not (root / name).exists():  # releases that have them under /usr alone
            (root / name).symlink_to(f"usr/{name}")


def _unpack(deb: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    _run(["dpkg-deb", "-x", str(deb), str(to)], f"cannot unpack {deb.name}", _PACKAGES_S)


@contextmanager
def _fetched(
    packages: list[str] | tuple[str, ...], mirror: str, needed: bool = True
) -> Iterator[tuple[list[Path], Path]]:
    """The files of packages, with all that they need or alone, by an apt with lists of its own; and
    a folder to work in."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unready(
            "there is no qemu-aarch64 and no Debian for aarch64 here, nor an apt-get to fetch them",
            "run it on Debian or Ubuntu, x86_64; or install qemu-user-static, apt and dpkg",
        )
    if not KEYS.exists():
        raise Unready(f"Debian's keys are not here: {KEYS}", "apt install debian-archive-keyring")
    with tempfile.TemporaryDirectory(prefix="meshinfer-arm-") as name:
        work = Path(name)
        for each in ("etc", "lists/partial", "cache/archives/partial"):
            (work / each).mkdir(parents=True)
        (work / "status").touch()
        (work / "etc" / "sources.list").write_text(
            f"deb [signed-by={KEYS}] {mirror} {RELEASE} main\n"
        )
        # How this system reaches mirrors, and nothing else of its settings: no hooks.
        network = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True)
        (work / "apt.conf").write_text(
            f'{network.stdout}\nDir "{work}"; Dir::Etc "etc"; Dir::State "{work}";\n'
            f'Dir::State::status "{work}/status"; Dir::Cache "cache";\n'
            'APT::Architecture "arm64"; APT::Architectures { "arm64"; "amd64"; };\n'
            'APT::Update::Error-Mode "any"; APT::Install-Recommends "no";'
            ' APT::Sandbox::User "root"; Acquire::Languages "none";\n'
        )
        env = {**os.environ, "APT_CONFIG": str(work / "apt.conf"), "LC_ALL": "C"}
        archives = work / "cache" / "archives"
        fetch = ["install", "-yq", "--download-only"] if needed else ["download", "-q"]
        for arguments in (["update", "-q"], [*fetch, *packages]):
            what = f"apt-get {arguments[0]} from {mirror}"
            _run(["apt-get", *arguments], what, _PACKAGES_S, env=env, cwd=archives, code=75)
        yield sorted(archives.glob("*.deb")), work


# --- programs


def _make_programs(folder: Path, qemu: Path, board: str) -> None:
    """The scripts that run Arm's programs, and what the engine asks Linux about the processor:
    where it finds an x86's, on Arm, it dies (onnxruntime 1.32: SIGSEGV as it is imported)."""
    root, (processor, part, features) = folder / "root", BOARDS[board]
    real = next(root.glob("usr/bin/python3.[0-9]*[0-9]"))
    start = f'#!/bin/sh\nexec "{qemu}" -cpu {processor} -L "{root}"'
    _write_program(root / "usr" / "bin" / "python3", f'{start} -0 "$0" "{real}" "$@"\n')
    (folder / "bin").mkdir(exist_ok=True)
    for name in _EMULATED:
        found = next(
            path for path in (root / "bin" / name, root / "usr/bin" / name) if path.exists()
        )
        _write_program(folder / "bin" / name, f'{start} "{found}" "$@"\n')
    (root / "proc").mkdir(exist_ok=True)  # its files are looked for here first, then in the host's
    (root / "proc" / "cpuinfo").write_text(
        "".join(
            f"processor\t: {i}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\n"
            "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
            f"CPU part\t: {part}\nCPU revision\t: 3\n\n"
            for i in range(os.cpu_count() or 1)
        )
    )


def _write_program(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # Debian's is a link to the real one
    path.write_text(text)
    path.chmod(0o755)


def _install(folder: Path, say: Callable[[str], None]) -> None:
    """As on a device: deploy/install.sh with Arm's Python, and pip that chooses Arm's wheels."""
    say("installing MeshInfer there with deploy/install.sh; emulated, that takes minutes")
    command = ["sh", str(ROOT / "deploy" / "install.sh"), "--prefix", str(folder / "env")]
    command += ["--python", str(folder / "root" / "usr" / "bin" / "python3")]
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    _run(command, "deploy/install.sh", _INSTALL_S, env=env)


def _about(python: Path, qemu: Path, board: str) -> str:
    code = "import platform as p; print(p.machine(), p.python_version(), *p.libc_ver())"
    arm = _run([str(python), "-c", code], "Arm's Python", _ASK_S).split()
    version = _run([str(qemu), "--version"], "qemu", _ASK_S).split()[2]
    return (
        f"Debian {RELEASE}, {arm[0]}, CPython {arm[1]}, {arm[2]} {arm[3]}, "
        f"by {qemu.name} {version} as {BOARDS[board][0]} ({board})"
    )


def _run(command: list[str], what: str, longest_s: float, *, code: int = 78, **more: object) -> str:
    """Its stdout. Raises ``Unready`` with its own last words where it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=longest_s,
            check=False, **more,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unready(f"{what} took longer than {longest_s:.0f} s", "try again", 75) from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise Unready(
            f"{what} ended with {done.returncode}:\n  " + "\n  ".join(said),
            "is the network there? --mirror: another mirror of Debian; pip has settings of its own",
            done.returncode if done.returncode in (75, 78) else code,
        )
    return done.stdout
