"""A cluster of one's own hosts, made by `ray up` as docs/cluster.md says, and what befalls it, in
this order: a study with a worker on each of two hosts, a killed raylet, a paused and replaced
worker, a rebooted host, hosts without /shared, a cable that is out for two minutes, a full /shared,
`ray down`.

Half an hour on two idle cores: `uv run pytest -n 0 -m hosts`.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.hosts.namespaces import NEEDED, VARIABLES, Hosts
from tests.small import OPTIONS
from tests.test_cluster_yaml import ROOT, instead

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1800)]
WORKERS = ["w1", "w2"]
RUNS = "/shared/flowerray/runs"
SMALL = {name: value for name, value in OPTIONS.items() if not name.startswith("resources.")} | {
    "train.epochs": 10,
    "data.synthetic.classes": 6,
    "data.synthetic.scale": 0.02,
    "data.synthetic.size": 48,
}
WORKER = "--resources.cpus-per-worker 2 --resources.workers"
TWO = f"{WORKER} 2"
"""One on each host."""


def why_not() -> str | None:
    """What this machine lacks."""
    if os.geteuid():
        return "needs root"
    for program, package in NEEDED.items():
        if shutil.which(program) is None:
            return f"{program} is missing: install {package}"
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        return "PostgreSQL's initdb is missing: install postgresql"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"]).returncode:
        return "Linux namespaces are not allowed here"
    if Path(sys.base_prefix).is_relative_to("/tmp"):
        return "this Python lies below /tmp, of which each host has its own"
    return None


def copy_of_the_repository(to: Path) -> None:
    """Its files that git knows or would take, with cluster.yaml changed as its comments say."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split():
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    config = instead("#local ", "available_node_types", "head_node_type")
    config["provider"] |= {"head_ip": "10.77.0.1", "worker_ips": ["10.77.0.2", "10.77.0.3"]}
    text = yaml.safe_dump(config, width=10_000).replace("NFS_SERVER", "10.77.0.1")
    own = f"--python {platform.python_version()}"  # nothing can be fetched
    (to / "cluster.yaml").write_text(re.sub(r"--python 3\.\d+\.\d+", own, text))


def fill_the_cache(folder: Path) -> None:
    """Has uv fetch once, with the network, what the hosts install without one."""
    copy_of_the_repository(folder)
    python = platform.python_version()
    version = subprocess.run(
        [sys.executable, "-c", "import mlflow; print(mlflow.__version__)"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "UV_OFFLINE")}
    environment |= {"UV_LINK_MODE": "symlink", "UV_TOOL_DIR": f"{folder}/tools"}
    for command in (
        f"uv sync -q --no-dev --python {python}",
        "uv pip install -q boto3",
        f"uv tool install -q --python {python} --with psycopg2-binary mlflow=={version}",
    ):
        done = subprocess.run(
            command.split(),
            cwd=folder, env={**environment, "UV_TOOL_BIN_DIR": f"{folder}/bin"},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"`{command}` failed: {done.stderr.strip()[-300:]}")


