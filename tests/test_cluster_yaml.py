"""cluster.yaml, the Kubernetes manifest and what a job uploads: against Ray's own schema and code,
without a cloud.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "cluster.yaml").read_text()
CLUSTER: dict[str, Any] = yaml.safe_load(TEXT)
COMMANDS = [
    command
    for key, commands in CLUSTER.items()
    if key.endswith("_commands")
    for command in commands
]


def on_ray(code: str, given: Any) -> Any:
    """What `code` makes of `given`, in a process of its own, since it loads Ray."""
    program = f"import json, sys\ngiven = json.load(sys.stdin)\n{code}\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


VALIDATE = """
from ray.autoscaler._private.util import prepare_config, validate_config
found = {}
for name, config in given.items():
    try:
        validate_config(prepare_config(config))
        found[name] = None
    except Exception as error:
        found[name] = f"{type(error).__name__} {getattr(error, 'message', error)}"
"""


def instead(prefix: str, *without: str) -> dict[str, Any]:
    """The cluster with the lines for another provider, which stand in its comments."""
    lines = [line.removeprefix(prefix) for line in TEXT.splitlines() if line.startswith(prefix)]
    assert lines
    kept = {key: value for key, value in CLUSTER.items() if key not in without}
    return {**kept, **yaml.safe_load("\n".join(lines))}


def changed(*path: str, value: Any) -> dict[str, Any]:
    """The cluster with one value changed or added."""
    config = copy.deepcopy(CLUSTER)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


def test_ray_accepts_the_cluster_and_catches_mistakes() -> None:
    right = {
        "aws": CLUSTER,
        "gcp": instead("#gcp "),
        "local": instead("#local ", "available_node_types", "head_node_type"),
    }
    gpu = ("available_node_types", "gpu_spot")
    wrong = {
        "top": changed("idle_timeout_minute", value=5),
        "node type": changed(*gpu, "max_worker", value=5),
        "head": changed("head_node_type", value="heads"),
        "resources": changed(*gpu, "resources", value={"GPU": "one"}),
        "auth": changed("auth", "ssh_users", value="me"),
        "too many": changed(*gpu, "min_workers", value=100),
    }
    found = on_ray(VALIDATE, {**right, **wrong})
    assert {name: found[name] for name in right} == dict.fromkeys(right)
    assert [name for name in wrong if found[name] is None] == []
    assert "idle_timeout_minute" in found["top"] and "max_worker" in found["node type"]
    assert right["gcp"]["provider"]["type"] == "gcp" and right["local"]["auth"]["ssh_user"]


def test_spot_workers_from_zero_with_on_demand_ones_to_fall_back_on() -> None:
    nodes = dict(CLUSTER["available_node_types"])
    head = nodes.pop(CLUSTER["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert all(node["min_workers"] == 0 < node["max_workers"] for node in nodes.values())
    assert sum(node["max_workers"] for node in nodes.values()) <= CLUSTER["max_workers"]
    spot, fallback = nodes["gpu_spot"], nodes["gpu_on_demand"]
    market = spot["node_config"].pop("InstanceMarketOptions")
    try:
        assert market == {"MarketType": "spot"}
        assert spot["node_config"] == fallback["node_config"]
    finally:
        spot["node_config"]["InstanceMarketOptions"] = market
    # Ray's two autoscalers: the one goes by priority, the other, between equals, by the last name.
    assert spot["priority"] > fallback["priority"]
    assert max(nodes) == "gpu_spot"


PREFERS = """
import logging
logging.disable(logging.CRITICAL)
from ray.autoscaler._private.resource_demand_scheduler import (
    _default_utilization_scorer, get_nodes_for)
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from functools import partial
types = {name: {**node, "resources": {"CPU": 8, "GPU": 1}} for name, node in given.items()}
scorer = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
found = dict(get_nodes_for(types, {}, "head", 99, [{"GPU": 1}] * 10, scorer)[0])
"""


def test_the_autoscaler_takes_spot_nodes_first() -> None:
    """Ten trials of one GPU: all eight spot nodes, then the two on demand."""
    workers = {k: v for k, v in CLUSTER["available_node_types"].items() if k != "head"}
    assert on_ray(PREFERS, workers) == {"gpu_spot": 8, "gpu_on_demand": 2}


def test_every_node_asks_for_the_token() -> None:
    assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [command for command in COMMANDS if "ray start " in command]
    assert len(starts) == 2
    for command in starts:
        exported, _, rest = command.partition(";")
        assert exported.startswith("export ") and "RAY_AUTH_MODE=token" in exported
        assert "ray start " in rest and "RAY_AUTH_MODE" not in rest


def test_nothing_but_ssh_is_reachable_from_outside() -> None:
    whole = "\n".join(COMMANDS)
    assert "0.0.0.0" not in TEXT and "security_group" not in CLUSTER["provider"]
    assert "--dashboard-host=127.0.0.1" in whole
    assert "mlflow server --host 127.0.0.1" in whole and "--allowed-hosts" in whole
    # On one's own machines the node type that says so does not exist.
    assert "ray start --head --num-cpus=0 --num-gpus=0 " in whole
    published = [word for c in COMMANDS for word in c.split() if word.endswith(":5432")]
    assert published == ["127.0.0.1:5432:5432"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command)[:40])
def test_each_command_is_shell(command: str) -> None:
    done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_mlflow_gets_its_database_and_the_shared_artifacts(tmp_path: Path) -> None:
    """The commands that set MLflow up, with stand-ins for what they start."""
    tool = tmp_path / ".local" / "bin" / "mlflow"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/bash\necho "$MLFLOW_BACKEND_STORE_URI" "$@"\n')
    tool.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path)}
    set_up = [c for c in COMMANDS if "~/.mlflow_database ||" in c or "mlflow_server.sh" in c]
    set_up = [c for c in set_up if "systemd-run" not in c]
    assert len(set_up) == 3
    (tmp_path / ".postgres_password").write_text("secret\n")
    for command in [*set_up, "~/mlflow_server.sh"]:
        done = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, check=True
        )
    words = done.stdout.split()
    assert words[:2] == ["postgresql+psycopg2://mlflow:secret@127.0.0.1:5432/mlflow", "server"]
    assert words[words.index("--artifacts-destination") + 1].startswith("/shared/")
    assert (tmp_path / ".mlflow_database").stat().st_mode & 0o077 == 0
    assert CLUSTER["head_start_ray_commands"][-1].count("FLOWERRAY_HOME=/shared/") == 1


def test_the_start_waits_for_mlflow_and_fails_loudly(tmp_path: Path) -> None:
    (wait,) = (c for c in CLUSTER["head_start_ray_commands"] if "/health" in c)
    for name, code in {
        "curl": 'test -e up || { touch up; exit 7; }', "sleep": "true", "sudo": "echo log of $*",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def waited() -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", wait], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        return done.returncode, done.stdout

    assert waited() == (0, "")  # the second try finds it
    (tmp_path / "curl").write_text("#!/bin/bash\nexit 7\n")
    status, said = waited()
    assert status == 1 and "MLflow did not start" in said and "log of journalctl" in said


def test_a_worker_mounts_the_shared_folder_before_it_starts() -> None:
    starts = CLUSTER["worker_start_ray_commands"]
    assert "mount -t nfs4" in starts[0] and "ray start " in starts[-1]


def test_nodes_are_set_up_with_uv_and_wait_for_the_shared_folder() -> None:
    sync = next(command for command in CLUSTER["setup_commands"] if "uv sync" in command)
    assert re.search(r"uv sync --no-dev --python 3\.\d+\.\d+\b", sync)  # Ray compares patches too
    assert CLUSTER["file_mounts"]["~/flowerray"] == "."
    assert any("mount -t nfs4" in command for command in CLUSTER["initialization_commands"])
    assert (
        sum("<- NFS" in line for line in TEXT.splitlines()[4:]) == TEXT.count("NFS_SERVER is") + 2
    )


# --- Kubernetes -----------------------------------------------------------------------------------

GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
"""Keys of ray.io/v1 that the manifest may use; Kubernetes drops others in silence."""
SPEC = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
    "workerGroupSpecs",
}  # fmt: skip


MANIFEST = list(yaml.safe_load_all((ROOT / "docs" / "kuberay.yaml").read_text()))
SERVED = """
from ray.serve.schema import ServeDeploySchema
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray._common.utils import import_attr
(wanted,) = ServeDeploySchema.model_validate(given).applications
application = build(import_attr(wanted.import_path), wanted.args)
deployment = application._bound_deployment
found = [d.name for d in wanted.deployments], deployment.name, deployment.num_replicas
"""


def test_the_service_of_the_manifest_can_be_built() -> None:
    spec = MANIFEST[-1]["spec"]
    assert MANIFEST[-1]["kind"] == "RayService" and set(spec) == {
        "serveConfigV2",
        "rayClusterConfig",
    }
    found = on_ray(SERVED, yaml.safe_load(spec["serveConfigV2"]))
    assert found == [["flowerray"], "flowerray", 1]
    cluster = spec["rayClusterConfig"]
    assert set(cluster) <= SPEC and cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert set(group) == GROUP and cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in (cluster["headGroupSpec"]["template"], group["template"]):
        (container,) = pod["spec"]["containers"]
        secret = {e["name"]: e.get("valueFrom") for e in container["env"]}["FLOWERRAY_SERVE_TOKEN"]
        assert secret["secretKeyRef"] == {"name": "flowerray-serve", "key": "token"}
        assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]


def test_the_kuberay_manifest() -> None:
    claim, database, service, server, cluster, _ = MANIFEST
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    pod = server["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    volumes = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"]}
    assert set(volumes.values()) == {c["metadata"]["name"] for c in (claim, database)}
    command = pod["spec"]["containers"][0]["command"]
    assert {m["name"] for m in pod["spec"]["containers"][0]["volumeMounts"]} == set(volumes)
    assert command[command.index("--artifacts-destination") + 1].startswith("/shared/")
    address = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    head_env = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "MLFLOW_TRACKING_URI", "value": address} in head_env
    spec = cluster["spec"]
    assert set(spec) == SPEC and spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert set(head) == {"serviceType", "rayStartParams", "template"}
    assert head["serviceType"] == "ClusterIP" and head["rayStartParams"]["num-cpus"] == "0"
    assert len(workers) == 2
    for group in workers:
        assert set(group) == GROUP
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    assert ["spot" in json.dumps(g["template"]).lower() for g in workers] == [True, False]
    for group in [head, *workers]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,), (volume,) = pod["containers"], pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert ("nvidia.com/gpu" in resources["limits"]) == (group is not head)
        assert {"name": "FLOWERRAY_HOME", "value": "/shared/flowerray"} in container["env"]


# --- what a job uploads ---------------------------------------------------------------------------

PACK = """
import os, zipfile
from pathlib import Path
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
found = {}
for folder in given["folders"]:
    target = Path(given["target"])
    create_package(folder, target, include_gitignore=True,
                   excludes=get_runtime_env_default_excludes())
    found[folder] = [zipfile.ZipFile(target).namelist(), target.stat().st_size]
    target.unlink()
