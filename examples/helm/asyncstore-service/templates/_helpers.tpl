{{- define "asyncstore-service.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "asyncstore-service.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "asyncstore-service.labels" -}}
{{ include "asyncstore-service.selectorLabels" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | trunc 63 | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "asyncstore-service.caDirectory" -}}/etc/asyncstore/tls{{- end -}}

{{/* Where the server is, as a comma-separated list of URLs without a user: the one place that reads
host, url and urls. No message shows a value, as a password may be in it by mistake. */}}
{{- define "asyncstore-service.places" -}}
{{- $redis := .Values.redis -}}
{{- $given := compact (list $redis.host $redis.url (join "" $redis.urls)) -}}
{{- if not $given -}}
{{- fail "redis.host is missing: the name of the server; or redis.url, or redis.urls for a cluster" -}}
{{- else if gt (len $given) 1 -}}
{{- fail "redis.host, redis.url and redis.urls: give one of them, the others stay empty" -}}
{{- end -}}
{{- if $redis.host -}}
{{- if not (regexMatch "^([A-Za-z0-9._-]+|[0-9A-Fa-f:.]+)$" $redis.host) -}}
{{- fail "redis.host: the name or address of a host is wanted, without scheme, port and user" -}}
{{- end -}}
{{- $host := contains ":" $redis.host | ternary (printf "[%s]" $redis.host) $redis.host -}}
{{- printf "%s://%s:%d" ($redis.tls.enabled | ternary "rediss" "redis") $host (int $redis.port) -}}
{{- else -}}
{{- range $redis.urls | default (list $redis.url) -}}
{{- include "asyncstore-service.checkUrl" (list . $redis.tls.enabled) -}}
{{- end -}}
{{- join "," ($redis.urls | default (list $redis.url)) -}}
{{- end -}}
{{- end -}}

{{- define "asyncstore-service.checkUrl" -}}
{{- $url := index . 0 -}}
{{- if or (contains "@" $url) (contains "password" (lower $url)) -}}
{{- fail "redis.url, redis.urls: user and password don't go there: name the Secret that has the password in redis.credentials.secretName, and the user in redis.credentials.username" -}}
{{- end -}}
{{- if not (regexMatch "^(redis|valkey)s?://[^/,$\\s]+(/[0-9]*)?(\\?[^,$\\s]*)?$" $url) -}}
{{- fail "redis.url, redis.urls: a URL such as redis://host:6379 or rediss://host:6379/2 is wanted" -}}
{{- end -}}
{{- if and (index . 1) (not (regexMatch "^(redis|valkey)s://" $url)) -}}
{{- fail "redis.tls.enabled: a URL begins with rediss:// then" -}}
{{- end -}}
{{- end -}}

{{/* The same with the user and the authority's certificate, as the service gets it. */}}
{{- define "asyncstore-service.urls" -}}
{{- $redis := .Values.redis -}}
{{- if and $redis.credentials.username (not $redis.credentials.secretName) -}}
{{- fail "redis.credentials.secretName is missing: the Secret with the password of redis.credentials.username" -}}
{{- end -}}
{{- $ca := printf "ssl_ca_certs=%s/%s" (include "asyncstore-service.caDirectory" .) $redis.tls.caKey -}}
{{- $urls := list -}}
{{- range splitList "," (include "asyncstore-service.places" .) -}}
{{- $url := . -}}
{{- if $redis.credentials.username -}}
{{- $url = replace "://" (printf "://%s@" $redis.credentials.username) $url -}}
{{- end -}}
{{- if $redis.tls.caSecretName -}}
{{- if not (regexMatch "^(redis|valkey)s://" $url) -}}
{{- fail "redis.tls.caSecretName: it is for TLS: set redis.tls.enabled, or begin the URL with rediss://" -}}
{{- end -}}
{{- $url = printf "%s%s%s" $url (contains "?" $url | ternary "&" "?") $ca -}}
{{- end -}}
{{- $urls = append $urls $url -}}
{{- end -}}
{{- join "," $urls -}}
{{- end -}}