def until(true: Callable[[], Any], seconds: float, what: str, every: float = 0.5) -> None:
    """Waits for something to become true; looks `every` so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(every)


class Cluster:
    """Three hosts and the laptop of whoever uses them."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts

    def laptop(self, command: str) -> "subprocess.Popen[str]":
        """Starts a command in the clone's folder, with the environment of docs/cluster.md."""
        settings = "RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"
        return self.hosts.start(
            "laptop", f"cd ~/flowerray && . .venv/bin/activate && export {settings} && {command}"
        )

    def do(self, command: str) -> str:
        """The same to its end, which has to be a good one."""
        with self.laptop(command) as process:
            said, _ = process.communicate(timeout=1500)
        assert process.returncode == 0, said
        return said

    def submit(self, job: str, name: str, *options: object) -> "subprocess.Popen[str]":
        """Submits a job that trains into RUNS/name."""
        given = [word for option in SMALL.items() for word in (f"--{option[0]}", option[1])]
        words = ["python", f"jobs/{job}.py", *given, *options, "--out", f"{RUNS}/{name}"]
        return self.laptop("ray job submit --working-dir . -- " + " ".join(map(str, words)))

    def file(self, name: str) -> Path:
        """A file or folder below RUNS, seen from here."""
        return self.hosts.path("head", f"/nfs/flowerray/runs/{name}")

    def records(self, name: str) -> list[dict[str, Any]]:
        """What a training has written so far."""
        metrics = self.file(name) / "metrics.jsonl"
        text = metrics.read_text() if metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def until_epoch(self, name: str, epoch: int) -> None:
        """Waits until a training has come so far."""
        until(lambda: any(r["epoch"] >= epoch for r in self.records(name)), 600, f"{name} {epoch}")

    def result(self, name: str) -> tuple[bytes, list[tuple[float | None, ...]]]:
        """What equal trainings have equal bits in: the model, and the losses."""
        (model,) = self.file(name).glob("*.pth")
        known = "train/loss", "epoch/loss", "val/map_at_r"
        told = [(r["step"], *(r["metrics"].get(k) for k in known)) for r in self.records(name)]
        return model.read_bytes(), told

    def trains(self, host: str) -> bool:
        """Whether a training worker runs there."""
        return self.hosts.run(host, "pgrep -f [R]ayTrainWorker").returncode == 0

    def nodes(self) -> int:
        """How many hosts of the cluster Ray knows to be up."""
        code = "import ray; ray.init('auto', logging_level='ERROR'); print(len(ray.nodes()), "
        code += "sum(node['Alive'] for node in ray.nodes()))"
        said = self.hosts.run(
            "head", f'RAY_AUTH_MODE=token ~/flowerray/.venv/bin/python -c "{code}"'
        ).stdout
        return int(said.split()[-1]) if said.strip() and said.split()[-1].isdigit() else 0

    @contextmanager
    def tunnel(self) -> Iterator[None]:
        """`ray dashboard`, left open."""
        with self.laptop("exec ray dashboard cluster.yaml") as process:
            try:
                until(
                    lambda: self.hosts.run("laptop", "curl -s 127.0.0.1:8265").returncode == 0,
                    60,
                    "the tunnel to the dashboard",
                )
                yield
            finally:
                process.terminate()


def finished(job: "subprocess.Popen[str]", status: int = 0) -> str:
    """What a job printed; it has to end so."""
    said, _ = job.communicate(timeout=1500)
    assert job.returncode == status, said[-5000:]
    return said


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """It is up."""
    if why := why_not():
        pytest.skip(why)
    fill_the_cache(tmp_path_factory.mktemp("cache"))
    with Hosts(tmp_path_factory.mktemp("hosts"), ["head", *WORKERS, "laptop"]) as hosts:
        cluster = Cluster(hosts)
        copy_of_the_repository(hosts.path("laptop", VARIABLES["HOME"]) / "flowerray")
        python = platform.python_version()
        done = hosts.run("laptop", f"cd ~/flowerray && ~/.local/bin/uv sync -q --python {python}")
        assert done.returncode == 0, done.stdout
        cluster.do("(umask 077; ray get-auth-token --generate)")
        cluster.do("RAY_UP_enable_autoscaler_v2=0 ray up -y cluster.yaml")
        until(lambda: cluster.nodes() == 3, 240, "all hosts have joined", 5)
        with cluster.tunnel():
            yield cluster


@pytest.fixture(scope="module")
def calm(cluster: Cluster) -> tuple[bytes, list[tuple[float | None, ...]]]:
    """What a training on two hosts gives that nothing disturbs."""
    finished(cluster.submit("train_triplet", "calm", TWO))
    return cluster.result("calm")


def test_mlflow_answers_on_the_head_alone(cluster: Cluster) -> None:
    assert cluster.hosts.run("head", "curl -sf http://127.0.0.1:5000/health").stdout == "OK"
    for port in (5000, 5432, 8265):
        answer = cluster.hosts.run("w1", f"curl -sm 5 http://10.77.0.1:{port}/health")
        assert answer.returncode == 7  # nobody listens


def test_a_study_with_a_worker_on_each_of_two_hosts(cluster: Cluster) -> None:
    job = cluster.submit(
        "tune_triplet",
        "study",
        "--trials 2 --max-concurrent 1 --workers-per-trial 2 --cpus-per-trial 4",
        "--confirm-seeds 0 --train.epochs 2",
    )
    until(lambda: all(map(cluster.trains, WORKERS)), 300, "a worker on each host")
    said = finished(job)
    assert "2 trials (2 complete" in said and "models:/flowerray-triplet@champion" in said
    assert len(list((cluster.file("study") / "trials").glob("*/*.pth"))) == 2


