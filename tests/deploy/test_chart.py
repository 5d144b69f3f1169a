"""The Helm chart: what it renders is valid Kubernetes, fits together, and wrong values are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python.chart import Chart, lint

from octavo.cli import Parser
from octavo.commands import serve
from octavo.runtime.parallel.address import KEY, LEAST_KEY
from octavo.server.start import flags as serve_flags

CHART = Path(__file__).parents[2] / "deploy/helm/octavo"
LEADER_WORKER_SET = yaml.safe_load((Path(__file__).parent / "leader_worker_set.yaml").read_text())
KUBERNETES = ("1.30", kubernetes_validate.latest_version())
VALUES: dict[str, dict[str, Any]] = {
    "least": {},
    "no gateway": {"gateway": {"enabled": False}},
    "gpu": {
        "image": {"tag": "cuda"},
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {}},
        "flags": ["--kv-cache-dtype=fp8", "--max-num-seqs", "64"],
    },
    "keys": {"apiKey": {"existingSecret": "keys"}, "hubToken": {"existingSecret": "hub"}},
    "a key": {"apiKey": {"value": "secret"}, "imagePullSecrets": [{"name": "pull"}]},
    "volumes": {"cache": {"persistent": True, "storageClassName": "fast"}, "models": {"existingClaim": "models"}},
    "events": {"kvEvents": {"enabled": True, "port": 6000}},
    "hpa": {"autoscaling": {"kind": "hpa"}, "networkPolicy": {"allowFrom": [{"namespaceSelector": {}}]}},
    "keda": {"autoscaling": {"kind": "keda"}, "podDisruptionBudget": {"enabled": False}},
    "machines": {
        "nodes": 3,
        "clusterKey": {"existingSecret": "keys"},
        "flags": ["--tensor-parallel-size", "4"],
        "apiKey": {"existingSecret": "keys"},
        "kvEvents": {"enabled": True, "port": 6000},
        "autoscaling": {"kind": "hpa"},
    },
    "machines, a key": {
        "nodes": 2,
        "clusterKey": {"value": "k" * LEAST_KEY},
        "flags": ["-tp=2"],
        "autoscaling": {"kind": "keda"},
    },
    "monitoring": {
        "monitoring": {"serviceMonitor": True, "rules": True, "dashboards": True, "labels": {"release": "prometheus"}},
        "networkPolicy": {"enabled": False},
    },
}
INFORMATION = 1  # Helm's: an icon is recommended
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule", "LeaderWorkerSet"}  # not Kubernetes' own kinds
SERVERS = {"Deployment", "LeaderWorkerSet"}
Template = dict[str, Any]


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    with Chart.load(CHART) as chart:
        texts = chart.render(values={"model": "owner/model"} | values, name="demo", namespace="serving")
    documents = [it for name, text in texts.items() if not name.endswith(".txt") for it in yaml.safe_load_all(text)]
    return [it for it in documents if it is not None]


def one(objects: list[dict[str, Any]], kind: str, name: str = "demo-octavo") -> dict[str, Any]:
    (found,) = [it for it in objects if (it["kind"], it["metadata"]["name"]) == (kind, name)]
    return found


def servers(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The object that the servers' pods come from."""
    (found,) = [it for it in objects if it["kind"] in SERVERS and it["metadata"]["name"] == "demo-octavo"]
    return found


def pod_templates(it: dict[str, Any]) -> list[Template]:
    """Of a Deployment, or of a LeaderWorkerSet: the leader's, which is the server, and the followers'."""
    if it["kind"] == "Deployment":
        return [it["spec"]["template"]]
    template = it["spec"]["leaderWorkerTemplate"]
    return [template["leaderTemplate"], template["workerTemplate"]]


