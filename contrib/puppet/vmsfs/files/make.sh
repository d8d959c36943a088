#!/bin/sh
# MOUNT ID TEMPLATE [SETTING VALUE]...: what is in .new has not been booted; the rename boots it, with all that is there.
set -e
mount=$1 id=$2 template=$3
shift 3
new=$mount/.new/$id

fail() {
    cat "$new/error" >&2
    exit 1
}

if [ ! -d "$mount/.new" ]; then
    echo "there is no vmsfs at $mount: mount it, or set the parameter mount" >&2
    exit 1
fi
if [ -e "$new" ]; then rm -r "$new"; fi # of an attempt that has failed
if [ -n "$template" ]; then cp -r "$template" "$new"; else mkdir "$new"; fi
while [ $# -gt 0 ]; do
    printf '%s\n' "$2" >"$new/config/$1" || fail
    shift 2
done
mv "$new" "$mount/$id" || fail
