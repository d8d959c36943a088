#!/bin/sh
# Runs a command in this virtual machine as if it were here: its arguments as they are, stdin, stdout and stderr apart, its
# exit status (128 + n for a signal). Made of the files of jobs/ alone.

usage() {
    cat <<'END'
usage: /vms/ID/run [-n] [-C DIR] [-e KEY=VALUE]... [-s login|raw] [-t SECONDS] CMD [ARG...]

  -C DIR         run it in this directory of the guest
  -e KEY=VALUE   a variable for this call alone; -e KEY: as it is set here
  -n             no stdin (it is passed unless it is a terminal)
  -s SHELL       login: with what a login shell reads at its start, raw: without
  -t SECONDS     end it after this time: TERM, then KILL after 5 s
  -h             this text

Exit status: that of CMD, 128 + n when signal n ended it, 255 when vmsfs could not run it.
END
}

die() {
    printf 'run: %s\n' "$*" >&2
    exit 255
}

# The words about what the daemon has just refused.
refused() {
    cat "$vm/error" >&2 3<&-
    exit 255
}

vm=${0%/*}
[ -e "$vm/jobs/.clone" ] || vm=@HOME@ # by another name, such as a symlink
{ command exec 3<"$vm/jobs/.clone"; } 2>/dev/null || die "cannot make a job in $vm/jobs"
# The job lives as long as descriptor 3 is open: until this process has ended, in whatever way.
IFS= read -r job <&3 || die "cannot make a job in $vm/jobs"
job=$vm/jobs/$job

variable() { # KEY=VALUE or KEY
    key=${1%%=*}
    case $key in '' | [0-9]* | *[!A-Za-z0-9_]*) die "-e $key: no name for a variable" ;; esac
    case $1 in
    *=*) value=${1#*=} ;;
    *)
        eval "set=\${$key+set} value=\${$key-}"
        # shellcheck disable=SC2154 # eval sets it
        [ -n "$set" ] || return 0
        ;;
    esac
    printf '%s\n' "$value" >"$job/env/$key" || refused
}

input=yes
while getopts C:e:hns:t: option; do
    case $option in
    C) printf '%s\n' "$OPTARG" >"$job/cwd" || refused ;;
    e) variable "$OPTARG" ;;
    h) usage; exit 0 ;;
    n) input= ;;
    s) printf '%s\n' "$OPTARG" >"$job/shell" || refused ;;
    t) printf '%s\n' "$OPTARG" >"$job/timeout" || refused ;;
    *) usage >&2; exit 255 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || { usage >&2; exit 255; }

# What cannot be passed on at once holds the command back.
echo wait >"$job/overflow" && echo 256K >"$job/output_max" || refused

if [ -t 0 ]; then input=; fi
if [ -n "$input" ]; then { command exec 4<&0; } 2>/dev/null || input=; fi

# Ctrl-C reaches everybody here: those in the background ignore it, and the command gets it there.
forward() { # SIGNAL
    if [ -n "$feeder" ]; then kill "$feeder" 2>/dev/null; fi
    echo "$1 5" 2>/dev/null >"$job/signal" || exit "$2"
}
feeder=
trap 'forward INT 130' INT
trap 'forward TERM 143' TERM
trap 'forward HUP 129' HUP

printf '%s\0' "$@" >"$job/argv" || refused
IFS= read -r state <"$job/status"
[ "$state" != new ] || refused

if [ -n "$input" ]; then
    cat <&4 2>/dev/null >"$job/stdin" 3<&- &
    feeder=$!
    exec 4<&-
else
    : >"$job/stdin"
fi
cat "$job/stderr" >&2 3<&- &
errors=$!
cat "$job/stdout" 3<&- &
output=$!

# `wait` also returns when a signal has been forwarded.
await() {
    while :; do
        wait "$1"
        status=$?
        if [ $status -le 128 ] || ! kill -0 "$1" 2>/dev/null; then return $status; fi
    done
}

await $output
passed=$?
# Nobody takes the output any more: then the command ends with us, as it would by SIGPIPE.
if [ $passed -gt 128 ]; then exit $passed; fi
await $errors
if [ -n "$feeder" ]; then kill "$feeder" 2>/dev/null; fi

IFS= read -r end <"$job/exit" || end=lost
case $end in
[0-9]*) status=$end ;;
HUP) status=129 ;;
INT) status=130 ;;
QUIT) status=131 ;;
ILL) status=132 ;;
TRAP) status=133 ;;
ABRT) status=134 ;;
BUS) status=135 ;;
FPE) status=136 ;;
KILL) status=137 ;;
USR1) status=138 ;;
SEGV) status=139 ;;
USR2) status=140 ;;
PIPE) status=141 ;;
ALRM) status=142 ;;
TERM) status=143 ;;
XCPU) status=152 ;;
XFSZ) status=153 ;;
VTALRM) status=154 ;;
PROF) status=155 ;;
SYS) status=159 ;;
*) refused ;;
esac
# Output that could not be written here is not a success.
if [ "$passed" != 0 ] && [ "$status" = 0 ]; then status=255; fi
exit "$status"