def containers(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each pod of a server: one, or the leader's and the followers'."""
    return [container for it in pod_templates(servers(objects)) for container in it["spec"]["containers"]]


def selects(selector: dict[str, Any], template: Template) -> bool:
    """As Kubernetes reads a LabelSelector."""
    labels = template["metadata"]["labels"]
    rules = selector.get("matchExpressions", [])
    assert all(rule["operator"] == "In" for rule in rules)
    is_matched = selector.get("matchLabels", {}).items() <= labels.items()
    return is_matched and all(labels.get(rule["key"]) in rule["values"] for rule in rules)


def test_what_it_renders_is_valid_kubernetes() -> None:
    distinct: dict[str, dict[str, Any]] = {}
    for values in VALUES.values():
        objects = render(values)
        assert len({(it["kind"], it["metadata"]["name"]) for it in objects}) == len(objects)
        distinct |= {json.dumps(it): it for it in objects if it["kind"] not in CUSTOM}
    assert len(distinct) > 20
    for it in distinct.values():
        for version in KUBERNETES:
            kubernetes_validate.validate(it, version, strict=True)


def test_helm_finds_nothing_to_complain_about() -> None:
    report = lint(CHART, values={"model": "owner/model"})
    assert report["errors"] == []
    assert [it for it in report["messages"] if it["severity"] > INFORMATION] == []


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_selectors_find_their_pods_and_ports(values: dict[str, Any]) -> None:
    objects = render(values)
    templates = [template for it in objects if it["kind"] in SERVERS for template in pod_templates(it)]
    machines = pod_templates(servers(objects))
    server = machines[0]

    def has_port(template: Template, port: str) -> bool:
        return port in {it["name"] for it in template["spec"]["containers"][0]["ports"]}

    for it in objects:
        spec = it.get("spec", {})
        if it["kind"] == "Deployment":
            assert [template for template in templates if selects(spec["selector"], template)] == [spec["template"]]
        elif it["kind"] == "Service":
            (template,) = [template for template in templates if selects({"matchLabels": spec["selector"]}, template)]
            assert all(has_port(template, port["targetPort"]) for port in spec["ports"])
        elif it["kind"] == "PodDisruptionBudget":
            assert [template for template in templates if selects(spec["selector"], template)] == machines
        elif it["kind"] == "NetworkPolicy":
            selected = [template for template in templates if selects(spec["podSelector"], template)]
            ports = [port["port"] for rule in spec["ingress"] for port in rule.get("ports", [])]
            assert selected == ([server] if ports else machines)
            assert all(has_port(server, port) for port in ports)
        elif it["kind"] == "ServiceMonitor":
            labels = spec["selector"]["matchLabels"].items()
            services = [s for s in objects if s["kind"] == "Service" and labels <= s["metadata"]["labels"].items()]
            assert [s["metadata"]["name"] for s in services] == ["demo-octavo-servers"]
            assert spec["endpoints"][0]["port"] == services[0]["spec"]["ports"][0]["name"]
        elif it["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"}:
            scaled = {key: servers(objects)[key] for key in ("apiVersion", "kind")}
            assert spec["scaleTargetRef"] == scaled | {"name": "demo-octavo"}
            assert "replicas" not in servers(objects)["spec"]


def test_followers_hear_their_own_release_alone() -> None:
    ranks = one(render(VALUES["machines"]), "NetworkPolicy", "demo-octavo-ranks")["spec"]
    (rule,) = ranks["ingress"]
    assert rule == {"from": [{"podSelector": ranks["podSelector"]}]}
    assert ranks["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "demo"


@pytest.mark.parametrize("name", ["machines", "machines, a key"])
def test_an_engine_of_several_machines_is_a_leader_worker_set(name: str) -> None:
    it = servers(render(VALUES[name]))
    jsonschema.validate(it, LEADER_WORKER_SET)
    assert it["spec"]["leaderWorkerTemplate"]["size"] == VALUES[name]["nodes"]
    for template in pod_templates(it):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        for version in KUBERNETES:
            kubernetes_validate.validate(pod, version, strict=True)
        assert KEY in {variable["name"] for variable in template["spec"]["containers"][0]["env"]}
        # LeaderWorkerSet's controller sets these, before any other variable
        assert "--node-rank=$(LWS_WORKER_INDEX)" in template["spec"]["containers"][0]["args"]
        assert "--master-addr=$(LWS_LEADER_ADDRESS)" in template["spec"]["containers"][0]["args"]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_volumes_secrets_and_accounts_are_there(values: dict[str, Any]) -> None:
    objects = render(values)
    for template in (template for it in objects if it["kind"] in SERVERS for template in pod_templates(it)):
        pod = template["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == set(volumes)
        claims = {it["metadata"]["name"] for it in objects if it["kind"] == "PersistentVolumeClaim"} | {"models"}
        used = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        assert used <= claims
        secrets = {it["metadata"]["name"] for it in objects if it["kind"] == "Secret"} | {"keys", "hub"}
        named = [variable["valueFrom"] for variable in pod["containers"][0].get("env", [])]
        assert {source["secretKeyRef"]["name"] for source in named if "secretKeyRef" in source} <= secrets
        if "serviceAccountName" in pod:
            one(objects, "ServiceAccount", pod["serviceAccountName"])
        else:
            assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def read_options(container: dict[str, Any], node: int) -> serve_flags.ServeOptions:
    """What `octavo serve` makes of a container's arguments, with the variables of LeaderWorkerSet's controller."""
    variables = {"$(LWS_WORKER_INDEX)": str(node), "$(LWS_LEADER_ADDRESS)": "demo-octavo-0.demo-octavo.serving"}
    arguments = container["args"]
    for name, value in variables.items():
        arguments = [word.replace(name, value) for word in arguments]
    parser = Parser(prog="octavo serve", allow_abbrev=False)
    serve_flags.configure(parser)
    return serve_flags.read_options(parser.parse_intermixed_args(serve.own_words(arguments, parser)))


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_the_server_s_arguments_are_octavo_s(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """As `octavo serve` reads them; nothing about them is left to say."""
    objects = render(values)
    server, *followers = [read_options(it, node) for node, it in enumerate(containers(objects))]
    assert server.model.model == "owner/model"
    for template in pod_templates(servers(objects)):
        grace = template["spec"]["terminationGracePeriodSeconds"]
        assert grace == server.listen.shutdown_timeout + 15 == 135
    num_nodes = values.get("nodes", 1)
    nodes = [it.engine.parallel for it in (server, *followers)]
    expected = [(num_nodes, 0, False), (num_nodes, 1, True)] if num_nodes > 1 else [(1, 0, False)]
    assert [(it.nnodes, it.node_rank, it.headless) for it in nodes] == expected
    assert len({it.master_addr for it in nodes}) == 1
    assert len({it.tensor_parallel_size for it in nodes}) == 1
    events = server.engine.kv_events_config
    assert events.is_on == ("kvEvents" in values)
    if events.is_on:
        ports = {port["name"]: port["containerPort"] for port in containers(objects)[0]["ports"]}
        assert (events.endpoint, events.replay_endpoint) == ("tcp://*:6000", "tcp://*:5657")
        assert (ports["kv-events"], ports["kv-replay"]) == (6000, 5657)
        assert events.topic == "kv@$(POD_IP)@owner/model"
    assert capsys.readouterr().err == ""


def test_probes_ask_routes_that_need_no_key() -> None:
    (server,) = containers(render({"apiKey": {"value": "secret"}}))
    paths = {name: server[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/health", "readinessProbe": "/health", "livenessProbe": "/version"}
    assert server["startupProbe"]["failureThreshold"] * server["startupProbe"]["periodSeconds"] >= 1800


def test_the_alerts_and_dashboards_are_the_files() -> None:
    objects = render(VALUES["monitoring"])
    assert one(objects, "PrometheusRule")["spec"] == yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    boards = one(objects, "ConfigMap", "demo-octavo-dashboards")["data"]
    files = {path.name: json.loads(path.read_text()) for path in (CHART / "files/dashboards").glob("*.json")}
    assert {name: json.loads(text) for name, text in boards.items()} == files


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model": ""}, "model"),
        ({"replica": 3}, "replica"),
        ({"replicas": "three"}, "replicas"),
        ({"autoscaling": {"kind": "always"}}, "kind"),
        ({"gateway": {"policy": "prefix"}}, "policy"),
        ({"service": {"port": 0}}, "port"),
        ({"apiKey": {"existingSecret": "a", "value": "b"}}, "apiKey"),
        ({"cache": {"size": "much"}}, "size"),
        ({"nodes": 0}, "nodes"),
        ({"nodes": 2}, "clusterKey"),
        ({"nodes": 2, "clusterKey": {"value": "k" * (LEAST_KEY - 1)}}, "clusterKey"),
        ({"nodes": 2, "clusterKey": {"existingSecret": "a", "value": "b"}}, "clusterKey"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(Exception, match=named):
        render(values)


def test_every_value_has_a_rule() -> None:
    """values.yaml and values.schema.json name the same keys."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(value: dict[str, Any], rule: dict[str, Any], path: str) -> None:
        assert set(value) == set(rule["properties"]) - {"global"}, path
        for key, inner in rule["properties"].items():
            inner = inner["allOf"][0] if "allOf" in inner else inner
            if reference := inner.get("$ref"):
                inner = schema["definitions"][reference.rsplit("/", 1)[1]]
            if "properties" in inner:
                assert inner["additionalProperties"] is False, f"{path}.{key}"
                compare(value[key], inner, f"{path}.{key}")

    compare(values, schema, "values")
