"""Each file of ``yamls/cloud`` starts the same recipe: what it launches is captured, parsed and loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from composer.cli import launcher
from mcli.models.run_config import FinalRunConfig, RunConfig
from PIL import Image

from aemim_algorithm.cli import app
from aemim_algorithm.recipes.registry import build_parts
from aemim_algorithm.recipes.schema import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
CLOUD = ROOT / "yamls" / "cloud"
RECIPE = "yamls/pretrain/imagenet_vit_base_300ep_aemim.yaml"
PLACES = {"AEMIM_DATA": "s3://bucket/train", "AEMIM_CACHE": "/cache", "AEMIM_RUNS": "/runs"}
# What a secret would be called, beside a value of its own.
SECRET_NAME = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)

# Writes its arguments, one a line, to a file of its own.
CAPTURE = '#!/bin/sh\nprintf "%s\\n" "$@" > "$CAPTURED/$(basename "$0")-${NODE:-0}"\n'
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" >> "$CAPTURED/scontrol"; fi
"""
# Runs the step on both nodes at once, as Slurm does.
SRUN = """#!/bin/sh
printf "%s\\n" "$@" > "$CAPTURED/srun"
while [ "${1#-}" != "$1" ]; do shift; done
for node in 0 1; do NODE=$node SLURM_NODEID=$node "$@" & done
wait
"""


@dataclass(frozen=True)
class Launch:
    """What reaches the composer launcher on one node."""

    options: Any
    arguments: list[str]

    def recipe(self) -> tuple[str, Recipe]:
        """The recipe file, and what it is under the overrides, read as ``aemim`` itself does."""
        assert self.arguments[0] == "pretrain"
        command: Any = typer.main.get_command(app)
        context = command.commands["pretrain"].make_context("pretrain", self.arguments[1:])
        path = context.params["recipe"]
        return str(path), load_recipe(ROOT / path, context.params["overrides"])


