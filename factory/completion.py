"""Completion of run.py's commands, options and values in bash, zsh and fish.

Click completes a program that stands on the PATH. This one is a file, called as `python run.py`, `./run.py` or by its
path, so the scripts look for run.py among the words; for every other call of python they complete files.
Click's own completer answers: the same program, called with _RUN_PY_COMPLETE set.
"""

from __future__ import annotations

_BASH = """\
# Completion of run.py. In ~/.bashrc:  source <(python run.py completion bash)
_run_py_completion() {
    local at=0 response entry kind value
    if [[ ${COMP_WORDS[0]##*/} == python* ]]; then
        at=1
        if [[ ${COMP_WORDS[1]##*/} != run.py ]] || (( COMP_CWORD < 2 )); then
            COMPREPLY=( $(compgen -f -- "${COMP_WORDS[COMP_CWORD]}") )
            compopt -o filenames
            return
        fi
    fi
    COMPREPLY=()
    response=$(COMP_WORDS="${COMP_WORDS[*]:at}" COMP_CWORD=$((COMP_CWORD - at)) _RUN_PY_COMPLETE=bash_complete \\
        "${COMP_WORDS[@]:0:at+1}" 2>/dev/null)
    while IFS=, read -r kind value; do
        case $kind in
            dir) COMPREPLY+=( $(compgen -d -- "${COMP_WORDS[COMP_CWORD]}") ); compopt -o dirnames ;;
            file) COMPREPLY+=( $(compgen -f -- "${COMP_WORDS[COMP_CWORD]}") ); compopt -o filenames ;;
            plain) COMPREPLY+=( "$value" ) ;;
        esac
    done <<< "$response"
}
complete -o nosort -F _run_py_completion run.py python python3
"""

_ZSH = """\
# Completion of run.py. In ~/.zshrc, after compinit:  source <(python run.py completion zsh)
_run_py_completion() {
    local at=0 kind key descr
    local -a response program plain described
    if [[ ${words[1]:t} == python* ]]; then
        at=1
        if [[ ${words[2]:t} != run.py ]] || (( CURRENT < 3 )); then
            if (( $+functions[_python] || $+aliases[_python] )); then _python; else _files; fi
            return
        fi
    fi
    program=("${(@)words[1,at+1]}")
    response=("${(@f)$(COMP_WORDS="${(j: :)words[at+1,-1]}" COMP_CWORD=$((CURRENT - 1 - at)) \\
        _RUN_PY_COMPLETE=zsh_complete "${program[@]}" 2>/dev/null)}")
    for kind key descr in ${response}; do
        case $kind in
            plain) if [[ $descr == _ ]]; then plain+=("$key"); else described+=("${key//:/\\\\:}:$descr"); fi ;;
            dir) _path_files -/ ;;
            file) _path_files -f ;;
        esac
    done
    if (( $#described )); then _describe -V unsorted described -U; fi
    if (( $#plain )); then compadd -U -V unsorted -a plain; fi
}
compdef _run_py_completion run.py python python3
"""

_FISH = """\
# Completion of run.py. In ~/.config/fish/config.fish:  python run.py completion fish | source
function _run_py_at
    set -l words (commandline -opc)
    test (count $words) -ge 2; and string match -q -- python\\* (basename -- $words[1])
    and test (basename -- $words[2]) = run.py
end
function _run_py_completion
    set -l words (commandline -opc)
    set -l program $words[1]
    if _run_py_at
        set program $words[1..2]
        set words $words[2..-1]
    end
    set -l current (commandline -ct)
    set -lx COMP_WORDS "$words $current"
    set -lx COMP_CWORD "$current"
    for line in (env _RUN_PY_COMPLETE=fish_complete $program 2>/dev/null)
        set -l parts (string split -m 1 "," -- $line)
        switch $parts[1]
            case dir
                __fish_complete_directories $current
            case file
                __fish_complete_path $current
            case plain
                echo $parts[2]
        end
    end
end
complete --no-files --command run.py --arguments "(_run_py_completion)"
for python in python python3
    complete --no-files --command $python --condition _run_py_at --arguments "(_run_py_completion)"
end
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(shell: str) -> str:
    """Return the script that a shell reads at its start."""
    return _SCRIPTS[shell]
