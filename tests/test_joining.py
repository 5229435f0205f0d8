"""Who gets in: tokens, approval, revocation and roles, with the daemons that run on devices."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from oracle import assert_exact
from processes import eventually, image, small_model
from test_cli import command, environment, meshinfer, refused
from test_cli import daemon as begun
from test_daemons import address_of, coordinator_options, daemon, end_of

import meshinfer as mi
from cluster.discovery import announce, browse
from cluster.joining import Wish, enrol
from cluster.keyring import new_keyring, read_keyring
from cluster.keys import generate_keypair
from cluster.profiler import Measured
from cluster.tokens import TOKEN_FILE, leave_token, new_secret, token_for
from cluster.worker import WorkerOptions
from meshinfer.protocol.token import Token, device_id, parse_token

LO = ("127.0.0.1",)
MODEL, IMAGE = small_model(), image()
LONG_S = 30.0


@dataclass(frozen=True)
class Home:
    """A running coordinator that is found over mDNS, and its admin."""

    folder: Path
    cluster: str
    port: int
    join_port: int
    admin: mi.Client

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.join_port}"

    def worker(self, folder: Path, **more: Any) -> WorkerOptions:
        fields: dict[str, Any] = {
            "name": folder.name, "cluster": self.cluster, "state_dir": str(folder),
            "interfaces": LO, "measured": Measured((1e9,), 1e9, 0.0, 0.001), "parent": os.getpid(),
        }  # fmt: skip
        return WorkerOptions(**{**fields, **more})

    def has(self, name: str) -> bool:
        return name in {each.device for each in self.admin.devices()}

    def waits(self, name: str) -> str | None:
        """The id of a device of this name that waits for approval."""
        waiting = self.admin.admitting.listed().waiting
        return next((each.id for each in waiting if each.name == name), None)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home")
    options = coordinator_options(folder, interfaces=LO)
    with daemon("cluster.coordinator", options):
        found = address_of(folder)
        where = f"127.0.0.1:{found['port']}"
        with mi.Client(where, keyring=folder / "keyring.json") as admin:
            yield Home(folder, options.cluster, found["port"], found["join_port"], admin)


def end_after(home: Home, folder: Path, token: Token, **more: Any) -> tuple[int, str]:
    """How a worker ends that comes with this token."""
    leave_token(folder, token)
    with daemon("cluster.worker", home.worker(folder, **more)) as worker:
        return end_of(worker)


# --- tokens


def test_a_token_lets_one_device_in_which_needs_it_no_more(home: Home, tmp_path: Path) -> None:
    token = home.admin.admitting.token()
    leave_token(tmp_path / "a", token)
    for _ in range(2):
        with daemon("cluster.worker", home.worker(tmp_path / "a")) as worker:
            assert eventually(lambda: home.has("a"), LONG_S)
            assert not (tmp_path / "a" / TOKEN_FILE).exists()
            worker.terminate()
            assert end_of(worker)[0] == 0
        assert eventually(lambda: not home.has("a"), LONG_S)
    on_disk = [path.read_bytes() for path in home.folder.rglob("*") if path.is_file()]
    assert on_disk and not any(token.secret in data for data in on_disk), "its hash is enough"
    code, words = end_after(home, tmp_path / "thief", token)
    assert code == 77 and "not valid" in words and "meshinfer token" in words
    assert str(token) not in words and not home.has("thief")
    ring = read_keyring(tmp_path / "a" / "keyring.json")
    assert (ring.role, ring.name, ring.cluster) == ("worker", "a", home.cluster)
    assert (tmp_path / "a" / "keyring.json").stat().st_mode & 0o777 == 0o600


def test_a_reusable_token_lets_any_number_in_until_it_expires(home: Home, tmp_path: Path) -> None:
    token = home.admin.admitting.token(reusable=True)
    old = home.admin.admitting.token(reusable=True, ttl_s=0.0)
    leave_token(tmp_path / "r-1", token)
    leave_token(tmp_path / "r-2", token)
    with (
        daemon("cluster.worker", home.worker(tmp_path / "r-1")),
        daemon("cluster.worker", home.worker(tmp_path / "r-2")),
    ):
        assert eventually(lambda: home.has("r-1") and home.has("r-2"), LONG_S)
    code, words = end_after(home, tmp_path / "late", old)
    assert code == 77 and "expired" in words


def test_a_token_that_is_refused_for_good_is_forgotten(home: Home, tmp_path: Path) -> None:
    """Of who never joined, which then waits, and of who had joined before, which goes on."""
    old = home.admin.admitting.token(reusable=True, ttl_s=0.0)
    code, words = end_after(home, tmp_path / "never", old)
    assert code == 77 and "forgotten" in words and "waits to be approved" in words
    assert not (tmp_path / "never" / TOKEN_FILE).exists()
    with daemon("cluster.worker", home.worker(tmp_path / "never")):
        assert eventually(lambda: home.waits("never") is not None, LONG_S)
    leave_token(tmp_path / "in", home.admin.admitting.token())
    with daemon("cluster.worker", home.worker(tmp_path / "in")):
        assert eventually(lambda: home.has("in"), LONG_S)
    code, words = end_after(home, tmp_path / "in", home.admin.admitting.token("client"))
    assert code == 77 and "for a client" in words and "let in before" in words
    with daemon("cluster.worker", home.worker(tmp_path / "in")):
        assert eventually(lambda: home.has("in"), LONG_S)


def test_a_token_that_may_be_good_later_is_kept(home: Home, tmp_path: Path) -> None:
    """Where nobody answers, and where another has the name; that one is revoked, and it is in."""
    good = home.admin.admitting.token()
    nobody = replace(good, cluster=f"nobody-{os.getpid()}", places=("127.0.0.1:1",))
    leave_token(tmp_path / "alone", nobody)
    options = home.worker(tmp_path / "alone", cluster=nobody.cluster)
    with daemon("cluster.worker", options) as worker:
        assert worker.stderr is not None
        while "no coordinator yet" not in (line := worker.stderr.readline()):
            assert line, "it ended"
    assert (tmp_path / "alone" / TOKEN_FILE).exists()
    leave_token(tmp_path / "of-name", home.admin.admitting.token())
    with daemon("cluster.worker", home.worker(tmp_path / "of-name")):
        assert eventually(lambda: home.has("of-name"), LONG_S)
    second = tmp_path / "another" / "of-name"
    code, words = end_after(home, second, good)
    assert code == 77 and "belongs to another key" in words and (second / TOKEN_FILE).exists()
    home.admin.admitting.revoke("of-name")
    with daemon("cluster.worker", home.worker(second)):
        assert eventually(lambda: home.has("of-name"), LONG_S)


def test_a_token_of_another_coordinator_ends_with_what_is_wrong(home: Home, tmp_path: Path) -> None:
    """It names another key: whoever answers instead is not told the secret."""
    ring, _ = new_keyring(home.cluster)
    strange = token_for(ring, "worker", new_secret(), (home.place,))
    code, words = end_after(home, tmp_path / "lost", strange, interfaces=())
    assert code == 77 and "does not hold the key that the token names" in words


def test_what_a_token_is_for_is_all_that_it_is_good_for(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, words = end_after(home, tmp_path / "w", home.admin.admitting.token("client"))
    assert code == 77 and "for a client" in words
    posing = replace(home.admin.admitting.token("client"), role="worker")
    code, words = end_after(home, tmp_path / "w", posing)
    assert code == 77 and "not valid" in words
    monkeypatch.setenv("MESHINFER_STATE_DIR", str(tmp_path / "me"))
    with pytest.raises(mi.AuthError, match="for a worker"):
        mi.Client(token=str(home.admin.admitting.token()))


def test_a_liar_on_mdns_who_names_the_right_key_keeps_nobody_from_joining(
    home: Home, tmp_path: Path
) -> None:
    """1. It announces itself with the true coordinator's key; 2. a worker joins all the same, and
    3. finds the way again when it starts anew and has forgotten the place."""
    key = read_keyring(home.folder / "keyring.json").coordinator_public
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        liar = announce(
            home.cluster, port, key=key, join_port=port, protocol=(1, 9), interfaces=list(LO)
        )
        try:
            leave_token(tmp_path / "led", replace(home.admin.admitting.token(), places=()))
            for _ in range(2):
                with daemon("cluster.worker", home.worker(tmp_path / "led")) as worker:
                    assert eventually(lambda: home.has("led"), LONG_S)
                    worker.terminate()
                    assert end_of(worker)[0] == 0
                assert eventually(lambda: not home.has("led"), LONG_S)
                (tmp_path / "led" / "place.json").unlink(missing_ok=True)
        finally:
            liar.close()


def test_a_liar_on_mdns_whose_key_nobody_has_is_passed_over_by_who_has_no_token(
    home: Home, tmp_path: Path
) -> None:
    key = generate_keypair().public
    places = {"join_port": home.join_port, "protocol": (1, 9), "interfaces": list(LO)}
    # By its port another service; of one name there would be a race, or only one.
    liar = announce(home.cluster, home.join_port, key=key, **places)  # type: ignore[arg-type]
    try:
        assert len(browse(home.cluster, timeout_s=LONG_S, interfaces=LO, until=2)) == 2
        with daemon("cluster.worker", home.worker(tmp_path / "misled")):
            assert eventually(lambda: home.waits("misled") is not None, LONG_S)
    finally:
        liar.close()


# --- approval


def test_without_a_token_a_device_waits_until_it_is_approved(home: Home, tmp_path: Path) -> None:
    with daemon("cluster.worker", home.worker(tmp_path / "p")) as worker:
        assert eventually(lambda: home.waits("p") is not None, LONG_S)
        own = home.waits("p")
        assert own is not None and not home.has("p")
        assert worker.stderr is not None
        while f"meshinfer devices approve {own}" not in (line := worker.stderr.readline()):
            assert line, "it ended"
        with pytest.raises(mi.InvalidInput):
            home.admin.admitting.approve("zzzz-zzzz")
        (admission,) = home.admin.admitting.approve(own[:9])
        assert (admission.name, admission.role) == ("p", "worker")
        assert device_id(admission.key) == own
        assert eventually(lambda: home.has("p"), LONG_S)
        assert home.waits("p") is None


def test_where_too_many_wait_one_more_is_told_so_and_when_to_ask_again(tmp_path: Path) -> None:
    """1. Two wait, and there is room for two; 2. a third hears that it is full and for how long,
    and 3. so says a worker, that asks again and waits as soon as one of the two is let in."""
    options = coordinator_options(tmp_path / "c", cluster=f"full-{os.getpid()}", interfaces=LO)
    room = "from meshinfer import limits\nlimits.WAITING_KEYS, limits.WAITS_S = 2, 300.0"
    with daemon("cluster.coordinator", options, room):
        found = address_of(tmp_path / "c")
        ring = tmp_path / "c" / "keyring.json"
        wish = Wish(
            options.cluster, "worker", "one", read_keyring(ring).coordinator_public,
            places=(f"127.0.0.1:{found['join_port']}",), interfaces=(), patience_s=2.0,
        )  # fmt: skip
        for name in ("one", "two"):
            with pytest.raises(mi.ClusterUnavailable):
                enrol(generate_keypair(), replace(wish, name=name))
        with pytest.raises(mi.QueueFull, match="too many devices wait") as told:
            enrol(generate_keypair(), replace(wish, name="three"))
        assert told.value.retry_after_s == 300.0 and "approve" in told.value.hint
        with mi.Client(f"127.0.0.1:{found['port']}", keyring=ring) as admin:
            waits = {each.name: each.id for each in admin.admitting.listed().waiting}
            assert set(waits) == {"one", "two"}
            three = WorkerOptions(
                name="three", cluster=options.cluster, state_dir=str(tmp_path / "three"),
                interfaces=LO, parent=os.getpid(),
            )  # fmt: skip
            soon = "from meshinfer import limits\nlimits.WAITS_S = 0.2"
            with daemon("cluster.worker", three, soon) as worker:
                assert worker.stderr is not None
                while "asks again to join" not in (line := worker.stderr.readline()):
                    assert line, "it ended"
                assert "too many devices wait" in line and "approve" in line
                admin.admitting.approve(waits["one"])
                assert eventually(
                    lambda: "three" in {w.name for w in admin.admitting.listed().waiting}, LONG_S
                )


def test_a_device_that_is_told_whom_to_trust_asks_nobody_else(home: Home, tmp_path: Path) -> None:
    key = read_keyring(home.folder / "keyring.json").coordinator_public
    other = home.worker(tmp_path / "picky", coordinator_id="aaaa-bbbb")
    with daemon("cluster.worker", other) as worker:
        assert worker.stderr is not None
        while "no coordinator yet" not in (line := worker.stderr.readline()):
            assert line, "it ended"
            assert "trusted" not in line
        assert home.waits("picky") is None
    right = home.worker(tmp_path / "sure", coordinator_id=device_id(key)[:9])
    with daemon("cluster.worker", right):
        assert eventually(lambda: home.waits("sure") is not None, LONG_S)


def test_a_copied_state_folder_is_another_device_and_cannot_take_its_name(
    home: Home, tmp_path: Path
) -> None:
    """1. A card is copied to another machine; 2. there it says so and asks anew, with a new id;
    3. approved, it would have the name of the first: it is refused, which lives on."""
    leave_token(tmp_path / "card", home.admin.admitting.token())
    elsewhere = "import cluster.identity\ncluster.identity.machine_id = lambda: 'another'"
    with daemon("cluster.worker", home.worker(tmp_path / "card")):
        assert eventually(lambda: home.has("card"), LONG_S)
        (tmp_path / "copy").mkdir()
        shutil.copytree(tmp_path / "card", tmp_path / "copy" / "card")
        first = read_keyring(tmp_path / "card" / "keyring.json").key.public
        copy = home.worker(tmp_path / "copy" / "card")
        with daemon("cluster.worker", copy, elsewhere) as clone:
            code, words = end_of(clone)
        assert code == 77 and "another machine" in words
        assert "'card' belongs to another key" in words and "revoke" in words
        fresh = json.loads((tmp_path / "copy" / "card" / "identity.json").read_text())
        assert fresh["key"]["public"] != first
        assert home.has("card")


# --- revocation


def test_a_revoked_device_is_out_at_once_and_others_answer_what_it_was_at(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """1. Requests run on three devices; 2. one is revoked; 3. all answers are right; 4. its process
    ends, and is not started again."""
    with mi.LocalCluster(3, speeds=[0.2, 0.2, 0.2]) as cluster, cluster.client() as client:
        client.deploy("net", MODEL, spread=True)
        client.infer("net", IMAGE)
        worker = cluster._worker(0)
        futures = [client.submit("net", IMAGE) for _ in range(8)]
        (gone,) = client.admitting.revoke("worker-0")
        assert gone.name == "worker-0"
        for future in futures:
            assert_exact(MODEL, IMAGE, future.result(LONG_S).outputs)
        assert worker.name == "worker-0" and worker.supervisor.wait(LONG_S) == 77
        words = capfd.readouterr().err
        assert "revoked" in words and "again in" not in words
        assert "worker-0" not in {each.device for each in client.devices()}
        assert_exact(MODEL, IMAGE, client.infer("net", IMAGE).outputs)


def test_the_coordinators_own_keys_cannot_be_revoked(home: Home) -> None:
    for name in ("head", read_keyring(home.folder / "keyring.json").name):
        with pytest.raises(mi.ConfigurationError, match="stays"):
            home.admin.admitting.revoke(name)


def test_what_was_admitted_and_revoked_is_so_after_a_restart() -> None:
    with mi.LocalCluster(2) as cluster:
        with cluster.client() as client:
            client.admitting.revoke("worker-0")
        assert cluster._worker(0).supervisor.wait(LONG_S) == 77
        cluster.restart_coordinator()
        with cluster.client(timeout_s=LONG_S) as client:
            assert eventually(
                lambda: "worker-1" in {each.device for each in client.devices()}, LONG_S
            )
            names = {each.name for each in client.admitting.listed().members}
            assert "worker-1" in names and "worker-0" not in names


# --- clients elsewhere


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Be at another machine, as far as state goes."""
    monkeypatch.delenv("MESHINFER_KEYRING", raising=False)

    def go(host: str) -> None:
        monkeypatch.setenv("MESHINFER_STATE_DIR", str(tmp_path / host))

    return go