"""


def test_an_image_holds_no_secret_and_no_data() -> None:
    """docs/kuberay.yaml builds one with `COPY . .`, and docker reads neither of the other lists."""
    left = set((ROOT / ".dockerignore").read_text().split())
    assert {".git", ".venv", ".env", "**/*.env", "**/*.pem", "**/auth_token"} <= left
    lists = (ROOT / ".rayignore").read_text() + (ROOT / ".gitignore").read_text()
    for place in ("data", "runs", "mlartifacts", "outputs"):
        assert place in left and place in lists


def test_a_job_uploads_code_and_nothing_else(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    keep = ["flowerray/data/store.py", "flowerray/explore/page.py", "jobs/x.py", "pyproject.toml"]
    leave = [
        ".env", "secrets.env", "auth_token", "key.pem", "data/jpg/a.jpg", "runs/a/run.json",
        "mlruns/0/x", "mlartifacts/x", "mlflow.db", "a/mlflow.db-wal", "outputs/x", "model.pth",
        "flowers.tgz", "tests/data/x.py", ".venv/lib/x.py", "flowerray/__pycache__/x.pyc",
    ]  # fmt: skip
    for name in keep + leave:
        (planted / name).parent.mkdir(parents=True, exist_ok=True)
        (planted / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, planted)
    found = on_ray(
        PACK, {"folders": [str(planted), str(ROOT)], "target": str(tmp_path / "package.zip")}
    )
    names, _ = found[str(planted)]
    files = {name for name in names if not name.endswith("/")}
    assert files - {".gitignore", ".rayignore"} == set(keep)

    names, size = found[str(ROOT)]
    assert {"jobs/train_triplet.py", "flowerray/data/store.py", "pyproject.toml"} <= set(names)
    assert size < 2 * 2**20