def stub(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def run(command: list[str | Path], stubs: Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {"PATH": f"{stubs}:{os.environ['PATH']}", "CAPTURED": str(stubs.parent), **environment}
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def slurm_environment(tmp_path: Path, **changed: str) -> dict[str, str]:
    """What Slurm tells the script; the clone is a folder without a virtual environment."""
    return {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "72",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        **PLACES,
        **changed,
    }


def parse_launch(words: list[str], monkeypatch: pytest.MonkeyPatch, **environment: str) -> Launch:
    """What composer's own parser makes of its command line."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["composer", *words])
        for name, value in environment.items():
            patch.setenv(name, value)
        options = launcher._parse_args()
    assert options.command_mode
    assert options.training_script == "aemim"
    return Launch(options, options.training_script_args)


def captured(folder: Path, node: int = 0) -> list[str]:
    return (folder / f"composer-{node}").read_text().splitlines()


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    folder = tmp_path / "stubs"
    for name, text in {"composer": CAPTURE, "git": CAPTURE, "pip": CAPTURE}.items():
        stub(folder, name, text)
    stub(folder, "scontrol", SCONTROL)
    stub(folder, "srun", SRUN)
    return folder


def mosaicml_launch(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    config = RunConfig.from_file(CLOUD / "mosaicml.yaml")
    (stubs.parent / "aemim").mkdir()
    done = run(["bash", "-c", config.command], stubs, stubs.parent, **PLACES)
    assert done.returncode == 0, done.stderr
    nodes = {"NODE_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    nodes |= {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    return parse_launch(captured(stubs.parent), monkeypatch, **nodes)


def kubernetes_launch(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    container = job()["spec"]["template"]["spec"]["containers"][0]
    (stubs.parent / "aemim").mkdir()
    given = {"AEMIM_REPOSITORY": "repository", "AEMIM_REVISION": "v1", "JOB_COMPLETION_INDEX": "1"}
    command = [*container["command"], *container["args"]]
    done = run(command, stubs, stubs.parent, **PLACES, **given)
    assert done.returncode == 0, done.stderr
    return parse_launch(captured(stubs.parent), monkeypatch)


def slurm_launch(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    done = run(["bash", CLOUD / "slurm.sh"], stubs, stubs.parent, **slurm_environment(stubs.parent))
    assert done.returncode == 0, done.stderr
    return parse_launch(captured(stubs.parent, 1), monkeypatch)


LAUNCHES = {"mosaicml": mosaicml_launch, "slurm": slurm_launch, "kubernetes": kubernetes_launch}


def manifest() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLOUD / "kubernetes.yaml").read_text()))


def job() -> dict[str, Any]:
    return next(part for part in manifest() if part["kind"] == "Job")


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_cloud_runs_the_same_recipe(name: str, stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LAUNCHES[name](stubs, monkeypatch)
    options = launch.options
    assert (options.nproc, options.world_size, options.node_rank, options.base_rank) == (8, 16, 1, 8)
    path, recipe = launch.recipe()
    assert path == RECIPE
    parts = build_parts(recipe)
    assert [type(part).__name__ for part in parts.algorithms] == ["AEMIM"]
    assert parts.parallelism is None
    assert (recipe.data.source, recipe.data.cache) == ("s3://bucket/train", "/cache")
    assert recipe.save_folder == "/runs/aemim-vit-base"
    assert recipe.save_interval == "5ep"
    assert recipe.autoresume
    plain = load_recipe(ROOT / RECIPE, [f"data.source={recipe.data.source}"])
    for key in ("model", "algorithms", "optimizer", "schedule", "max_duration", "global_batch_size", "seed"):
        assert getattr(recipe, key) == getattr(plain, key), key
    assert recipe.global_batch_size % options.world_size == 0


def test_every_file_is_covered() -> None:
    assert {path.stem for path in CLOUD.iterdir()} == set(LAUNCHES)


@pytest.mark.filterwarnings("error")
def test_mcli_accepts_its_file() -> None:
    """It warns of unknown keys of ``compute`` and ``scheduling``, and refuses an image that cannot be."""
    config = RunConfig.from_file(CLOUD / "mosaicml.yaml")
    final = FinalRunConfig.finalize_config(config)
    assert final.compute["gpus"] == 16
    (repository,) = final.integrations
    assert config.command.startswith(f"cd {repository['path']}\n")
    assert set(final.env_variables) == set(PLACES)
    assert final.to_create_run_api_input()["runInput"]["command"] == config.command.strip()


@pytest.mark.parametrize("part", manifest(), ids=lambda part: part["kind"])
@pytest.mark.parametrize("version", ["1.29", "1.33"])
def test_the_manifest_follows_its_schema(part: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(part, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            part | {"spec": part["spec"] | {"replicaCount": 2}}, version, strict=True
        )


def test_the_pods_of_the_job_find_the_first_of_them(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = next(part for part in manifest() if part["kind"] == "Service")
    pod = job()["spec"]["template"]["spec"]
    name = job()["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    options = kubernetes_launch(stubs, monkeypatch).options
    assert options.master_addr == f"{name}-0.{pod['subdomain']}"
    container = pod["containers"][0]
    assert {port["containerPort"] for port in container["ports"]} == {options.master_port}
    assert job()["spec"]["completions"] == job()["spec"]["parallelism"]
    assert job()["spec"]["completions"] * options.nproc == options.world_size
    assert container["resources"]["limits"]["nvidia.com/gpu"] == options.nproc
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_the_clone_that_is_installed_is_the_one_that_was_asked_for(
    stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubernetes_launch(stubs, monkeypatch)
    assert (stubs.parent / "git-0").read_text().split() == ["checkout", "--quiet", "v1"]
    assert (stubs.parent / "pip-0").read_text().split() == ["install", "--quiet", "."]


def variables() -> Iterator[tuple[str, Any]]:
    """The environment variables that the files set, each with its value or reference."""
    yield from RunConfig.from_file(CLOUD / "mosaicml.yaml").env_variables.items()
    for variable in job()["spec"]["template"]["spec"]["containers"][0]["env"]:
        yield variable["name"], variable.get("value", variable.get("valueFrom"))
    yield from re.findall(r"^\s*(?:export )?(\w+)=(.*)$", (CLOUD / "slurm.sh").read_text(), re.MULTILINE)


def test_secrets_stand_nowhere() -> None:
    secret = {name: value for name, value in variables() if SECRET_NAME.search(name)}
    assert set(secret) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert all(set(value) == {"secretKeyRef"} for value in secret.values())
    text = "".join(path.read_text() for path in CLOUD.iterdir())
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|https?://|[0-9a-zA-Z+/]{40}", text)


def test_slurm_starts_one_launcher_on_each_node(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_launch(stubs, monkeypatch)
    nodes = [parse_launch(captured(stubs.parent, node), monkeypatch).options for node in (0, 1)]
    assert [node.node_rank for node in nodes] == [0, 1]
    assert {(node.master_addr, node.master_port) for node in nodes} == {("first", 23456)}
    words = (stubs.parent / "srun").read_text().splitlines()
    assert words[:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=72", "bash"]
    assert not (stubs.parent / "scontrol").exists()


@pytest.mark.parametrize("missing", ["AEMIM_DATA", "AEMIM_RUNS"])
def test_slurm_says_what_is_missing(stubs: Path, missing: str) -> None:
    environment = slurm_environment(stubs.parent)
    del environment[missing]
    done = run(["bash", CLOUD / "slurm.sh"], stubs, stubs.parent, **environment)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert f"{missing}: " in done.stderr
    assert not (stubs.parent / "srun").exists()


@pytest.mark.parametrize(("ending", "code"), [("exit 0", 0), ("exit 3", 3)])
def test_slurm_ends_as_its_step_does_and_queues_again_when_time_is_up(
    stubs: Path, ending: str, code: int
) -> None:
    stub(stubs, "srun", f'#!/bin/sh\ntouch "$CAPTURED/started"\nsleep 1\n{ending}\n')
    env = {"PATH": f"{stubs}:{os.environ['PATH']}", "CAPTURED": str(stubs.parent)}
    script = subprocess.Popen(
        ["bash", CLOUD / "slurm.sh"], env=env | slurm_environment(stubs.parent), cwd=stubs.parent
    )
    deadline = time.monotonic() + 20
    while not (stubs.parent / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    script.send_signal(10)  # SIGUSR1, as of #SBATCH --signal=B:USR1@300
    assert script.wait(20) == code
    assert (stubs.parent / "scontrol").read_text() == "requeue 123456\n"


def test_slurm_runs_for_real(stubs: Path) -> None:
    """The first node's launcher and ``aemim`` are the real ones; a dry run trains nothing."""
    for number in range(2):
        picture = stubs.parent / "images" / str(number) / "image.png"
        picture.parent.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(picture)
    python = sys.executable
    stub(stubs, "composer", f'#!/bin/sh\n[ $NODE = 1 ] || exec {python} -m composer.cli.launcher "$@"\n')
    stub(stubs, "aemim", f'#!/bin/sh\nexec {python} -m aemim_algorithm "$@"\n')
    clone = stubs.parent / "clone"
    clone.mkdir()
    (clone / "yamls").symlink_to(ROOT / "yamls")
    environment = slurm_environment(
        stubs.parent,
        SLURM_GPUS_ON_NODE="1",
        AEMIM_DATA=str(stubs.parent / "images"),
        AEMIM_RUNS=str(stubs.parent / "runs"),
        AEMIM_CLONE=str(clone),
        OMP_NUM_THREADS="1",
    )
    command: list[str | Path] = ["bash", CLOUD / "slurm.sh", "global_batch_size=64", "--dry-run"]
    done = run(command, stubs, stubs.parent, **environment)
    assert done.returncode == 0, done.stderr
    assert "x the same step without AEMIM" in done.stdout
    assert "an estimate: 2 x cpu" in done.stdout
    assert "global_batch_size: 64" in done.stdout
    assert not (stubs.parent / "runs").exists()