def test_a_client_joins_by_a_token_and_may_ask_but_not_deploy(
    home: Home, elsewhere: Callable[[str], None]
) -> None:
    text = str(home.admin.admitting.token("client"))
    elsewhere("laptop")
    for _ in range(2):  # once joined, the token is not needed, and does no harm
        with mi.Client(token=text, interfaces=LO) as client:
            assert client.role == "client" and "head" in {d.device for d in client.devices()}
            for forbidden in (
                lambda: client.deploy("net", MODEL),
                lambda: client.admitting.token(),
                lambda: client.admitting.revoke("head"),
            ):
                with pytest.raises(mi.AuthError, match="needs the role admin"):
                    forbidden()
    with mi.Client(cluster=home.cluster, interfaces=LO) as client:
        assert client.devices()
    elsewhere("thief")
    with pytest.raises(mi.AuthError, match="not valid"):
        mi.Client(token=text, interfaces=LO)


def test_a_revoked_client_is_told_so(home: Home, elsewhere: Callable[[str], None]) -> None:
    elsewhere("tablet")
    token = str(home.admin.admitting.token("client"))
    with mi.Client(token=token, interfaces=LO) as client:
        own = read_keyring(_ring_of(home)).name
        assert client.devices()
        home.admin.admitting.revoke(own)
        for _ in range(2):  # what it has asked, and what it asks when it is over
            with pytest.raises(mi.AuthError):
                client.devices()
    with pytest.raises(mi.AuthError):
        mi.Client(cluster=home.cluster, interfaces=LO)


