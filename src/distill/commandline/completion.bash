# Completion of `distill ...` and `python -m distill...` in bash.  eval "$(distill completion bash)"

_distill_ask() {
    local line="${COMP_LINE:0:COMP_POINT}" answer
    answer="$("$@" --line "$line" "$COMP_WORDBREAKS" 2>/dev/null)" || return 1
    COMPREPLY=()
    [ -n "$answer" ] && mapfile -t COMPREPLY <<<"$answer"
    return 0
}

_distill() {
    _distill_ask "${COMP_WORDS[0]/#\~/$HOME}" completion
}

_distill_python() {
    if [[ "${COMP_LINE:0:COMP_POINT}" =~ [[:space:]]-m[[:space:]]+d ]]; then
        _distill_ask "${COMP_WORDS[0]/#\~/$HOME}" -m distill.completion && return
    fi
    compopt +o nospace
    COMPREPLY=()
    if [ -n "$_distill_before" ]; then
        "$_distill_before" "$@"
    fi
}

# What completed `python` before stays in use for all else; bash-completion loads its own when it is first wanted.
if declare -F _comp_load >/dev/null; then
    _comp_load python 2>/dev/null
elif declare -F _completion_loader >/dev/null; then
    _completion_loader python 2>/dev/null
fi
if [ "$(complete -p python 2>/dev/null | grep -c _distill_python)" = 0 ]; then
    _distill_before="$(complete -p python 2>/dev/null | sed -n 's/.*-F \([^ ]*\).*/\1/p')"
fi

complete -o nospace -F _distill distill
complete -o nospace -o bashdefault -o default -F _distill_python \
    python python3 python3.11 python3.12 python3.13 python3.14
