{{- define "octavo.name" -}}
{{- printf "%s-octavo" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "octavo.labels" -}}
app.kubernetes.io/name: octavo
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- /* What selects the pods of one part, `server` or `gateway`: (dict "top" . "part" "server") */ -}}
{{- define "octavo.selector" -}}
app.kubernetes.io/name: octavo
app.kubernetes.io/instance: {{ .top.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end -}}

{{- define "octavo.apiKeySecret" -}}
{{- .Values.apiKey.existingSecret | default (printf "%s-api-key" (include "octavo.name" .)) -}}
{{- end -}}

{{- define "octavo.clusterKeySecret" -}}
{{- .Values.clusterKey.existingSecret | default (printf "%s-cluster-key" (include "octavo.name" .)) -}}
{{- end -}}

{{- define "octavo.hasFollowers" -}}
{{- if gt (int .Values.nodes) 1 -}}yes{{- end -}}
{{- end -}}

{{- /* What the servers are. */ -}}
{{- define "octavo.kind" -}}
{{- if include "octavo.hasFollowers" . -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end -}}
{{- end -}}

{{- /* The pods of all machines of all engines. */ -}}
{{- define "octavo.machines" -}}
matchLabels:
  app.kubernetes.io/name: octavo
  app.kubernetes.io/instance: {{ .Release.Name }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [server, follower]}
{{- end -}}

{{- define "octavo.hasApiKey" -}}
{{- if or .Values.apiKey.existingSecret .Values.apiKey.value -}}yes{{- end -}}
{{- end -}}

{{- define "octavo.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "octavo.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- /* As a JSON string: Kubernetes puts the pod's address in place of $(POD_IP). */ -}}
{{- define "octavo.kvEvents" -}}
{{- $port := int .Values.kvEvents.port -}}
{{- $replay := int .Values.kvEvents.replayPort -}}
{{- dict "enable_kv_cache_events" true "endpoint" (printf "tcp://*:%d" $port) "replay_endpoint" (printf "tcp://*:%d" $replay) "topic" (printf "kv@$(POD_IP)@%s" .Values.model) | toJson | quote -}}
{{- end -}}
