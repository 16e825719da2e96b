# Completion of `distill ...` and `python -m distill...` in fish.  distill completion fish | source

function __distill_ask
    set -l before (commandline -opc)
    set -l word (commandline -ct | string collect)
    $argv --words $before "$word" 2>/dev/null
end

function __distill_is_module
    set -l before (commandline -opc)
    contains -- -m $before; and string match -q 'd*' -- $before (commandline -ct)
end

complete -c distill -f -a '(__distill_ask (commandline -opc)[1] completion)'
for python in python python3 python3.11 python3.12 python3.13 python3.14
    complete -c $python -n __distill_is_module -f \
        -a '(__distill_ask (commandline -opc)[1] -m distill.completion)'
end
