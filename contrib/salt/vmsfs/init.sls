{#- The VMs of the pillar. What a command is given is in its environment, so that no name or value needs a quote of the shell;
    tojson writes a string as YAML takes it, too. -#}
{%- from "vmsfs/map.jinja" import vmsfs, setting with context %}

{%- for id, vm in vmsfs.vms.items() %}
{%- set path = vmsfs.mount ~ '/' ~ id %}
{%- set state = vm.get('state', 'running') %}
{%- set env = dict(vmsfs.env, **vm.get('env', {})) %}
{%- set secrets = vm.get('secrets', {}) %}

{%- if state == 'absent' %}

vmsfs {{ id }} is removed:
  cmd.run:
    - name: rmdir "$VM"
    - onlyif: test -d "$VM"
    - env:
      - VM: {{ path | tojson }}

{%- else %}

{%- set fresh = vmsfs.mount ~ '/.new/' ~ id %}
{%- set is_there = salt['file.directory_exists'](path) %}
{%- if not is_there %}

# What is in .new has not been booted; the rename boots it, with all that is there.
vmsfs {{ id }} is prepared:
  cmd.run:
    - name: |
        set -e
        fail() {
            cat "$MOUNT/.new/$ID/error" >&2
            exit 1
        }
        cd "$MOUNT/.new"
        if [ -e "$ID" ]; then rm -r "$ID"; fi
        if [ -n "$TEMPLATE" ]; then cp -r "$TEMPLATE" "$ID"; else mkdir "$ID"; fi
        {%- for name, value in vm.get('config', {}).items() %}
        printf '%s\n' "$SETTING_{{ name }}" >"$ID/config/{{ name }}" || fail
        {%- endfor %}
    - env:
      - MOUNT: {{ vmsfs.mount | tojson }}
      - ID: {{ id | string | tojson }}
      - TEMPLATE: {{ vm.get('template', '') | tojson }}
      {%- for name, value in vm.get('config', {}).items() %}
      - SETTING_{{ name }}: {{ setting(name, value) | tojson }}
      {%- endfor %}
{%- endif %}

vmsfs {{ id }} is made:
  cmd.run:
    - name: mv "$NEW" "$VM" || { cat "$NEW/error" >&2; exit 1; }
    - creates: {{ path | tojson }}
    - env:
      - NEW: {{ fresh | tojson }}
      - VM: {{ path | tojson }}
    {%- if not is_there %}
    - require:
      - cmd: vmsfs {{ id }} is prepared
    {%- endif %}

{%- for name, value in vm.get('config', {}).items() %}

# Most settings change while the VM is stopped; those named here at any time.
vmsfs {{ id }} has {{ name }}:
  cmd.run:
    - name: |
        fail() {
            cat "$VM/error" >&2
            exit 1
        }
        case $SETTING in
        stop_timeout | shell | protected | lifetime | idle_timeout) ;;
        *)
            if [ "$RESTART" = yes ] && ! grep -qxE 'stopped|failed' "$VM/status"; then
                echo stopped >"$VM/status" || fail
            fi
            ;;
        esac
        printf '%s\n' "$VALUE" >"$VM/config/$SETTING" || fail
    - unless: test "$(cat "$VM/config/$SETTING")" = "$VALUE"
    - env:
      - VM: {{ path | tojson }}
      - SETTING: {{ name | tojson }}
      - VALUE: {{ setting(name, value) | tojson }}
      - RESTART: {{ ('yes' if vm.get('restart') else 'no') | tojson }}
    - require:
      - cmd: vmsfs {{ id }} is made
    - require_in:
      - cmd: vmsfs {{ id }} is {{ state }}
{%- endfor %}

{%- if state != 'paused' %}

# Variables can be set in every state but this one.
vmsfs {{ id }} goes on:
  cmd.run:
    - name: echo "$STATE" >"$VM/status" || { cat "$VM/error" >&2; exit 1; }
    - onlyif: grep -qx paused "$VM/status"
    - env:
      - VM: {{ path | tojson }}
      - STATE: {{ state | tojson }}
    - require:
      - cmd: vmsfs {{ id }} is made
{%- endif %}

{#- A new VM has its variables before it boots, and so before its first login. #}
{%- set place = (path if is_there else fresh) ~ '/env' %}
{%- set first = 'made' if is_there else 'prepared' %}
{%- set then = state if is_there else 'made' %}
{%- for key, value in dict(env, **secrets).items() %}

{{ (place ~ '/' ~ key) | tojson }}:
  file.managed:
    - contents: {{ value | string | tojson }}
    - contents_newline: false
    - mode: "0600"
    {%- if key in secrets %}
    - show_changes: false
    {%- endif %}
    - require:
      - cmd: vmsfs {{ id }} is {{ first }}
    - require_in:
      - cmd: vmsfs {{ id }} is {{ then }}
{%- endfor %}

{%- if vm.get('env_purge') %}

{{ place | tojson }}:
  file.directory:
    - clean: true
    - require:
      - cmd: vmsfs {{ id }} is {{ first }}
      {%- for key in dict(env, **secrets) %}
      - file: {{ (place ~ '/' ~ key) | tojson }}
      {%- endfor %}
    - require_in:
      - cmd: vmsfs {{ id }} is {{ then }}
{%- endif %}

vmsfs {{ id }} is {{ state }}:
  cmd.run:
    - name: echo "$STATE" >"$VM/status" || { cat "$VM/error" >&2; exit 1; }
    - unless: grep -qx "$STATE" "$VM/status"
    - env:
      - VM: {{ path | tojson }}
      - STATE: {{ state | tojson }}
    - require:
      - cmd: vmsfs {{ id }} is made

{%- if state == 'running' %}
{%- for what, command in vm.get('commands', {}).items() %}

{{ ('vmsfs ' ~ id ~ ': ' ~ what) | tojson }}:
  cmd.run:
    - name: '"$VM/run" -n sh -c "$COMMAND"'
    {%- if 'unless' in command %}
    - unless: '"$VM/run" -n sh -c "$UNLESS"'
    {%- elif 'creates' in command %}
    - unless: '"$VM/run" -n test -e "$CREATES"'
    {%- endif %}
    - env:
      - VM: {{ path | tojson }}
      - COMMAND: {{ command.command | tojson }}
      - UNLESS: {{ command.get('unless', '') | tojson }}
      - CREATES: {{ command.get('creates', '') | tojson }}
    - require:
      - cmd: vmsfs {{ id }} is running
{%- endfor %}
{%- endif %}

{%- endif %}
{%- endfor %}
