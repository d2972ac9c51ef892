"""The chart: rendered by Helm's engine, checked by Kubernetes' schemas, its environment lived in.

There is no Kubernetes here. What it would do with a rendered container is done by hand: a process
with just that environment, secrets filled in, and requests to the paths of its probes.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncstore import Settings, acl, embedded
from asyncstore.settings import seeds_of
from tests.polling import eventually
from tests.processes import is_running
from tests.servers import RedisServer, free_port, redis_server

helm = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this machine")
kubernetes = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).parent.parent
HELM = ROOT / "examples" / "helm"
CHART = HELM / "asyncstore-service"
PASSWORD = "p@ss:/w%2Frd +=$(REDIS_URL)"  # what a URL, a shell and Kubernetes would stumble over

# As in the documentation that the names of the values come from.
SEED: dict[str, Any] = {
    "storage": {"backend": "redis"},
    "redis": {
        "enabled": True,
        "host": "redis.cache.svc.cluster.local",
        "port": 6379,
        "credentials": {"secretName": "redis-credentials", "passwordKey": "password"},
    },
}
TLS = {"enabled": True, "caSecretName": "redis-ca", "caKey": "root.pem"}
VALUES: dict[str, dict[str, Any]] = {
    "seed": SEED,
    "all": {
        "image": {"repository": "registry.example.org/orders", "tag": "7"},
        "imagePullSecrets": [{"name": "registry"}],
        "storage": {"keyPrefix": "shop:", "durability": "replicas(1)", "timeout": 2.5},
        "redis": {**SEED["redis"], "tls": TLS},
        "autoscaling": {"enabled": True},
        "podAnnotations": {"a": "b"},
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
    },
    "bare": {"redis": {"host": "redis"}, "podDisruptionBudget": {"enabled": False}},
    "cluster": {"redis": {"urls": ["redis://n1:6379", "redis://n2:6379"]}},
}


def values_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = helm.values_from_yaml((HELM / name).read_text())
    return found


def texts_of(values: dict[str, Any]) -> dict[str, str]:
    with helm.Chart.load(CHART) as chart:
        texts: dict[str, str] = chart.render(values, name="orders", namespace="shop")
    return {Path(name).name: text for name, text in texts.items()}


def rendered(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The objects of a release, by their kind."""
    texts = texts_of(values)
    del texts["NOTES.txt"]
    objects = [helm.values_from_yaml(text) for text in texts.values()]
    return {found["kind"]: found for found in objects if found}


