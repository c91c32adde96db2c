"""Hosts of their own on one machine, out of Linux namespaces: each has an address, a name,
processes, a file system (a layer over the machine's) and sshd.

All of it hangs on one process: with that one, or with the test's own, everything is gone.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

NET = "10.77.0"
NEEDED = {
    "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "ip": "iproute2",
    "rsync": "rsync", "ssh": "openssh-client", "/usr/sbin/sshd": "openssh-server", "curl": "curl",
    "uv": "uv", "git": "git",
}  # fmt: skip
"""Programs, and the package of each."""
VARIABLES = {
    "HOME": "/home/ubuntu",
    "USER": "ubuntu",
    "LANG": "C.UTF-8",
    "UV_OFFLINE": "1",
    "UV_LINK_MODE": "symlink",
    "UV_PYTHON_DOWNLOADS": "never",
}
INIT = """
set -e
root=$BASE/$NAME/root
mkdir -p $BASE/$NAME/{above,work} $root
mount -t overlay overlay -o lowerdir=/,upperdir=$BASE/$NAME/above,workdir=$BASE/$NAME/work $root
mkdir -p $root/{nfs,shared,home/ubuntu/.ssh,home/ubuntu/.local/bin}
mount --bind $BASE/nfs $root/nfs
mount --rbind /dev $root/dev; mount --rbind /sys $root/sys
mount -t tmpfs -o mode=1777 tmpfs $root/dev/shm
mount -t tmpfs -o mode=1777 tmpfs $root/tmp
mount -t tmpfs tmpfs $root/run; mkdir $root/run/{sshd,postgresql}
mount -t proc proc $root/proc
cp -r $SEED/. $root/
chmod 700 $root/home/ubuntu/.ssh
hostname $NAME
[ ! -d $root/var/lib/stand-in ] || chroot $root docker start
exec chroot $root bash -c '/usr/sbin/sshd; touch /run/started; while :; do sleep 1; done'
"""
STAND_IN = r"""#!/bin/bash
# What a namespace cannot have: other users, a package mirror, NFS, systemd, docker.
data=/var/lib/stand-in bin=$(echo /usr/lib/postgresql/*/bin)
as_postgres() { setpriv --reuid postgres --regid postgres --clear-groups "$@" >> /var/log/stand-in 2>&1; }
case $(basename $0)-$1 in
  sudo-*) exec "$@" ;;
  apt-get-*) ;;
  mount--t) exec /usr/bin/mount --bind /nfs "${@: -1}" ;;
  mount-*) exec /usr/bin/mount "$@" ;;
  systemctl-is-active) kill -0 -- -$(cat /run/$3.unit) 2> /dev/null ;;
  systemctl-stop)
    kill -- -$(cat /run/$2.unit); rm /run/$2.unit
    pkill -f "/$2[ /]|$2[.]" || true ;;  # a control group holds those of other sessions too
  systemd-run-*)
    unit=${1#--unit=}
    while [[ $1 == --* ]]; do shift; done
    setsid bash -c 'echo $$ > /run/$0.unit; while :; do "$@"; sleep 1; done' $unit "$@" \
      < /dev/null > /var/log/$unit 2>&1 & ;;
  journalctl-*) tail -n 20 /var/log/$2 ;;
  docker-inspect) test -d $data ;;
  docker-run)
    for word; do [[ $word == POSTGRES_PASSWORD=* ]] && echo ${word#*=} > /run/password; done
    mkdir $data; chown postgres $data /run/password
    as_postgres $bin/initdb -D $data -U mlflow -A scram-sha-256 --pwfile /run/password
    docker start
    PGPASSWORD=$(cat /run/password) $bin/psql -q -h 127.0.0.1 -U mlflow postgres -c "create database mlflow" ;;
  docker-start) chown postgres /run/postgresql; as_postgres $bin/pg_ctl -w -D $data start -o "-h 127.0.0.1" ;;
  docker-rm) as_postgres $bin/pg_ctl -D $data stop -m fast; rm -r $data ;;
  *) exit 1 ;;
esac
"""  # noqa: E501
NAMES = ["sudo", "apt-get", "mount", "systemctl", "systemd-run", "journalctl", "docker"]


def child(pid: int) -> int:
    """The process that another one, which has one only, has started."""
    for _ in range(100):
        if found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(found[0])
        time.sleep(0.05)
    raise RuntimeError(f"process {pid} started nothing")


class Hosts:
    """The hosts that run while its block does.

    Args:
        folder: an empty one.
        names: the first of them has address `address(name)` 10.77.0.1.
        shared_mb: size of the file system that the stand-in for NFS mounts.
    """

    def __init__(self, folder: Path, names: Sequence[str], shared_mb: int = 512) -> None:
        self.folder, self.names, self.shared_mb = folder, names, shared_mb
        self.init: dict[str, int] = {}

    def address(self, name: str) -> str:
        """Its address."""
        return f"{NET}.{1 + self.names.index(name)}"

    def __enter__(self) -> Self:
        new = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL"]
        with_us = ["setpriv", "--pdeathsig", "KILL"]
        self.outer = subprocess.Popen(
            [*with_us, *new, "sleep", "infinity"], stderr=subprocess.DEVNULL
        )
        try:
            self.first = child(self.outer.pid)
            self.seed()
            self.outside("mount", "-t", "tmpfs", "tmpfs", self.folder)
            self.outside("mkdir", self.nfs)
            self.outside("mount", "-t", "tmpfs", "-o", f"size={self.shared_mb}m", "tmpfs", self.nfs)
            self.outside(*"ip link add bridge type bridge".split())
            self.outside(*"ip link set bridge up".split())
            for name in self.names:
                self.on(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.outer.kill()  # and its child, with which its namespaces' processes and mounts go
        self.outer.wait()

    @property
    def nfs(self) -> Path:
        """Where the shared file system lies, seen with `outside`."""
        return self.folder / "nfs"

    def seed(self) -> None:
        """The files that every host has of its own."""
        seed = self.folder.with_name(self.folder.name + "-seed")
        self.seed_folder = seed
        home = [f"home/ubuntu/{place}" for place in (".ssh", ".local/bin", ".cache")]
        for place in ("etc/ssh", "usr/local/bin", *home):
            (seed / place).mkdir(parents=True)
        keys = seed / "home/ubuntu/.ssh/id_ed25519", seed / "etc/ssh/ssh_host_ed25519_key"
        for key in keys:
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shutil.copy(f"{keys[0]}.pub", keys[0].with_name("authorized_keys"))
        # A user that may do what root may: the first of those with its number.
        users = Path("/etc/passwd").read_text()
        (seed / "etc/passwd").write_text(f"ubuntu:*:0:0::/home/ubuntu:/bin/bash\n{users}")
        lines = [f"{self.address(name)} {name}" for name in self.names]
        (seed / "etc/hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        settings = " ".join(f"{name}={value}" for name, value in VARIABLES.items())
        (seed / "etc/ssh/sshd_config").write_text(
            f"UsePAM no\nStrictModes no\nMaxStartups 100\nSetEnv {settings}\n"
            f"AuthorizedKeysFile /home/ubuntu/.ssh/authorized_keys\n"
        )
        (seed / "usr/local/bin/stand-in").write_text(STAND_IN)
        (seed / "usr/local/bin/stand-in").chmod(0o755)
        for name in NAMES:
            (seed / "usr/local/bin" / name).symlink_to("stand-in")
        python = f"python3.{sys.version_info.minor}"
        # No link: in an environment made from one, Python would find the system's own library.
        own = seed / "usr/local/bin" / python
        own.write_text(f'#!/bin/bash\nexec {sys.base_prefix}/bin/{python} "$@"\n')
        own.chmod(0o755)
        asked = subprocess.run(["uv", "cache", "dir"], check=True, capture_output=True, text=True)
        (seed / "home/ubuntu/.cache/uv").symlink_to(asked.stdout.strip())
        shutil.copy(shutil.which("uv") or "uv", seed / "home/ubuntu/.local/bin/uv")

    def outside(self, *command: object) -> None:
        """Runs a command where the cables and the shared file system lie."""
        words = ["nsenter", "-t", self.first, "-n", "-m", *command]
        subprocess.run([str(word) for word in words], check=True)

    def on(self, name: str) -> None:
        """Starts a host; after `off` with the files that it had, without /tmp, /run and mounts."""
        new = "unshare --net --mount --uts --ipc --pid --fork --kill-child=KILL bash -c".split()
        variables = {"BASE": self.folder, "NAME": name, "SEED": self.seed_folder}
        start = subprocess.Popen(
            ["nsenter", "-t", str(self.first), "-m", "-p", *new, INIT],
            env={"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
            | {key: str(value) for key, value in variables.items()},
            stderr=subprocess.DEVNULL,
        )
        self.init[name] = init = child(child(start.pid))
        self.outside(*f"ip link add {name} type veth peer name eth0 netns {init}".split())
        self.outside(*f"ip link set {name} master bridge up".split())
        enter = ["nsenter", "-t", str(init), "-n", "ip"]
        for command in (
            f"addr add {self.address(name)}/24 dev eth0",
            "link set lo up",
            "link set eth0 up",
            f"route add default via {NET}.254",  # nobody; Ray finds its own address by it
        ):
            subprocess.run([*enter, *command.split()], check=True)
        for _ in range(100):
            if self.path(name, "/run/started").exists():
                return
            time.sleep(0.1)
        raise RuntimeError(f"{name} did not start")

    def path(self, name: str, path: str) -> Path:
        """A path of a host, as it is seen from outside."""
        return Path(f"/proc/{self.init[name]}/root{path}")

    def off(self, name: str) -> None:
        """Pulls the plug."""
        subprocess.run(["kill", "-9", str(self.init[name])], check=True)
        time.sleep(1)  # its network interface goes with the last of its processes

    def cable(self, name: str, state: str) -> None:
        """Pulls the network cable (`down`) or puts it in again (`up`)."""
        self.outside("ip", "link", "set", name, state)

    def start(self, name: str, command: str) -> "subprocess.Popen[str]":
        """Starts a command in a login shell of a host."""
        enter = "-m -u -i -n -p -r -w".split()
        return subprocess.Popen(
            ["nsenter", "-t", str(self.init[name]), *enter, "bash", "-lc", f"cd; {command}"],
            env={**VARIABLES, "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, name: str, command: str, timeout: float = 600
    ) -> "subprocess.CompletedProcess[str]":
        """The same to its end; what it printed is in `stdout`."""
        with self.start(name, command) as process:
            try:
                said, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, said)
