"""Two hosts on one machine: network, mount, pid, IPC and UTS namespaces with an address, a name, /tmp and /dev/shm of their own.

They share /mnt/shared and see the installation; /mnt/own is each host's. Nothing is made outside of the namespaces, and all of it
goes with the process that made it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
UNSHARE = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
INIT = """
set -e
hostname "qurl-$1"
mount --make-rprivate /
mount -t proc proc /proc
mount --bind "$3" /srv  # a checkout below /tmp or /mnt would be hidden
mount -t tmpfs tmpfs /mnt
mkdir /mnt/shared /mnt/own
mount --bind "$2" /mnt/shared
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs tmpfs /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm
mkdir -p "$3"
mount --bind /srv "$3"
ip link set lo up
echo ready
cat > /dev/null  # until the test ends, in whatever way
"""
QUIET = {
    "RAY_AUTH_MODE": "disabled", "RAY_enable_metrics_collection": "0", "RAY_raylet_start_wait_time_s": "120",
    "RAY_worker_niceness": "0", "RAY_prestart_worker_first_driver": "0",
}  # fmt: skip


def missing_permission() -> str:
    """Why namespaces cannot be made here; "" where they can."""
    try:
        done = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, timeout=30)
        subprocess.run(["ip", "-V"], capture_output=True, timeout=30)
    except OSError as error:
        return f"{error.filename} is not installed"
    return done.stderr.strip()


class Hosts:
    """Context manager: hosts "a" and "b". shared: what both see as /mnt/shared."""

    def __init__(self, shared: Path):
        self._shared = shared
        self._inits: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Hosts:
        names = "".join(f"{address} qurl-{name}\n" for name, address in ADDRESSES.items())
        (self._shared / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        for name in ADDRESSES:
            init = subprocess.Popen(
                [*UNSHARE, "bash", "-c", INIT, "init", name, str(self._shared), str(ROOT)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            self._inits[name] = init
            assert init.stdout is not None and init.stdout.readline() == "ready\n"
        pids = {name: str(self._pid(name)) for name in ADDRESSES}
        link = ["ip", "link", "add", "link0", "netns", pids["a"], "type", "veth", "peer", "name", "link0", "netns", pids["b"]]
        subprocess.run(link, check=True)
        for name, address in ADDRESSES.items():
            self.run(name, "ip", "addr", "add", f"{address}/24", "dev", "link0")
            self.run(name, "ip", "link", "set", "link0", "up")
        return self

    def __exit__(self, *exception: object) -> None:
        for init in self._inits.values():
            init.kill()  # with --kill-child all processes of the host end with it
            init.wait()

    def run(self, name: str, *command: str, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command on a host, with its output."""
        shell = ["sh", "-c", 'cd /mnt/own && exec "$@"', "sh"]
        namespaces = ["nsenter", "-t", str(self._pid(name)), "-m", "-u", "-i", "-n", "-p", *shell]
        path = f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"
        environment = {**os.environ, **QUIET, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": "/tmp"}
        done = subprocess.run(
            [*namespaces, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            stdin=subprocess.DEVNULL, timeout=timeout,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done

    def start_ray(self) -> None:
        """A Ray node on each; that on "a" is the head."""
        common = ["--num-cpus", "2", "--object-store-memory", "150000000", "--disable-usage-stats"]
        head = ["--head", "--port", "6379", "--include-dashboard", "false", "--node-ip-address", ADDRESSES["a"]]
        self._ray("a", *head, *common)
        self._ray("b", "--address", f"{ADDRESSES['a']}:6379", "--node-ip-address", ADDRESSES["b"], *common)

    def _ray(self, name: str, *options: str) -> None:
        self.run(name, str(Path(sys.executable).with_name("ray")), "start", *options)

    def _pid(self, name: str) -> int:
        """The first process of the host, as seen from here."""
        parent = self._inits[name].pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])
