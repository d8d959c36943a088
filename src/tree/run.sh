#!/bin/sh
# Runs a command in this virtual machine as if it were here: its arguments as they are, stdin, stdout and stderr apart, its
# exit status (128 + n for a signal). Made of the files of jobs/ alone. Names of variables start with _run_, so that those of
# the caller are still what they were when -e asks for them.

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
    cat "$_run_job/error" >&2 3<&-
    exit 255
}

_run_vm=${0%/*}
[ -e "$_run_vm/jobs/.clone" ] || _run_vm=@HOME@ # by another name, such as a symlink
{ command exec 3<"$_run_vm/jobs/.clone"; } 2>/dev/null || {
    cat "$_run_vm/error" >&2
    die "cannot make a job in $_run_vm/jobs"
}
# The job lives as long as descriptor 3 is open: until this process has ended, in whatever way.
IFS= read -r _run_job <&3 || die "cannot make a job in $_run_vm/jobs"
_run_job=$_run_vm/jobs/$_run_job

variable() { # KEY=VALUE or KEY
    _run_key=${1%%=*}
    case $_run_key in '' | [0-9]* | *[!A-Za-z0-9_]*) die "-e $_run_key: no name for a variable" ;; esac
    case $1 in
    *=*) _run_value=${1#*=} ;;
    *)
        eval "_run_set=\${$_run_key+set} _run_value=\${$_run_key-}"
        # shellcheck disable=SC2154 # eval sets it
        [ -n "$_run_set" ] || return 0
        ;;
    esac
    printf '%s\n' "$_run_value" >"$_run_job/env/$_run_key" || refused
}

_run_input=yes
while getopts C:e:hns:t: _run_option; do
    case $_run_option in
    C) printf '%s\n' "$OPTARG" >"$_run_job/cwd" || refused ;;
    e) variable "$OPTARG" ;;
    h) usage; exit 0 ;;
    n) _run_input= ;;
    s) printf '%s\n' "$OPTARG" >"$_run_job/shell" || refused ;;
    t) printf '%s\n' "$OPTARG" >"$_run_job/timeout" || refused ;;
    *) usage >&2; exit 255 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || { usage >&2; exit 255; }

# What cannot be passed on at once holds the command back.
echo wait >"$_run_job/overflow" && echo 256K >"$_run_job/output_max" || refused

if [ -t 0 ]; then _run_input=; fi
if [ -n "$_run_input" ]; then { command exec 4<&0; } 2>/dev/null || _run_input=; fi
# What was closed: ssh opens that, too.
[ -e /dev/fd/1 ] || exec >/dev/null
[ -e /dev/fd/2 ] || exec 2>/dev/null

# Ctrl-C reaches everybody here: those in the background ignore it, and the command gets it there.
forward() { # SIGNAL STATUS
    if [ -n "$_run_feeder" ]; then kill "$_run_feeder" 2>/dev/null; fi
    echo "$1 5" 2>/dev/null >"$_run_job/signal" || exit "$2"
}
_run_feeder=
_run_broken=
trap 'forward INT 130' INT
trap 'forward TERM 143' TERM
trap 'forward HUP 129' HUP
trap '_run_broken=255' USR1
trap '_run_broken=141' USR2

printf '%s\0' "$@" >"$_run_job/argv" || refused

if [ -n "$_run_input" ]; then
    cat <&4 2>/dev/null >"$_run_job/stdin" 3<&- &
    _run_feeder=$!
    exec 4<&-
else
    : >"$_run_job/stdin"
fi

# Output that nobody takes any more ends the command, whichever it is and whatever else there is.
pass() { # STREAM
    cat "$_run_job/$1"
    _run_status=$?
    case $_run_status in
    0) ;;
    141) kill -USR2 $$ 2>/dev/null ;; # SIGPIPE
    *) kill -USR1 $$ 2>/dev/null ;;
    esac
    exit $_run_status
}
(pass stderr) >&2 3<&- &
_run_errors=$!
(pass stdout) 3<&- &
_run_output=$!

# Sets _run_passed. `wait` also returns when a signal has come.
await() {
    while :; do
        wait "$1"
        _run_passed=$?
        if [ -n "$_run_broken" ]; then
            # At the end of a command that was lost both fail, and its own end is what counts.
            IFS= read -r _run_state <"$_run_job/status"
            [ "$_run_state" = exited ] || exit "$_run_broken"
            _run_broken=
        fi
        if [ $_run_passed -le 128 ] || ! kill -0 "$1" 2>/dev/null; then return; fi
    done
}

await $_run_output
_run_first=$_run_passed
await $_run_errors
if [ -n "$_run_feeder" ]; then kill "$_run_feeder" 2>/dev/null; fi

IFS= read -r _run_end <"$_run_job/exit" || _run_end=lost
case $_run_end in
[0-9]*) _run_status=$_run_end ;;
HUP) _run_status=129 ;;
INT) _run_status=130 ;;
QUIT) _run_status=131 ;;
ILL) _run_status=132 ;;
ABRT) _run_status=134 ;;
FPE) _run_status=136 ;;
KILL) _run_status=137 ;;
USR1) _run_status=138 ;;
SEGV) _run_status=139 ;;
USR2) _run_status=140 ;;
PIPE) _run_status=141 ;;
ALRM) _run_status=142 ;;
TERM) _run_status=143 ;;
UNNAMED) die "a signal that SSH has no name for has ended the command" ;;
*) refused ;;
esac
# Output that could not be written here is not a success.
if [ "$_run_first$_run_passed" != 00 ] && [ "$_run_status" = 0 ]; then _run_status=255; fi
exit "$_run_status"
