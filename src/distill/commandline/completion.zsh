# Completion of `distill ...` and `python -m distill...` in zsh.  eval "$(distill completion zsh)", after compinit

_distill_ask() {
    local answer
    local -a found given
    given=("${(@Q)words[1,CURRENT-1]}" "${(Q)PREFIX}")
    answer="$("$@" --words "${given[@]}" 2>/dev/null)" || return 1
    found=("${(@f)answer}")
    compadd -S '' -- ${(M)found:#*[=./,]}
    compadd -- ${found:#*[=./,]}
    return 0
}

_distill() {
    _distill_ask "${(Q)words[1]/#\~/$HOME}" completion
}

_distill_python() {
    if [[ "${words[(r)-m]}" == -m ]]; then
        _distill_ask "${(Q)words[1]/#\~/$HOME}" -m distill.completion && return
    fi
    ${_distill_before:-_default} "$@"
}

# What completed `python` before stays in use for all else.
if [[ "${_comps[python]}" != _distill_python ]]; then
    _distill_before="${_comps[python]}"
fi
compdef _distill distill
compdef _distill_python python python3 python3.11 python3.12 python3.13 python3.14
