{{- /*
A pod of one machine of an engine: (dict "top" . "part" "server"), or "follower" for machines 1 .. of one that spans
several. A follower listens to its leader alone, so nothing probes it.
*/ -}}
{{- define "octavo.pod" -}}
{{- $part := .part -}}
{{- $isServer := eq .part "server" -}}
{{- with .top -}}
metadata:
  labels:
    {{- include "octavo.selector" (dict "top" . "part" $part) | nindent 4 }}
spec:
  automountServiceAccountToken: false
  # the server drains for shutdownTimeoutSeconds, after five in which balancers learn that it ends
  terminationGracePeriodSeconds: {{ add .Values.shutdownTimeoutSeconds 15 }}
  securityContext:
    {{- include "octavo.podSecurityContext" . | nindent 4 }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: octavo
      image: "{{ .Values.image.repository }}:{{ .Values.image.tag }}"
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args:
        - {{ .Values.model | quote }}
        - --shutdown-timeout={{ .Values.shutdownTimeoutSeconds }}
        {{- if and $isServer .Values.kvEvents.enabled }}
        - --kv-events-config
        - {{ include "octavo.kvEvents" . }}
        {{- end }}
        {{- range .Values.flags }}
        - {{ . | quote }}
        {{- end }}
        {{- if include "octavo.hasFollowers" . }}
        # the controller of LeaderWorkerSets sets both variables; the leader is node 0
        - --nnodes={{ .Values.nodes }}
        - --node-rank=$(LWS_WORKER_INDEX)
        - --master-addr=$(LWS_LEADER_ADDRESS)
        {{- end }}
        {{- if not $isServer }}
        - --headless
        {{- end }}
      env:
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        {{- if include "octavo.hasFollowers" . }}
        - name: OCTAVO_CLUSTER_KEY
          valueFrom:
            secretKeyRef: {name: {{ include "octavo.clusterKeySecret" . }}, key: cluster-key}
        {{- end }}
        {{- if and $isServer (include "octavo.hasApiKey" .) }}
        - name: OCTAVO_API_KEY
          valueFrom:
            secretKeyRef: {name: {{ include "octavo.apiKeySecret" . }}, key: api-key}
        {{- end }}
        {{- with .Values.hubToken.existingSecret }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ . }}, key: token}
        {{- end }}
      {{- if $isServer }}
      ports:
        - {name: http, containerPort: 8000}
        {{- if .Values.kvEvents.enabled }}
        - {name: kv-events, containerPort: {{ .Values.kvEvents.port }}}
        - {name: kv-replay, containerPort: {{ .Values.kvEvents.replayPort }}}
        {{- end }}
      # /health is 503 while the server drains; /version answers as long as the process lives
      startupProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 5
        timeoutSeconds: 4
        failureThreshold: {{ div (add .Values.startupTimeoutSeconds 4) 5 }}
      readinessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 5
        timeoutSeconds: 4
        failureThreshold: 2
      livenessProbe:
        httpGet: {path: /version, port: http}
        periodSeconds: 10
        timeoutSeconds: 8
        failureThreshold: 6
      {{- end }}
      lifecycle:
        preStop:
          {{- if $isServer }}
          exec: {command: [sleep, "5"]}
          {{- else }}
          # all pods of a group are told to end at once; a follower ends by itself when its server has drained
          exec: {command: [sleep, "{{ add .Values.shutdownTimeoutSeconds 10 }}"]}
          {{- end }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      securityContext:
        {{- include "octavo.securityContext" . | nindent 8 }}
      volumeMounts:
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if .Values.models.existingClaim }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
  volumes:
    - name: cache
      {{- if .Values.cache.persistent }}
      persistentVolumeClaim: {claimName: {{ include "octavo.name" . }}-cache}
      {{- else }}
      emptyDir: {sizeLimit: {{ .Values.cache.size }}}
      {{- end }}
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: 1Gi}
    {{- with .Values.models.existingClaim }}
    - name: models
      persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}