def _ring_of(home: Home) -> Path:
    return Path(os.environ["MESHINFER_STATE_DIR"]) / f"client-{home.cluster}" / "keyring.json"


# --- as people do it


@pytest.mark.parametrize("way", ["stdin", "environment", "file", "flag"])
def test_a_token_is_in_no_argument_of_a_daemon_nor_in_its_environment_nor_in_a_log(
    home: Home, tmp_path: Path, way: str
) -> None:
    text = str(home.admin.admitting.token())
    (tmp_path / "given").write_text(text + "\n")
    given = {"stdin": ["--token", "-"], "flag": ["--token", text], "environment": []}
    more = given.get(way, ["--token-file", str(tmp_path / "given")])
    variables = {"MESHINFER_TOKEN": text} if way == "environment" else {}
    name = f"by-{way}"
    line = command("worker", *more, "--name", name, "--threads", 1, "--interface", LO[0])
    with (tmp_path / "log").open("w") as log:
        worker = subprocess.Popen(
            line, cwd=tmp_path, stdin=subprocess.PIPE, stderr=log, text=True,
            env={**environment(tmp_path), **variables},
        )  # fmt: skip
    try:
        worker.stdin.write(text + "\n")  # type: ignore[union-attr]
        worker.stdin.close()  # type: ignore[union-attr]
        assert eventually(lambda: home.has(name), LONG_S)
        for process in Path("/proc").glob("[0-9]*"):
            for of in ("cmdline", "environ"):
                try:
                    found = (process / of).read_bytes()
                except OSError:
                    continue
                assert text.encode() not in found, (process, of)
    finally:
        worker.terminate()
        worker.wait(LONG_S)
    assert text not in (tmp_path / "log").read_text()