def pod_of(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = rendered(values)["Deployment"]["spec"]["template"]["spec"]
    return found


def container_of(values: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(values)["containers"]
    return dict(container)


def environment_of(container: dict[str, Any], secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """What Kubernetes would set; only plain values go through its `$(…)`."""
    environment: dict[str, str] = {}
    for entry in container["env"]:
        if "value" in entry:
            assert "$(" not in entry["value"]
            environment[entry["name"]] = entry["value"]
        else:
            reference = entry["valueFrom"]["secretKeyRef"]
            environment[entry["name"]] = secrets[reference["name"]][reference["key"]]
    return environment


def probe_of(container: dict[str, Any], name: str) -> str:
    """The URL that the kubelet asks."""
    request = container[name]["httpGet"]
    (port,) = (p["containerPort"] for p in container["ports"] if p["name"] == request["port"])
    return f"http://127.0.0.1:{port}{request['path']}"


# What is rendered


@pytest.mark.parametrize("name", VALUES)
def test_helm_finds_nothing_to_say(name: str) -> None:
    report = helm.lint(CHART, VALUES[name], strict=True)
    assert report["errors"] == []
    assert {message["error"] for message in report["messages"]} <= {"icon is recommended"}


@pytest.mark.parametrize("version", ["1.30", kubernetes.latest_version()], ids=["oldest", "newest"])
@pytest.mark.parametrize("name", VALUES)
def test_kubernetes_knows_each_field(name: str, version: str) -> None:
    objects = rendered(VALUES[name])
    for found in objects.values():
        kubernetes.validate(found, version, strict=True)
    wanted = {"Deployment", "Service"}
    wanted |= {"HorizontalPodAutoscaler"} if name == "all" else set()
    wanted |= set() if name == "bare" else {"PodDisruptionBudget"}
    assert objects.keys() == wanted


def test_the_schemas_see_a_field_that_is_none() -> None:
    deployment = rendered(SEED)["Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["slep"] = {}
    with pytest.raises(kubernetes.ValidationError, match="slep"):
        kubernetes.validate(deployment, kubernetes.latest_version(), strict=True)


def test_selectors_find_the_pods() -> None:
    objects = rendered(SEED)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for selector in (
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
    ):
        assert selector.items() <= labels
    scaled = rendered(VALUES["all"])
    target = scaled["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
    assert target == scaled["Deployment"]["metadata"]["name"]
    assert "replicas" not in scaled["Deployment"]["spec"], "the autoscaler's is not overwritten"


def test_a_pod_has_no_rights_that_it_does_not_need() -> None:
    pod = pod_of(SEED)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]


def test_what_uvicorn_gives_open_streams_is_within_the_pods_last_seconds() -> None:
    pod = pod_of(SEED)
    (container,) = pod["containers"]
    (graceful,) = re.findall(r"--timeout-graceful-shutdown=(\d+)", " ".join(container["args"]))
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause + int(graceful) < pod["terminationGracePeriodSeconds"]


def show(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "docs" / "chart.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_objects_can_be_shown(tmp_path: Path) -> None:
    shown = show()
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()[:3]]
    kinds = {kind: name for _, kind, name in lines}
    assert kinds == {
        kind: made["metadata"]["name"]
        for kind, made in rendered(values_of("orders-values.yaml")).items()
    }
    shown = show("--yaml")
    assert shown.stdout.count("\n---\n") == len(kinds) - 1
    (tmp_path / "values.yaml").write_text("redis: {host: a, url: 'redis://b'}")
    refused = show(str(tmp_path / "values.yaml"))
    assert (refused.returncode, "give one of them" in refused.stderr) == (1, True)
    assert "Traceback" not in refused.stderr


def test_the_notes_say_where_the_store_is_and_what_is_missing() -> None:
    notes = texts_of(SEED)["NOTES.txt"]
    assert "at redis://redis.cache.svc.cluster.local:6379." in notes
    assert "without a password" not in notes
    assert "without a password" in texts_of(VALUES["bare"])["NOTES.txt"]


# The environment


def test_the_seeds_values_reach_the_store() -> None:
    container = container_of(SEED)
    secrets = {"redis-credentials": {"password": PASSWORD}}
    settings = Settings.from_env(environment_of(container, secrets))
    assert settings.url == "redis://redis.cache.svc.cluster.local:6379"
    assert (settings.backend, settings.password) == ("redis", PASSWORD)
    (password,) = (entry for entry in container["env"] if "valueFrom" in entry)
    reference = {"name": "redis-credentials", "key": "password"}
    assert password == {
        "name": "ASYNCSTORE_PASSWORD",
        "valueFrom": {"secretKeyRef": reference},
    }


def test_services_of_the_namespace_are_no_settings() -> None:
    assert pod_of(SEED)["enableServiceLinks"] is False


def test_all_values_reach_the_store() -> None:
    pod = pod_of(VALUES["all"])
    (container,) = pod["containers"]
    secrets = {"redis-credentials": {"password": PASSWORD}}
    settings = Settings.from_env(environment_of(container, secrets))
    assert (settings.key_prefix, settings.timeout) == ("shop:", 2.5)
    assert str(settings.durability) == "replicas(1)"
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert volume["name"] == mount["name"]
    assert volume["secret"]["secretName"] == "redis-ca"
    (file,) = volume["secret"]["items"]
    assert file["key"] == "root.pem"
    assert settings.url == (
        "rediss://redis.cache.svc.cluster.local:6379"
        f"?ssl_ca_certs={mount['mountPath']}/{file['path']}"
    )


@pytest.mark.parametrize(
    ("redis", "seeds"),
    [
        ({"urls": ["redis://n1:1", "valkey://n2"]}, ["redis://n1:1", "redis://n2"]),
        (
            {
                "urls": ["rediss://n1:1?protocol=3", "rediss://n2"],
                "credentials": {"username": "app", "secretName": "s"},
                "tls": TLS,
            },
            [
                "rediss://app:x@n1:1?protocol=3&ssl_ca_certs=/etc/asyncstore/tls/root.pem",
                "rediss://app:x@n2?ssl_ca_certs=/etc/asyncstore/tls/root.pem",
            ],
        ),
    ],
    ids=["plain", "tls"],
)
def test_a_cluster(redis: dict[str, Any], seeds: list[str]) -> None:
    environment = environment_of(container_of({"redis": redis}), {"s": {"password": "x"}})
    assert seeds_of(Settings.from_env(environment)) == seeds


@pytest.mark.parametrize(
    ("redis", "url"),
    [
        ({"url": "redis://h:1/2?protocol=3"}, "redis://h:1/2?protocol=3"),
        ({"url": "rediss://h", "tls": {"enabled": True}}, "rediss://h"),
        ({"host": "::1", "port": 7}, "redis://[::1]:7"),
        ({"host": "h", "credentials": {"username": "u", "secretName": "s"}}, "redis://u@h:6379"),
    ],
    ids=["url", "url-tls", "address", "user"],
)
def test_one_server(redis: dict[str, Any], url: str) -> None:
    environment = environment_of(container_of({"redis": redis}), {"s": {"password": "x"}})
    assert Settings.from_env(environment).url == url


# What is refused


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "redis.host is missing"),
        ({"redis": {"host": "a", "url": "redis://b"}}, "give one of them"),
        ({"redis": {"host": "a", "urls": ["redis://b"]}}, "give one of them"),
        ({"redis": {"host": "a:1/2"}}, "redis.host: the name or address"),
        ({"redis": {"host": "u:s3cret@a"}}, "redis.host: the name or address"),
        ({"redis": {"url": "redis://u:s3cret@a"}}, "redis.credentials.secretName"),
        ({"redis": {"url": "redis://a?password=s3cret"}}, "redis.credentials.secretName"),
        ({"redis": {"urls": ["redis://a", "redis://:s3cret@b"]}}, "redis.credentials.secretName"),
        ({"redis": {"url": "http://a"}}, "a URL such as redis://host:6379"),
        ({"redis": {"urls": ["redis://a,redis://b"]}}, "a URL such as redis://host:6379"),
        ({"redis": {"url": "redis://$(A)"}}, "a URL such as redis://host:6379"),
        ({"redis": {"url": "redis://a", "tls": {"enabled": True}}}, "begins with rediss://"),
        ({"redis": {"host": "a", "tls": {"caSecretName": "x"}}}, "it is for TLS"),
        ({"redis": {"host": "a", "credentials": {"username": "u"}}}, "secretName is missing"),
        (
            {"redis": {"host": "a", "credentials": {"password": "s3cret"}}},
            "'/redis/credentials': additional properties 'password' not allowed",
        ),
        ({"redis": {"hots": "a"}}, "'/redis': additional properties 'hots' not allowed"),
        ({"redis": {"host": "a"}, "strorage": {}}, "additional properties 'strorage' not allowed"),
        ({"redis": {"host": "a", "port": "6379"}}, "'/redis/port': got string, want integer"),
        ({"redis": {"host": "a", "enabled": False}}, "'/redis/enabled': value must be true"),
        (
            {"redis": {"host": "a"}, "storage": {"backend": "embedded"}},
            "'/storage/backend': value must be 'redis'",
        ),
        ({"redis": {"host": "a"}, "storage": {"durability": "disk"}}, "'/storage/durability'"),
        ({"redis": {"host": "a"}, "storage": {"keyPrefix": "a{b}"}}, "'/storage/keyPrefix'"),
        ({"redis": {"host": "a"}, "service": {"containerPort": 80}}, "'/service/containerPort'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_are_none(values: dict[str, Any], says: str) -> None:
    with pytest.raises(helm.HelmError) as caught:
        rendered(values)
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)


# The service, as it would run


@contextmanager
def valkey(values: dict[str, Any], passwords: dict[str, str]) -> Iterator[RedisServer]:
    """A server with the settings and users of values for Valkey's chart."""
    lines = [line for line in values["extraConfig"].splitlines() if not line.startswith("#")]
    settings = [(f"--{name}", value) for name, _, value in (line.partition(" ") for line in lines)]
    users = []
    for name, user in values["auth"]["aclUsers"].items():
        password = hashlib.sha256(passwords[user["passwordKey"]].encode()).hexdigest()
        users.append(f"user {name} on #{password} {user['permissions']}")
    arguments = [part for setting in settings for part in setting]
    binary = str(embedded.find_binary())
    with redis_server(binary, *arguments, tcp=True, config="\n".join(users)) as server:
        yield server


@contextmanager
def running(container: dict[str, Any], environment: dict[str, str]) -> Iterator[int]:
    """The container's process; yields its pid."""
    (entry,) = re.findall(
        r"^ENTRYPOINT (.*)$", (ROOT / "examples/fastapi_orders/Dockerfile").read_text(), re.M
    )
    command = [sys.executable, "-m", *json.loads(entry), *container["args"]]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)


async def test_the_service_runs_with_what_was_rendered() -> None:
    passwords = {"password": PASSWORD, "admin-password": "s3cret"}
    with valkey(values_of("valkey-values.yaml"), passwords) as server:
        values = values_of("orders-values.yaml")
        values["redis"] |= {"host": "127.0.0.1", "port": int(server.url.rpartition(":")[2])}
        values["service"] = {"containerPort": free_port()}
        container = container_of(values)
        secrets = {values["redis"]["credentials"]["secretName"]: passwords}
        environment = environment_of(container, secrets)
        server.stop()
        with running(container, environment) as pid:
            async with httpx.AsyncClient(timeout=20) as client:
                await _follows_the_store(client, container, server)
                ready = await client.get(probe_of(container, "readinessProbe"))
                assert ready.json()["level"] != "bad", ready.text
                order = probe_of(container, "livenessProbe").replace("/health/live", "/orders/1")
                placed = await client.put(order, json={"customer": "ada"})
                assert placed.status_code == 201, placed.text
                assert is_running(pid), "it is the same process"
        # What everysec means: a power cut may cost the last second, and WAITAOF does not help.
        assert found_by_doctor(environment) == {"fsync": "warning", "WAITAOF": "warning"}


def found_by_doctor(environment: dict[str, str]) -> dict[str, str]:
    """What `asyncstore doctor` finds in the pod, as the notes say to run it, that is not good."""
    command = [sys.executable, "-m", "asyncstore", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert PASSWORD.encode() not in done.stdout + done.stderr
    findings = json.loads(done.stdout)["findings"]
    return {f["name"]: f["level"] for f in findings if f["level"] != "good"}


async def _follows_the_store(
    client: httpx.AsyncClient, container: dict[str, Any], server: RedisServer
) -> None:
    """See what the probes find while the server is away, comes, goes and comes again."""

    async def answers(name: str, status: int) -> None:
        async def is_so() -> bool:
            try:
                answer = await client.get(probe_of(container, name))
            except httpx.TransportError:
                return False
            return answer.status_code == status

        await eventually(is_so, f"the {name} finds {status}")

    await answers("startupProbe", 200)
    await answers("readinessProbe", 503)
    server.start()
    await answers("readinessProbe", 200)
    server.stop()
    await answers("readinessProbe", 503)
    await answers("livenessProbe", 200)
    server.start()
    await answers("readinessProbe", 200)


def test_the_user_has_the_rights_that_acl_prints() -> None:
    users = values_of("valkey-values.yaml")["auth"]["aclUsers"]
    service = values_of("orders-values.yaml")
    name, prefix = service["redis"]["credentials"]["username"], service["storage"]["keyPrefix"]
    line = acl.line(name, prefix, waitaof=True)
    assert line == f"ACL SETUSER {name} on {users[name]['permissions']}"


def test_the_server_has_what_the_seed_recommends() -> None:
    settings = values_of("valkey-values.yaml")["extraConfig"].splitlines()
    assert {
        "appendonly yes",
        "appendfsync everysec",
        "save 900 1",
        "maxmemory-policy noeviction",
    } <= set(settings)
