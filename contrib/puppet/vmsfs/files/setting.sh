#!/bin/sh
# VM SETTING VALUE RESTART: a setting of a VM that is there. Most change while it is stopped; those named here at any time.
vm=$1 setting=$2 value=$3 restart=$4

fail() {
    cat "$vm/error" >&2
    exit 1
}

case $setting in
stop_timeout | shell | protected | lifetime | idle_timeout) ;;
*)
    if [ "$restart" = true ] && ! grep -qxE 'stopped|failed' "$vm/status"; then
        echo stopped >"$vm/status" || fail
    fi
    ;;
esac
printf '%s\n' "$value" >"$vm/config/$setting" || fail
