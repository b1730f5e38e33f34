{{- /* Labels of every object. */ -}}
{{- define "carrick.labels" -}}
{{ include "carrick.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* What never changes; of pods too, so that a new chart restarts none that it does not change. */ -}}
{{- define "carrick.selector" -}}
app.kubernetes.io/name: carrick
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "carrick.image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{- include "carrick.reference" (list .Values.image.repository $tag .Values.image.digest) -}}
{{- end }}

{{- /* The tunnel's tag without a digest of its own must not meet the agent's digest. */ -}}
{{- define "carrick.tunnelImage" -}}
{{- $own := .Values.tunnel.image -}}
{{- if or $own.tag $own.digest -}}
{{- $tag := $own.tag | default .Values.image.tag | default .Chart.AppVersion -}}
{{- include "carrick.reference" (list .Values.image.repository $tag $own.digest) -}}
{{- else -}}
{{- include "carrick.image" . -}}
{{- end -}}
{{- end }}

{{- define "carrick.reference" -}}
{{- index . 0 }}:{{ index . 1 }}{{ with index . 2 }}@{{ . }}{{ end -}}
{{- end }}

{{- define "carrick.hopSecret" -}}
{{- .Values.hop.existingSecret | default "carrick-hop" -}}
{{- end }}

{{- /* Where pods run: a list of the chart's root and `Exists` or `DoesNotExist`, for the label of gateways. */ -}}
{{- define "carrick.placement" -}}
{{- $root := index . 0 -}}
{{- $ours := dict "key" "carrick.dev/gateway" "operator" (index . 1) -}}
{{- $affinity := deepCopy $root.Values.affinity -}}
{{- $node := $affinity.nodeAffinity | default dict -}}
{{- $required := $node.requiredDuringSchedulingIgnoredDuringExecution | default dict -}}
{{- $terms := list -}}
{{- range $required.nodeSelectorTerms | default (list dict) -}}
{{- $terms = append $terms (set . "matchExpressions" (append (.matchExpressions | default list) $ours)) -}}
{{- end -}}
{{- $_ := set $required "nodeSelectorTerms" $terms -}}
{{- $_ := set $node "requiredDuringSchedulingIgnoredDuringExecution" $required -}}
{{- $_ := set $affinity "nodeAffinity" $node -}}
nodeSelector:
  {{- toYaml (merge (dict "kubernetes.io/os" "linux") $root.Values.nodeSelector) | nindent 2 }}
affinity:
  {{- toYaml $affinity | nindent 2 }}
{{- with $root.Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Names of endpoints are the node's to resolve: the cluster's own DNS may need the mesh. */ -}}
{{- define "carrick.pod" -}}
hostNetwork: true
dnsPolicy: Default
enableServiceLinks: false
securityContext:
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* Not privileged; the argument is a list of capabilities. */ -}}
{{- define "carrick.securityContext" -}}
securityContext:
  runAsUser: 0
  runAsGroup: 0
  privileged: false
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL], add: {{ toJson . }}}
{{- end }}

{{- define "carrick.env" -}}
env:
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Arguments of whatever works on the kernel. AppArmor's usual profile forbids writing below /sys/fs/bpf: there the
       node's bpf filesystem has another path. */ -}}
{{- define "carrick.backendArgs" -}}
- --log-format={{ .Values.logFormat }}
- --bpffs=/bpf
- --wireguard-port={{ .Values.wireguard.port }}
- --hop-port={{ .Values.hop.port }}
- --probe-port={{ .Values.probe.port }}
{{- end }}

{{- define "carrick.agentArgs" -}}
- agent
- --kube
- --cluster-name={{ .Values.cluster.name }}
- --mesh-domain={{ .Values.mesh.domain }}
- --keys-dir=/etc/carrick/keys
{{ include "carrick.backendArgs" . }}
{{- range .Values.cluster.localCIDRs }}
- --local-cidr={{ . }}
{{- end }}
{{- end }}

{{- define "carrick.nodeMounts" -}}
- {name: run, mountPath: /run/carrick}
- {name: bpffs, mountPath: /bpf}
- {name: state, mountPath: /var/lib/carrick}
{{- end }}

{{- define "carrick.nodeVolumes" -}}
- name: run
  hostPath: {path: /run/carrick, type: DirectoryOrCreate}
- name: bpffs
  hostPath: {path: /sys/fs/bpf, type: Directory}
- name: state
  hostPath: {path: /var/lib/carrick, type: DirectoryOrCreate}
{{- end }}
