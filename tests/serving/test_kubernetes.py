"""deploy/kubernetes.yaml: its parts fit each other, the image, and what the server takes."""

import re
from pathlib import Path

import httpx
import pytest
import yaml

from serving.configuration import PREFIX, parse_options
from serving.limits import Limits
from serving.options import make_parser
from tests.support.servers import SlowStudio, serving

DEPLOY = Path(__file__).parents[2] / "deploy"
NAME = "pictures.example.org"


@pytest.fixture(scope="module")
def parts():
    read = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {part["kind"]: part for part in read}


@pytest.fixture(scope="module")
def pod(parts):
    return parts["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    (only,) = pod["containers"]
    return only


@pytest.fixture(scope="module")
def environment(container):
    assert all(isinstance(each["value"], str) for each in container["env"]), "YAML's numbers"
    return {each["name"]: each["value"] for each in container["env"]}


def test_the_environment_is_options(environment, container):
    known = {f"{PREFIX}{name}" for name in ("HOST", "PORT", "API_KEY_FILE", "ALLOW_HOST")}
    assert {name for name in environment if name.startswith(PREFIX)} == known
    read = parse_options(make_parser("serve"), [], environment)
    assert (read.host, read.hosts, read.open) == ("0.0.0.0", [NAME], False)
    assert container["ports"] == [{"name": "http", "containerPort": read.port}]
    assert f"EXPOSE {read.port}" in (DEPLOY / "Dockerfile").read_text()


def test_what_is_mounted_is_there(pod, container, environment):
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts.keys() == {each["name"] for each in pod["volumes"]}
    assert environment["LATENTRT_SERVE_API_KEY_FILE"] == f"{mounts['keys']}/keys"
    image = (DEPLOY / "Dockerfile").read_text()
    assert f"LATENTRT_CACHE={mounts['cache']}" in image, "the one place that is written to"
    (user,) = re.findall(r"useradd .*--uid (\d+)", image)
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user)
    assert container["securityContext"]["readOnlyRootFilesystem"]


def test_one_leads_to_the_other(parts, pod):
    labels = parts["Deployment"]["spec"]["template"]["metadata"]["labels"]
    service = parts["Service"]
    assert parts["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] == pod["containers"][0]["ports"][0]["name"]
    (rule,) = parts["Ingress"]["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    assert path["backend"]["service"]["port"]["name"] == port["name"]
    assert rule["host"] == parts["Ingress"]["spec"]["tls"][0]["hosts"][0] == NAME
    told = parts["Ingress"]["metadata"]["annotations"]
    most = told["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert int(most.removesuffix("m")) << 20 > Limits().body_bytes


def test_the_probes_are_answered_under_the_name_that_is_allowed(container):
    """Whoever listens on all addresses is asked for by an address, which is no name of its."""
    with serving(SlowStudio(0), names=[NAME]) as running:
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[kind]["httpGet"]
            headers = {each["name"]: each["value"] for each in probe["httpHeaders"]}
            assert headers == {"Host": NAME}
            answer = httpx.get(running.url + probe["path"], headers=headers)
            assert answer.status_code == 200
        refused = httpx.get(running.url + "/health", headers={"host": "10.0.0.7:7860"})
        assert refused.status_code == 403
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_it_may_finish_what_it_has_begun(pod):
    assert pod["terminationGracePeriodSeconds"] > Limits().queue_seconds


@pytest.fixture(scope="module")
def ray_service():
    return yaml.safe_load((DEPLOY / "rayservice.yaml").read_text(encoding="utf-8"))


def test_kuberays_application_is_that_of_a_cluster_without_it(ray_service):
    given = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    alone = yaml.safe_load((DEPLOY / "ray.yaml").read_text(encoding="utf-8"))
    assert given.pop("proxy_location") == "EveryNode", "where KubeRay asks how it is"
    assert alone.pop("proxy_location") == "HeadOnly"
    assert given.pop("http_options") == alone.pop("http_options") | {
        "host": "0.0.0.0",
        "port": 8000,
    }
    del alone["applications"][0]["args"]["host"]  # which the environment says
    assert given == alone


def test_kuberays_pods_have_keys_and_time(ray_service):
    spec = ray_service["spec"]["rayClusterConfig"]
    templates = [spec["headGroupSpec"]["template"]]
    templates += [group["template"] for group in spec["workerGroupSpecs"]]
    image = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    (user,) = re.findall(r"useradd .*--uid (\d+)", image)
    for template in templates:
        pod = template["spec"]
        (container,) = pod["containers"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        read = parse_options(make_parser("serve run"), [], environment, {"threads": 1})
        assert (read.host, read.hosts, read.open) == ("0.0.0.0", [NAME], False)
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert mounts.keys() == {each["name"] for each in pod["volumes"]}
        assert str(read.api_key_file) == f"{mounts['keys']}/keys"
        assert f"LATENTRT_CACHE={mounts['cache']}" in image
        assert pod["securityContext"]["runAsUser"] == int(user)
        assert pod["terminationGracePeriodSeconds"] > Limits().queue_seconds
        (port,) = container["ports"]
        assert port == {"name": "serve", "containerPort": 8000}
    assert ray_service["spec"]["rayClusterDeletionDelaySeconds"] > Limits().queue_seconds
    assert "FROM base AS ray" in image
