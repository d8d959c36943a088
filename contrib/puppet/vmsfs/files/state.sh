#!/bin/sh
# VM STATE: returns when it is so.
echo "$2" >"$1/status" || {
    cat "$1/error" >&2
    exit 1
}
