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
{{- with .model }}
ares-model: {{ . }}
{{- end }}
{{- end }}

{{- define "ares.image" -}}
{{- $image := .root.Values.image -}}
{{ with $image.registry }}{{ . }}/{{ end }}{{ .name }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "ares.secret" -}}
{{ .Values.keys.existingSecret | default (printf "%s-keys" (include "ares.name" .)) }}
{{- end }}

{{/* The models, as `models` has them; the only one has no name: nothing of a release of one model has its label. */}}
{{- define "ares.models" -}}
{{ .Values.models | default (list (dict "name" "" "model" (.Values.model | default "HuggingFaceTB/SmolLM2-135M-Instruct"))) | toYaml }}
{{- end }}

{{/*
Each group of instances, of one role of one model: its name, how it scales, and its values. The values of all instances
come first, then those of the role, then the model's own, and then those of the model's role.
*/}}
{{- define "ares.groups" -}}
{{- range $entry := include "ares.models" . | fromYamlArray }}
{{- range $role := list "prefill" "decode" }}
{{- $values := mergeOverwrite (deepCopy $.Values.instances) (deepCopy (index $.Values $role)) (deepCopy ($entry.instances | default dict)) (deepCopy (index $entry $role | default dict)) }}
{{- $scaling := mergeOverwrite (deepCopy $.Values.autoscaling) (deepCopy ($entry.autoscaling | default dict)) }}
{{- if or (not $scaling.kind) (ne $role "decode") }}
{{- $scaling = dict }}
{{- end }}
{{- $name := compact (list (include "ares.name" $) $entry.name $role) | join "-" }}
- {{ dict "name" $name "role" $role "entry" $entry "values" $values "scaling" $scaling | toJson }}
{{- end }}
{{- end }}
{{- end }}

{{/* With `discovery: names` the gateway looks for all instances that there can be. */}}
{{- define "ares.workers" -}}
{{- range $group := include "ares.groups" . | fromYamlArray }}
{{- range $number := until (int ($group.scaling.maxReplicas | default $group.values.replicas)) }}
- http://{{ $group.name }}-{{ $number }}.{{ $group.name }}.{{ $.Release.Namespace }}.svc:{{ $.Values.ports.http }}
{{- end }}
{{- end }}
{{- end }}

{{- define "ares.sources" -}}
{{- range $group := include "ares.groups" . | fromYamlArray }}
{{- if eq $.Values.discovery "dns" }}
- dns:{{ $group.name }}.{{ $.Release.Namespace }}.svc:{{ $.Values.ports.http }}
{{- else }}
- kubernetes:{{ $.Release.Namespace }}/{{ $group.name }}:http
{{- end }}
{{- end }}
{{- end }}

{{/* What the gateway is told of the models. */}}
{{- define "ares.served" -}}
{{- if .Values.models }}
models:
{{- range .Values.models }}
{{- $own := dict "model" .model }}
{{- with .servedModelName }}
{{- $_ := set $own "served_model_name" . }}
{{- end }}
- {{ merge $own (.config | default dict) | toJson }}
{{- end }}
{{- else }}
{{- range include "ares.models" . | fromYamlArray }}
model: {{ .model | toJson }}
{{- end }}
{{- end }}
{{- end }}

{{/* What values.schema.json cannot say of `models`. */}}
{{- define "ares.check" -}}
{{- if and .Values.models .Values.model }}
{{- fail "model has no effect beside models: leave one of them out" }}
{{- end }}
{{- if and .Values.models .Values.learner.enabled }}
{{- fail "learner.enabled: a learner is of one model, and models are several: start learners yourself (docs/learning.md)" }}
{{- end }}
{{- $names := dict }}
{{- range $number, $entry := .Values.models }}
{{- $of := printf "models.%d" $number }}
{{- if gt (add (len (include "ares.name" $)) (len $entry.name)) 43 }}
{{- fail (printf "%s.name: %s is too long after %s: both together may have 43 characters" $of $entry.name (include "ares.name" $)) }}
{{- end }}
{{- if hasKey $names (printf "name %s" $entry.name) }}
{{- fail (printf "%s.name: two models are called %s" $of $entry.name) }}
{{- end }}
{{- $_ := set $names (printf "name %s" $entry.name) true }}
{{- range $served := $entry.servedModelName | default (list $entry.model) }}
{{- if hasKey $names (printf "served %s" $served) }}
{{- fail (printf "%s: %s is served twice: give servedModelName, names that no other model has" $of $served) }}
{{- end }}
{{- $_ := set $names (printf "served %s" $served) true }}
{{- end }}
{{- end }}
{{- if .Values.models }}
{{- range $setting := list "models" "served_model_name" "tokenizer" "record" "decision_log" }}
{{- if hasKey $.Values.gateway.config $setting }}
{{- fail (printf "gateway.config.%s has no effect beside models: give it to one of them" $setting) }}
{{- end }}
{{- end }}
{{- range $group := include "ares.groups" . | fromYamlArray }}
{{- range $argument := $group.values.args }}
{{- if or (hasPrefix "--served-model-name" $argument) (hasPrefix "--served_model_name" $argument) }}
{{- fail (printf "args of %s: --served-model-name is set by the chart: give the model its servedModelName" $group.name) }}
{{- end }}
{{- end }}
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