def test_a_killed_raylet(cluster: Cluster, calm: Any) -> None:
    job = cluster.submit("train_triplet", "killed", TWO)
    cluster.until_epoch("killed", 3)
    cluster.hosts.run("w2", "pkill -9 raylet")
    finished(job)
    assert cluster.result("killed") == calm


def test_a_paused_and_replaced_worker_writes_no_more(cluster: Cluster) -> None:
    finished(cluster.submit("train_triplet", "alone", f"{WORKER} 1"))
    job = cluster.submit("train_triplet", "paused", f"{WORKER} 1")
    cluster.until_epoch("paused", 3)
    (host,) = filter(cluster.trains, WORKERS)
    attempt = cluster.file("paused") / ".attempt"
    before = attempt.read_text()
    worker = cluster.hosts.run(host, "pgrep -f [R]ayTrainWorker").stdout.split()[0]
    cluster.hosts.run(host, "kill -STOP -1")
    until(lambda: attempt.read_text() != before, 300, "another worker takes over")
    cluster.until_epoch("paused", 4)
    cluster.hosts.run(host, f"kill -CONT {worker}")
    time.sleep(10)  # it goes on, before its raylet learns that it counts as dead
    cluster.hosts.run(host, "kill -CONT -1")
    finished(job)
    assert cluster.result("paused") == cluster.result("alone")


def test_a_rebooted_host_mounts_the_shared_folder_and_joins(cluster: Cluster) -> None:
    cluster.hosts.off("w1")
    until(lambda: cluster.nodes() == 2, 120, "w1 is missed", 5)
    cluster.hosts.on("w1")
    until(lambda: cluster.nodes() == 3, 240, "w1 is back", 5)
    assert cluster.hosts.run("w1", "mountpoint /shared").returncode == 0


def test_hosts_without_the_shared_folder_are_named(cluster: Cluster) -> None:
    for host in WORKERS:
        assert cluster.hosts.run(host, "umount -l /shared").returncode == 0
    said = finished(cluster.submit("train_triplet", "blind", TWO), status=1)
    for host in WORKERS:
        assert cluster.hosts.run(host, "mount -t nfs4 -o hard x:/ /shared").returncode == 0
    assert re.search(rf"worker \d does not see {RUNS}/blind on w[12]: mount there", said)


def test_a_cable_that_is_out_for_two_minutes(cluster: Cluster, calm: Any) -> None:
    job = cluster.submit("train_triplet", "cut", TWO)
    cluster.until_epoch("cut", 3)
    cluster.hosts.cable("w2", "down")
    time.sleep(120)
    cluster.hosts.cable("w2", "up")
    finished(job)
    assert cluster.result("cut") == calm


def test_a_full_shared_folder(cluster: Cluster, calm: Any) -> None:
    job = cluster.submit("train_triplet", "full", TWO)
    cluster.until_epoch("full", 3)
    ballast = cluster.hosts.path("head", "/nfs/ballast")
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=64k"], stderr=subprocess.DEVNULL)
    said = finished(job, status=1)
    ballast.unlink()
    assert "No space left on device" in said and "Traceback" not in said
    resume = "ray job submit --working-dir . -- python jobs/train_triplet.py --resume"
    finished(cluster.laptop(f"{resume} {RUNS}/full"))
    assert cluster.result("full") == calm


def test_down_ends_everything(cluster: Cluster) -> None:
    """With the other commands that docs/cluster.md names for one's own hosts."""
    cluster.do("ray down -y cluster.yaml")
    for host in WORKERS:
        cluster.do(f"ssh -o StrictHostKeyChecking=no ubuntu@{host} ray stop")
    end = "sudo systemctl stop mlflow; sudo docker rm -f flowerray-postgres"
    cluster.do(f"ssh -o StrictHostKeyChecking=no ubuntu@head '{end}'")
    left = "pgrep -af '[r]aylet|[g]cs_server|[r]ay::|[r]ay/dashboard|[m]lflow|[p]ostgres'"
    hosts = ("head", *WORKERS)
    until(lambda: not any(cluster.hosts.run(host, left).stdout for host in hosts), 60, left, 2)