LINE = re.compile(r"meshinfer (worker --token mi1\.[A-Za-z0-9_-]+)")


def test_the_line_that_the_coordinator_prints_adds_a_device(tmp_path: Path) -> None:
    """1. A coordinator says a line, with a QR code; 2. pasted on a Pi, it adds it; 3. a second Pi
    waits, is approved by its id, and 4. is revoked by its name; 5. the first restarts as it is."""
    here, pi = tmp_path / "here", tmp_path / "pi"
    here.mkdir()
    pi.mkdir()
    alone = ("--host", LO[0], "--port", 0, "--no-compute", "--interface", LO[0], "--qr")
    name = f"line-{os.getpid()}"
    with begun(here, "coordinator", "--cluster", name, *alone):
        logs = lambda: "".join(p.read_text() for p in here.glob("coordinator-*.log"))  # noqa: E731
        assert eventually(lambda: "█" in logs(), LONG_S)
        words = LINE.search(logs())
        assert words is not None
        admin = ("--cluster", name, "--interface", LO[0])

        def devices() -> str:
            return meshinfer(here, "devices", *admin).stdout

        known = ("--name", "pi-0", "--threads", 1, "--interface", LO[0])
        with begun(pi, *words[1].split(), *known):
            assert eventually(lambda: "pi-0" in devices(), LONG_S)
        with begun(pi, "worker", *known):  # no token, and no cluster: there is but one
            assert eventually(lambda: "pi-0" in devices(), LONG_S)
        with begun(pi, "worker", "--cluster", name, "--name", "pi-1", *known[2:]) as second:
            assert eventually(lambda: "pi-1" in meshinfer(
                here, "devices", "--waiting", *admin).stdout, LONG_S)  # fmt: skip
            (waiting,) = json.loads(
                meshinfer(here, "devices", "--waiting", "--json", *admin).stdout
            )
            done = meshinfer(here, "devices", "approve", waiting["id"], *admin)
            assert done.returncode == 0 and "pi-1" in done.stdout
            assert eventually(lambda: "pi-1" in devices(), LONG_S)
            done = meshinfer(here, "devices", *admin, "revoke", "pi-1")  # options may come first
            assert done.returncode == 0 and "revoked worker pi-1" in done.stdout
            assert second.wait(LONG_S) == 77
        refused(meshinfer(here, "devices", "revoke", "nobody-here", *admin), 2, "nobody-here")


