# Completion of bash for vmsfs, and for the file `run` of a VM.
#
# As /usr/share/bash-completion/completions/vmsfs, and by the name `run` beside it, it is loaded when it is needed; or
# source it in ~/.bashrc. Nothing of the package bash-completion is used.
#
# What there is to complete is what `vmsfs --help` says.

# The word at the cursor as it was typed: bash breaks it up at = and :.
_vmsfs_word() {
    local line=${COMP_LINE:0:COMP_POINT}
    _vmsfs_typed=${line##*[[:space:]]}
    _vmsfs_before=${line%"$_vmsfs_typed"}
    _vmsfs_before=${_vmsfs_before%"${_vmsfs_before##*[![:space:]]}"}
    _vmsfs_before=${_vmsfs_before##*[[:space:]]}
}

# Offers words for the whole of what was typed; bash is given what is behind the last of its breaks.
_vmsfs_offer() {
    local word prefix=
    case $_vmsfs_typed in
    *[=:]*) [[ $COMP_WORDBREAKS == *=* ]] && prefix=${_vmsfs_typed%"${_vmsfs_typed##*[=:]}"} ;;
    esac
    while IFS= read -r word; do
        if [[ $word == "$_vmsfs_typed"* ]]; then COMPREPLY+=("${word#"$prefix"}"); fi
    done
    # A folder is gone into.
    if [[ ${#COMPREPLY[@]} = 1 && ${COMPREPLY[0]} == */ ]]; then compopt -o nospace; fi
}

# The folders of images, by name: where `-o images=` says, and in the usual places.
_vmsfs_images() {
    local dir json
    for dir in "$1" "${XDG_DATA_HOME:-$HOME/.local/share}/vmsfs/images" {/var/lib,/usr/local/share,/usr/share}/vmsfs/images; do
        [ -n "$dir" ] || continue
        for json in "$dir"/*/image.json; do
            [ -e "$json" ] || continue
            json=${json%/image.json}
            printf '%s\n' "${json##*/}"
        done
    done
}

# What the value of an option can be: `kind` is what --help has behind its =.
_vmsfs_values() { # NAME KIND TYPED OPTIONS
    local images=
    case $2 in
    *'|'*) printf '%s\n' "${2//|/$'\n'}" ;;
    DIR) compgen -d -S / -- "$3" ;;
    FILE) compgen -f -- "$3" ;;
    *)
        case ",$4" in *,images=*) images=${4#*images=} images=${images%%,*} ;; esac
        if [ "$1" = image ]; then _vmsfs_images "$images"; fi
        ;;
    esac
}

# The list behind -o, of which the last item is not complete.
_vmsfs_list() { # VMSFS PREFIX
    local prefix=$2 given='' item help name kind value
    item=${_vmsfs_typed#"$prefix"}
    case $item in *,*) given=${item%,*}, item=${item##*,} ;; esac
    help=$(LC_ALL=C "$1" --help 2>/dev/null | sed -n 's/^ *\(-[a-z], \)\{0,1\}-o \([^ ]*\).*/\2/p')
    while IFS='=' read -r name kind; do
        case ,$given in *",$name="* | *",$name,"*) continue ;; esac
        if [ "${item%%=*}" = "$name" ] && [ "$item" != "$name" ]; then
            while IFS= read -r value; do
                printf '%s\n' "$prefix$given$name=$value"
            done < <(_vmsfs_values "$name" "$kind" "${item#*=}" "$given")
        else
            printf '%s\n' "$prefix$given$name${kind:+=}"
        fi
    done <<<"$help"
}

_vmsfs() {
    local _vmsfs_typed _vmsfs_before
    COMPREPLY=()
    _vmsfs_word
    if [ "$_vmsfs_before" = -o ]; then
        compopt -o nospace
        _vmsfs_offer < <(_vmsfs_list "$1" '')
    elif [[ $_vmsfs_typed == -o?* ]]; then
        compopt -o nospace
        _vmsfs_offer < <(_vmsfs_list "$1" -o)
    elif [[ $_vmsfs_typed == -* ]]; then
        _vmsfs_offer < <(LC_ALL=C "$1" --help 2>/dev/null |
            sed -n 's/^    \(-.*\)/\1/p' | sed 's/  .*//' | tr -s ', ' '\n' | grep -xE -e '-[a-z]|-[A-Z]|--[a-z]+' | sort -u)
    else
        compopt -o filenames
        _vmsfs_offer < <(compgen -d -- "$_vmsfs_typed")
        if [ "$COMP_CWORD" = 1 ]; then _vmsfs_offer <<<doctor; fi
    fi
}

# Does something in a VM that runs, and prints what that says: nothing of it waits long.
_vmsfs_in_guest() { # RUN COMMAND...
    local vm=${1%/run}
    [ "$(cat "$vm/status" 2>/dev/null)" = running ] || return
    "$1" -n -t 3 "${@:2}" 2>/dev/null
}

# The options of `run`, and at which word of the line its command is (0: not there yet).
_vmsfs_run_command() {
    local i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
        --) echo $((i + 1)); return ;;
        -[Cest]) i=$((i + 1)) ;;
        -e*) ;;
        -*) ;;
        # bash has broken -e KEY=VALUE up.
        =) i=$((i + 1)) ;;
        *) if [ "${COMP_WORDS[i + 1]-}" = = ]; then continue; fi; echo "$i"; return ;;
        esac
    done
    echo 0
}

# shellcheck disable=SC2016 # scripts for the guest's shell
_vmsfs_run() {
    local _vmsfs_typed _vmsfs_before run=$1 vm at
    case $run in '~'/*) run=$HOME/${run#'~/'} ;; esac
    vm=${run%/run}
    COMPREPLY=()
    # Another program of this name: bash's own completion.
    [ "$vm" != "$run" ] && [ -e "$vm/jobs" ] && [ -e "$vm/status" ] || return
    _vmsfs_word
    at=$(_vmsfs_run_command)
    if [ "$at" = 0 ] && [ "$_vmsfs_before" = -s ]; then
        _vmsfs_offer <<<$'login\nraw'
    elif [ "$at" = 0 ] && [ "$_vmsfs_before" = -e ]; then
        _vmsfs_offer < <(compgen -e; cd "$vm/env" && printf '%s\n' *)
    elif [ "$at" = 0 ] && [ "$_vmsfs_before" = -t ]; then
        :
    elif [ "$at" = 0 ] && [ "$_vmsfs_before" != -C ] && [[ $_vmsfs_typed == -* ]]; then
        _vmsfs_offer < <("$run" -h 2>/dev/null | sed -n 's/^  \(-[a-zA-Z]\).*/\1/p')
    elif [ "$at" = 0 ] && [ "$_vmsfs_before" != -C ] && [[ $_vmsfs_typed != */* ]]; then
        _vmsfs_offer < <(_vmsfs_in_guest "$run" sh -c 'IFS=:; for d in $PATH; do cd "$d" 2>/dev/null && ls; done' | sort -u)
    else
        # Files of the guest.
        compopt -o filenames
        _vmsfs_offer < <(_vmsfs_in_guest "$run" sh -c \
            'for f in "$1"*; do if [ -d "$f" ]; then echo "$f/"; elif [ -e "$f" ]; then echo "$f"; fi; done' sh "$_vmsfs_typed")
    fi
}

complete -F _vmsfs vmsfs
# By its last component bash finds it for any path, as in /vms/web/run.
complete -p run >/dev/null 2>&1 || complete -o bashdefault -o default -F _vmsfs_run run
