"""The Helm chart: what it renders is valid Kubernetes, fits together, and wrong values are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python.chart import Chart, lint

from octavo.cli import Parser
from octavo.commands import serve, serve_flags

CHART = Path(__file__).parents[2] / "deploy/helm/octavo"
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
    "monitoring": {
        "monitoring": {"serviceMonitor": True, "rules": True, "dashboards": True, "labels": {"release": "prometheus"}},
        "networkPolicy": {"enabled": False},
    },
}
INFORMATION = 1  # Helm's: an icon is recommended
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}  # not Kubernetes' own kinds


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    with Chart.load(CHART) as chart:
        texts = chart.render(values={"model": "owner/model"} | values, name="demo", namespace="serving")
    documents = [it for name, text in texts.items() if not name.endswith(".txt") for it in yaml.safe_load_all(text)]
    return [it for it in documents if it is not None]


def one(objects: list[dict[str, Any]], kind: str, name: str = "demo-octavo") -> dict[str, Any]:
    (found,) = [it for it in objects if (it["kind"], it["metadata"]["name"]) == (kind, name)]
    return found


def container(objects: list[dict[str, Any]], name: str = "demo-octavo") -> dict[str, Any]:
    (found,) = one(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]
    return found


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
    templates = [it["spec"]["template"] for it in objects if it["kind"] == "Deployment"]

    def selected(selector: dict[str, str]) -> list[dict[str, Any]]:
        return [it for it in templates if selector.items() <= it["metadata"]["labels"].items()]

    def has_port(template: dict[str, Any], port: str) -> bool:
        return port in {it["name"] for it in template["spec"]["containers"][0]["ports"]}

    for it in objects:
        if it["kind"] == "Deployment":
            assert selected(it["spec"]["selector"]["matchLabels"]) == [it["spec"]["template"]]
        elif it["kind"] == "Service":
            (template,) = selected(it["spec"]["selector"])
            assert all(has_port(template, port["targetPort"]) for port in it["spec"]["ports"])
        elif it["kind"] == "PodDisruptionBudget":
            assert len(selected(it["spec"]["selector"]["matchLabels"])) == 1
        elif it["kind"] == "NetworkPolicy":
            (template,) = selected(it["spec"]["podSelector"]["matchLabels"])
            ports = [port["port"] for rule in it["spec"]["ingress"] for port in rule["ports"]]
            assert all(has_port(template, port) for port in ports)
        elif it["kind"] == "ServiceMonitor":
            labels = it["spec"]["selector"]["matchLabels"].items()
            services = [s for s in objects if s["kind"] == "Service" and labels <= s["metadata"]["labels"].items()]
            assert [s["metadata"]["name"] for s in services] == ["demo-octavo-servers"]
            assert it["spec"]["endpoints"][0]["port"] == services[0]["spec"]["ports"][0]["name"]
        elif it["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"}:
            assert it["spec"]["scaleTargetRef"]["name"] == "demo-octavo"
            assert "replicas" not in one(objects, "Deployment")["spec"]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_volumes_secrets_and_accounts_are_there(values: dict[str, Any]) -> None:
    objects = render(values)
    for it in objects:
        if it["kind"] != "Deployment":
            continue
        pod = it["spec"]["template"]["spec"]
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


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_the_server_s_arguments_are_octavo_s(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """As `octavo serve` reads them; nothing about them is left to say."""
    objects = render(values)
    arguments = container(objects)["args"]
    parser = Parser(prog="octavo serve", allow_abbrev=False)
    serve_flags.configure(parser)
    options = serve_flags.read_options(parser.parse_intermixed_args(serve.own_words(arguments, parser)))
    assert options.model.model == "owner/model"
    grace = one(objects, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace == options.listen.shutdown_timeout + 15 == 135
    events = options.engine.kv_events_config
    assert events.is_on == ("kvEvents" in values)
    if events.is_on:
        ports = {port["name"]: port["containerPort"] for port in container(objects)["ports"]}
        assert (events.endpoint, events.replay_endpoint) == ("tcp://*:6000", "tcp://*:5657")
        assert (ports["kv-events"], ports["kv-replay"]) == (6000, 5657)
        assert events.topic == "kv@$(POD_IP)@owner/model"
    assert capsys.readouterr().err == ""


def test_probes_ask_routes_that_need_no_key() -> None:
    server = container(render({"apiKey": {"value": "secret"}}))
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
            if "properties" in inner:
                assert inner["additionalProperties"] is False, f"{path}.{key}"
                compare(value[key], inner, f"{path}.{key}")

    compare(values, schema, "values")