def test_where_nobody_waits_that_is_said_with_what_to_do(home: Home, tmp_path: Path) -> None:
    admin = ("--coordinator", home.address, "--keyring", home.folder / "keyring.json")
    assert eventually(lambda: not home.admin.admitting.listed().waiting, LONG_S)
    done = meshinfer(tmp_path, "devices", "--waiting", *admin)
    assert (done.returncode, done.stdout) == (0, "")
    assert "nobody waits" in done.stderr and "meshinfer token" in done.stderr
    done = meshinfer(tmp_path, "devices", "--waiting", "--json", *admin)
    assert json.loads(done.stdout) == [] and not done.stderr


def test_tokens_by_command(home: Home, tmp_path: Path) -> None:
    admin = ("--coordinator", home.address, "--keyring", home.folder / "keyring.json")
    made = meshinfer(tmp_path, "token", "--role", "client", "--ttl", "90s", "--qr", *admin)
    assert made.returncode == 0 and "▄" in made.stderr
    token = parse_token(made.stdout)
    assert (token.role, token.cluster) == ("client", home.cluster) and home.place in token.places
    told = meshinfer(tmp_path, "token", "--reusable", "--json", *admin)
    fields = json.loads(told.stdout)
    assert fields["reusable"] and fields["role"] == "worker" and fields["ttl_s"] == 900.0
    assert fields["command"] == f"meshinfer worker --token {fields['token']}"
    joined = meshinfer(tmp_path, "join", made.stdout.strip(), "--interface", LO[0])
    assert joined.returncode == 0 and str(tmp_path) in joined.stderr
    own = ("--cluster", home.cluster, "--interface", LO[0])
    assert "head" in meshinfer(tmp_path, "devices", *own).stdout
    refused(meshinfer(tmp_path, "token", *own), 77, "needs the role admin")
    refused(meshinfer(tmp_path, "token", "--ttl", "0", *admin), 2, "no time")
    refused(meshinfer(tmp_path, "token", "--role", "king", *admin), 2, "no role")
    refused(meshinfer(tmp_path, "join", "mi1.nonsense"), 77, "damaged")
    refused(meshinfer(tmp_path, "join"), 2, "no token")
