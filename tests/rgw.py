"""Ceph's S3 gateway as tests start it: one monitor, one store in memory, one gateway. Debian: radosgw ceph-mon ceph-osd ceph-base."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from tests.s3_servers import ACCESS_KEY, SECRET_KEY, START_SECONDS, Process, free_port, require, wait_until_it_answers

_RIGHTS = {
    "mon.": [("mon", "allow *")],
    "client.admin": [("mon", "allow *"), ("osd", "allow *")],
    "client.rgw": [("mon", "allow rwx"), ("osd", "allow rwx")],
}

_CEPH_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{monitor}]
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
keyring = {folder}/keyring
run dir = {folder}
pid file =
admin socket =
log file =
mon cluster log file =
log to stderr = false
err to stderr = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 1
[mon]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
keyring = {folder}/osd/keyring
osd objectstore = memstore
memstore device bytes = 2147483648
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw data = {folder}
rgw thread pool size = 32
rgw bucket quota ttl = 0
"""


class Rgw:
    """Ceph's gateway over one monitor and one store that keeps its objects in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._conf = folder / "ceph.conf"
        self._started: list[Process] = []

    def start(self) -> None:
        """The gateway; before its first start, the cluster below it."""
        if not self._started:
            self._start_cluster()
        self._started.append(self._process("radosgw", "-n", "client.rgw"))
        wait_until_it_answers(self.endpoint, self._started[-1])

    def limit(self, user: str, *, max_bytes: int) -> None:
        """Another user, both of whose keys are its name, with room for so many bytes in a bucket."""
        self._run("radosgw-admin", "user", "create", f"--uid={user}", f"--display-name={user}", "--access-key", user, "--secret-key", user)
        self._run("radosgw-admin", "quota", "set", "--quota-scope=bucket", f"--uid={user}", f"--max-size={max_bytes}")
        self._run("radosgw-admin", "quota", "enable", "--quota-scope=bucket", f"--uid={user}")

    def wait_until_counted(self, bucket: str, num_bytes: int) -> None:
        """Until the bucket's statistics, which the gateway keeps up to date in the background, hold what has been stored."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            usage = json.loads(self._run("radosgw-admin", "bucket", "stats", f"--bucket={bucket}"))["usage"]
            if usage.get("rgw.main", {}).get("size", 0) >= num_bytes:
                return
            time.sleep(0.2)
        pytest.fail(f"bucket {bucket}: its statistics do not say {num_bytes} bytes after {START_SECONDS} s")

    def signal(self, number: signal.Signals) -> None:
        self._started[-1].signal(number)

    def stop(self) -> None:
        for process in reversed(self._started):
            process.signal(signal.SIGKILL)

    def _start_cluster(self) -> None:
        folder, fsid, monitor = self._folder, str(uuid.uuid4()), free_port()
        self._conf.write_text(_CEPH_CONF.format(folder=folder, fsid=fsid, monitor=monitor, gateway=self._port))
        keys = str(folder / "keyring")  # cephx stays on: without it the gateway never connects
        self._run("ceph-authtool", "--create-keyring", keys)
        for name, rights in _RIGHTS.items():
            self._run("ceph-authtool", keys, "--gen-key", "-n", name, *(word for right in rights for word in ("--cap", *right)))
        monmap = str(folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{monitor}]", monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keys)
        self._started.append(self._process("ceph-mon", "-i", "a"))
        self._run("ceph", "auth", "import", "-i", keys)
        osd, secret = str(uuid.uuid4()), self._run("ceph-authtool", "--gen-print-key").strip()
        (folder / "osd.json").write_text(f'{{"cephx_secret": "{secret}"}}')
        self._run("ceph", "osd", "new", osd, "-i", str(folder / "osd.json"))
        (folder / "osd").mkdir()
        self._run("ceph-authtool", "--create-keyring", str(folder / "osd" / "keyring"), "--name", "osd.0", "--add-key", secret)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._started.append(self._process("ceph-osd", "-i", "0"))
        self._run(
            "radosgw-admin", "user", "create", "--uid=test", "--display-name=test", "--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY
        )

    def _process(self, program: str, *arguments: str) -> Process:
        return Process(require(program), "-c", str(self._conf), "-f", *arguments, log=self._folder / f"{program}.log")

    def _run(self, program: str, *arguments: str) -> str:
        command = (require(program), "-c", str(self._conf), *arguments)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_SECONDS)
        if done.returncode:
            pytest.fail(f"{' '.join(command[:4])} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout
