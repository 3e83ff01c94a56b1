{{- define "ares.name" -}}
{{- $name := ternary .Release.Name (printf "%s-ares" .Release.Name) (contains "ares" .Release.Name) -}}
{{ $name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "ares.labels" -}}
app.kubernetes.io/name: ares
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "ares.selector" -}}
app.kubernetes.io/name: ares
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "ares.image" -}}
{{- $image := .root.Values.image -}}
{{ with $image.registry }}{{ . }}/{{ end }}{{ .name }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "ares.secret" -}}
{{ .Values.keys.existingSecret | default (printf "%s-keys" (include "ares.name" .)) }}
{{- end }}

{{/* Of a role: the values of all instances, and its own over them. */}}
{{- define "ares.instances" -}}
{{ mergeOverwrite (deepCopy .root.Values.instances) (deepCopy (index .root.Values .role)) | toYaml }}
{{- end }}

{{/* How many instances of a role there can be: with `discovery: names` the gateway looks for all of them. */}}
{{- define "ares.most" -}}
{{- $autoscaling := .root.Values.autoscaling -}}
{{ if and $autoscaling.kind (eq .role "decode") }}{{ $autoscaling.maxReplicas }}{{ else }}{{ (index .root.Values .role).replicas }}{{ end }}
{{- end }}

{{- define "ares.workers" -}}
{{- range $role := list "prefill" "decode" }}
{{- $name := printf "%s-%s" (include "ares.name" $) $role }}
{{- range $number := until (int (include "ares.most" (dict "root" $ "role" $role))) }}
- http://{{ $name }}-{{ $number }}.{{ $name }}.{{ $.Release.Namespace }}.svc:{{ $.Values.ports.http }}
{{- end }}
{{- end }}
{{- end }}

{{- define "ares.sources" -}}
{{- range $role := list "prefill" "decode" }}
{{- $service := printf "%s-%s" (include "ares.name" $) $role }}
{{- if eq $.Values.discovery "dns" }}
- dns:{{ $service }}.{{ $.Release.Namespace }}.svc:{{ $.Values.ports.http }}
{{- else }}
- kubernetes:{{ $.Release.Namespace }}/{{ $service }}:http
{{- end }}
{{- end }}
{{- end }}

{{/* A variable from the Secret; without that key, it is not set. */}}
{{- define "ares.key" -}}
- name: {{ .variable }}
  valueFrom:
    secretKeyRef: {name: {{ include "ares.secret" .root }}, key: {{ .key }}, optional: true}
{{- end }}

{{/* Where pods go, and who starts them. */}}
{{- define "ares.pod" -}}
serviceAccountName: {{ .account | default (include "ares.name" .root) }}
automountServiceAccountToken: {{ not (empty .account) }}
# Variables of Services, such as ARES_PORT of one called `ares`, are no settings.
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  seccompProfile: {type: RuntimeDefault}
{{- range $field := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with index $.values $field }}
{{ $field }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "ares.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
{{- end }}
