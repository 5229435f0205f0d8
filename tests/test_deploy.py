"""What deploy/ ships: each file as far as it can be checked without a board, root or Docker.

deploy/README.md says what else was run by hand, and what never was.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli.install import File, files_of, write
from cluster.discovery import SERVICE
from cluster.locate import DEFAULT_PORT
from cluster.supervisor import FINAL_CODES
from meshinfer.errors import BY_NAME, ConfigurationError
from meshinfer.protocol.messages import PROTOCOL

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PROGRAM = Path("/opt/meshinfer/bin/meshinfer")
EXPOSED = 1.5


def tool(name: str) -> str:
    """Its path; CI installs it (.ci/run), elsewhere the test says what it lacks."""
    path = shutil.which(name)
    if path is None and os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed, and CI must run it", pytrace=False)
    if path is None:
        pytest.skip(f"needs {name}")
    return path


def run(*command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)


# --- units


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_takes_each_unit_and_finds_it_closed(unit: Path, tmp_path: Path) -> None:
    analyze, copy = tool("systemd-analyze"), tmp_path / unit.name
    # It wants the program to be there, and only reports settings that it does not know.
    copy.write_text(unit.read_text().replace(str(PROGRAM), "/bin/true"))
    verified = run(analyze, "verify", "--man=no", str(copy))
    assert verified.returncode == 0
    assert unit.name not in verified.stderr, verified.stderr
    limit = str(round(EXPOSED * 10))
    judged = run(analyze, "security", "--offline=yes", f"--threshold={limit}", str(copy))
    assert judged.returncode == 0, judged.stdout[-200:]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_follows_our_exit_codes_and_drains(unit: Path) -> None:
    found = settings(unit)
    final = {int(code) for code in found["RestartPreventExitStatus"][0].split()}
    assert final == FINAL_CODES - {0}
    assert final <= {kind.exit_code for kind in BY_NAME.values()}
    assert found["Restart"] == ["on-failure"]
    assert found["KillMode"] == ["mixed"], "the supervisor hands SIGTERM on: else it comes twice"
    assert int(found["OOMScoreAdjust"][0]) > 0
    assert found["DynamicUser"] == ["yes"]
    assert found["Type"] == ["notify"]
    assert float(found["WatchdogSec"][0]) >= 10


def test_the_package_ships_the_units_that_deploy_shows() -> None:
    assert [unit.name for unit in UNITS] == [
        "meshinfer-coordinator.service",
        "meshinfer-worker.service",
    ]
    for unit in UNITS:
        assert unit.resolve() == ROOT / "cluster" / "data" / unit.name


# --- meshinfer worker --install


def test_installing_writes_the_unit_its_settings_and_a_private_token(tmp_path: Path) -> None:
    given = {"MESHINFER_COORDINATOR": "10.0.0.2:7433", "MESHINFER_WORKER_NAME": 'a "b" \\'}
    found = files_of(given, "mi1.secret", program=Path("/srv/venv/bin/meshinfer"), nice=12)
    for each in found:
        write(tmp_path / each.path, each)
    unit = (tmp_path / "etc/systemd/system/meshinfer-worker.service").read_text()
    assert "\nExecStart=/srv/venv/bin/meshinfer worker --token-file" in unit
    assert "\nNice=12\n" in unit
    environment = (tmp_path / "etc/meshinfer/worker.env").read_text().splitlines()
    assert environment == [
        'MESHINFER_COORDINATOR="10.0.0.2:7433"',
        'MESHINFER_WORKER_NAME="a \\"b\\" \\\\"',
    ]
    token = tmp_path / "etc/meshinfer/token"
    assert token.read_text() == "mi1.secret\n"
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_token_is_never_readable_by_others_even_where_a_file_was(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    path.chmod(0o644)
    write(path, File(Path("token"), "new", secret=True))
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("folder", ["/home/pi/venv", "/root/x", "/tmp/y"])
def test_a_program_that_a_service_cannot_see_is_refused(folder: str) -> None:
    with pytest.raises(ConfigurationError, match="sees no home"):
        files_of({}, None, program=Path(folder) / "bin/meshinfer", nice=None)


def test_a_setting_of_several_lines_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be a setting"):
        files_of({"MESHINFER_CLUSTER": "a\nExecStart=b"}, None, program=PROGRAM, nice=None)


def meshinfer(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MESHINFER_")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    return run(sys.executable, "-m", "cluster.cli", *arguments, env=environment)


def test_a_dry_run_shows_all_but_the_token(tmp_path: Path) -> None:
    from cluster.tokens import new_secret
    from meshinfer.protocol.token import Token

    text = str(Token("c", "worker", "k" * 40, new_secret(), ()))
    done = meshinfer(
        "worker", "--install", "--dry-run", "--token", text, "--threads", "3", home=tmp_path
    )
    if ROOT.is_relative_to("/tmp") or ROOT.is_relative_to("/root"):
        assert done.returncode == 78
        return
    assert done.returncode == 0, done.stderr
    assert 'MESHINFER_WORKER_THREADS="3"' in done.stdout
    assert "# --- /etc/meshinfer/token (mode 0600)" in done.stdout
    assert text not in done.stdout + done.stderr


@pytest.mark.parametrize("option", [("--state-dir", "x"), ("--forget",), ("--blob-key-file", "x")])
def test_what_a_service_cannot_have_is_refused_and_not_left_out(
    tmp_path: Path, option: tuple[str, ...]
) -> None:
    done = meshinfer("worker", "--install", "--dry-run", *option, home=tmp_path)
    assert done.returncode == 2
    assert f"a service cannot have {option[0]}" in done.stderr


def test_an_empty_token_file_is_told_as_such(tmp_path: Path) -> None:
    """As of the service, where there is no /etc/meshinfer/token."""
    (tmp_path / "token").write_text("\n")
    state = ("--state-dir", str(tmp_path / "state"))
    done = meshinfer("worker", "--token-file", str(tmp_path / "token"), *state, home=tmp_path)
    assert done.returncode == 77
    assert "there is no token in" in done.stderr
    assert "meshinfer token" in done.stderr


# --- install.sh


def test_the_shell_scripts_are_clean() -> None:
    scripts = [DEPLOY / "install.sh", DEPLOY / "try_units", DEPLOY / "docker" / "healthy"]
    done = run(tool("shellcheck"), *map(str, scripts))
    assert done.returncode == 0, done.stdout


def install(tmp_path: Path, *arguments: str, **patches: str) -> subprocess.CompletedProcess[str]:
    """install.sh on a machine where some commands answer otherwise, and Python thinks so too."""
    bin_ = tmp_path / "bin"
    bin_.mkdir(exist_ok=True)
    for name, body in patches.items():
        if name != "python":
            (bin_ / name).write_text(f"#!/bin/sh\n{body}\n")
            (bin_ / name).chmod(0o755)
    (bin_ / "sitecustomize.py").write_text(patches.get("python", ""))
    environment = os.environ | {
        "PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(bin_), "HOME": str(tmp_path),
    }  # fmt: skip
    command = ["sh", str(DEPLOY / "install.sh"), "--prefix", str(tmp_path / "to"), *arguments]
    done = run(*command, env=environment)
    assert done.returncode == 0 or not (tmp_path / "to").exists()
    return done


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        ({"uname": '[ "$1" = -m ] && echo armv7l || echo Linux'}, "32-bit (armv7l)"),
        ({"getconf": "echo 32", "uname": '[ "$1" = -m ] && echo aarch64 || echo Linux'}, "32-bit"),
        ({"uname": '[ "$1" = -m ] && echo riscv64 || echo Linux'}, "no wheels for riscv64"),
        ({"uname": "echo Darwin"}, "runs on Linux"),
        ({"python": "import sys; sys.version_info = (3, 9, 2)"}, "is Python 3.9"),
        ({"python": "import struct; struct.calcsize = lambda _: 4"}, "is 32-bit"),
        ({"python": "import platform; platform.libc_ver = lambda: ('', '')"}, "not to glibc"),
        ({"python": "import platform; platform.libc_ver = lambda: ('glibc', '2.27')"}, "2.27"),
        (
            {"python": "import platform; platform.python_implementation = lambda: 'PyPy'"},
            "is PyPy",
        ),
    ],
)
def test_a_system_that_will_not_do_is_refused_and_left_alone(
    tmp_path: Path, patches: dict[str, str], words: str
) -> None:
    done = install(tmp_path, **patches)
    assert done.returncode == 78
    assert words in done.stderr
    assert done.stderr.startswith("error: ")


def test_what_install_does_not_understand_is_a_usage_error(tmp_path: Path) -> None:
    assert install(tmp_path, "--frm", "x").returncode == 2
    assert install(tmp_path, "--from").returncode == 2
    lone = tmp_path / "install.sh"
    shutil.copy(DEPLOY / "install.sh", lone)
    done = run("sh", str(lone), "--prefix", str(tmp_path / "to"))
    assert done.returncode == 2
    assert "no checkout around" in done.stderr


def test_a_folder_that_is_not_its_own_is_neither_replaced_nor_removed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("years of work")
    for more in ((), ("--uninstall",)):
        done = run("sh", str(DEPLOY / "install.sh"), "--prefix", str(mine), *more)
        assert done.returncode == 78
    assert (mine / "thesis").read_text() == "years of work"


@pytest.mark.slow
def test_it_installs_upgrades_and_removes_for_real(tmp_path: Path) -> None:
    """Asks the package index for all wheels: about two minutes."""
    to = tmp_path / "to"
    command = ["sh", str(DEPLOY / "install.sh"), "--prefix", str(to)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    assert run(str(to / "bin/meshinfer"), "--version").stdout.startswith("meshinfer ")
    assert run(*command, "--uninstall").returncode == 0
    assert not to.exists()


# --- the rest


def test_the_avahi_record_is_what_devices_look_for() -> None:
    group = xml.parse(DEPLOY / "avahi" / "meshinfer.service").getroot()
    service = group.find("service")
    assert service is not None
    assert f"{service.findtext('type')}.local." == SERVICE
    assert service.findtext("port") == str(DEFAULT_PORT)
    record = dict(str(each.text).split("=", 1) for each in service.iter("txt-record"))
    assert record["protocol"] == f"{PROTOCOL[0]}-{PROTOCOL[1]}"
    assert record["join"] == str(DEFAULT_PORT + 1)
    assert set(record) == {"cluster", "protocol", "key", "join"}
    assert str(group.findtext("name")).startswith(f"{record['cluster']}@")


def test_the_compose_files_hold_together() -> None:
    found = yaml.safe_load((DEPLOY / "docker" / "compose.yml").read_text())
    services, names = found["services"], set()
    addresses = [each["networks"]["mesh"]["ipv4_address"] for each in services.values()]
    assert len(set(addresses)) == len(services)
    subnet = found["networks"]["mesh"]["ipam"]["config"][0]["subnet"]
    assert subnet == "172.28.7.0/24"
    assert all(address.startswith("172.28.7.") for address in addresses)
    where = f"{services['coordinator']['networks']['mesh']['ipv4_address']}:{DEFAULT_PORT}"
    host = yaml.safe_load((DEPLOY / "docker" / "host.yml").read_text())["services"]
    for name, each in [*services.items(), *host.items()]:
        assert each["cap_drop"] == ["ALL"]
        assert each["read_only"] is True
        names.add(each["volumes"][0].partition(":")[0])
        assert (ROOT / "deploy/docker" / each["build"]["context"]).resolve() == ROOT
        if name.startswith("worker-"):
            assert each["environment"]["MESHINFER_COORDINATOR"] == where
            assert each["secrets"] == ["token"]
    assert set(found["volumes"]) == names - {"worker"}


def test_the_image_is_of_files_that_are_here_and_of_no_root() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", text, re.MULTILINE):
        for each in source.split():
            assert (ROOT / each).exists(), each
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text


def test_the_container_is_healthy_from_when_its_port_is_listened_at() -> None:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
        healthy = str(DEPLOY / "docker" / "healthy")
        assert run("sh", healthy, port).returncode == 1
        listening.listen()
        assert run("sh", healthy, port).returncode == 0


def test_cloud_init_and_the_playbook_are_yaml_that_names_what_is_there() -> None:
    user_data = (DEPLOY / "cloud-init" / "user-data").read_text()
    assert user_data.startswith("#cloud-config\n")
    found = yaml.safe_load(user_data)
    token = next(each for each in found["write_files"] if each["path"] == "/etc/meshinfer/token")
    assert token["permissions"] == "0600"
    script = found["write_files"][1]
    assert found["runcmd"] == [[script["path"]]]
    assert run("sh", "-n", input=script["content"]).returncode == 0
    yaml.safe_load((DEPLOY / "cloud-init" / "network-config").read_text())
    plays = yaml.safe_load((DEPLOY / "ansible" / "shelf.yml").read_text())
    hosts = yaml.safe_load((DEPLOY / "ansible" / "inventory.example.yml").read_text())
    groups = set(hosts["all"]["children"])
    assert {group for play in plays for group in play["hosts"].split(":")} == groups
