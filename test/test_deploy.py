"""The container's and the clusters' files: linted, valid by their schemas, and with command lines
and deployment files that the server reads."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from crosspool.cli.main import COMMANDS
from crosspool.cli.router import read_keys
from crosspool.config.deployment_file import to_options
from crosspool.config.flags import make_parser
from crosspool.server.routes import ROUTES

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "scripts" / "cluster" / "docker"
KUBERNETES = ROOT / "scripts" / "cluster" / "kubernetes"
DEPLOYMENTS = [DOCKER / "deployment.yaml", *sorted(KUBERNETES.glob("node-*.yaml"))]
MANIFESTS = ["namespace.yaml", "models.yaml", "nodes.yaml", "router.yaml"]
KUBERNETES_VERSION = "1.33"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def objects() -> list[dict[str, Any]]:
    return [each for name in MANIFESTS for each in documents(name)]


def pods() -> list[dict[str, Any]]:
    kinds = ("StatefulSet", "Deployment")
    return [each["spec"]["template"]["spec"] for each in objects() if each["kind"] in kinds]


def containers() -> list[dict[str, Any]]:
    return [container for spec in pods() for container in spec["containers"]]


def test_the_dockerfile_is_as_its_linter_wants_it() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_has_the_router_and_what_make_needs() -> None:
    text = (ROOT / "Dockerfile").read_text()
    expression = re.search(r"sed -n '(.*)' pyproject.toml", text)
    assert expression is not None
    found = subprocess.run(
        ["sed", "-n", expression[1], ROOT / "pyproject.toml"], capture_output=True, text=True
    )
    assert re.fullmatch(r"smg==[\d.]+\n", found.stdout)
    ignored = [line.strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()]
    needed = ["Makefile", "pyproject.toml", "README.md", "requirements", "python", "sgl-kernel-ext"]
    assert not set(ignored) & set(needed)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_valid(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for each in documents(name):
        validate.validate(each, KUBERNETES_VERSION, strict=True)


def test_kustomize_names_what_there_is() -> None:
    (listed,) = documents("kustomization.yaml")
    assert listed["resources"] == MANIFESTS
    generated = {each["name"]: each["files"] for each in listed["secretGenerator"]}
    assert all((KUBERNETES / file).is_file() for files in generated.values() for file in files)
    replicas = [each["spec"]["replicas"] for each in objects() if each["kind"] == "StatefulSet"]
    assert generated["deployments"] == [f"node-{n}.yaml" for n in range(*replicas)]
    secrets = [
        volume["secret"] for pod in pods() for volume in pod["volumes"] if "secret" in volume
    ]
    assert sorted(secret["secretName"] for secret in secrets) == sorted(generated)


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_deployment_files_are_read(path: Path) -> None:
    options = to_options(yaml.safe_load(path.read_text()), path.name)
    assert options.models_dir == "/models"
    if path.parent == KUBERNETES:
        assert options.advertise_url == f"http://{path.stem}.node:30000"


def test_whoever_asks_has_the_key_that_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    shutil.copy(KUBERNETES / "keys.yaml", file)
    file.chmod(0o600)
    keys = read_keys(file)
    for path in KUBERNETES.glob("node-*.yaml"):
        options = to_options(yaml.safe_load(path.read_text()), path.name)
        assert options.router_api_key == keys.admin_api_key
        assert options.sglang["api_key"] == keys.api_key


def test_command_lines_are_the_servers() -> None:
    (composed,) = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].values()
    lines = [composed["command"], *(container["args"] for container in containers())]
    lines += [re.findall(r'"([^"]*)"', (ROOT / "Dockerfile").read_text().splitlines()[-1])]
    page = (ROOT / "docs" / "deploy" / "docker.md").read_text().replace("\\\n", " ")
    lines += [shlex.split(line)[1:] for line in re.findall(r" crosspool +(?:serve|plan) .*", page)]
    assert len(lines) >= 6
    for command, *flags in lines:
        assert command in COMMANDS
        if command in ("serve", "demo") and "--config" not in flags:
            make_parser("crosspool").parse_args(flags)


def test_probes_ask_for_routes_that_need_no_key() -> None:
    found = [
        container[probe]["httpGet"]["path"]
        for container in containers()
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
        if "httpGet" in container.get(probe, {})
    ]
    assert len(found) == 3
    open_to_all = {rule.path for rule in ROUTES if rule.caller == "anyone"}
    assert open_to_all.issuperset(found)
