# shellcheck shell=bash
# Prepares the current shell for reproducible runs; source it from bash or zsh, in the repository:
#
#     source ./scripts/setup_runtime_env.sh
#
# What is already set to something usable stays. The model hub is the official one, unless HF_ENDPOINT names another or
# only the mirror answers. It takes at most six seconds, never fails, and leaves behind nothing but the variables it
# names: whatever goes wrong is said and passed over, also under `set -euo pipefail`.

if { [ -n "${BASH_SOURCE-}" ] && [ "${BASH_SOURCE-}" = "$0" ]; } || [ "${ZSH_EVAL_CONTEXT-}" = toplevel ]; then
    printf '%s\n' "a script cannot set variables of the shell that runs it; source it: source $0" >&2
    exit 1 # of the child process that executes this file, never of a shell that sources it
fi

_difftrain_runtime_env() {
    [ -n "${HF_ENDPOINT-}" ] || unset HF_ENDPOINT # set but empty, it would be taken for an address
    local official=https://huggingface.co mirror=https://hf-mirror.com

    # The two settings with which cuBLAS gives the same bits in every run.
    case "${CUBLAS_WORKSPACE_CONFIG-}" in
        :4096:8 | :16:8) ;;
        *) export CUBLAS_WORKSPACE_CONFIG=:4096:8 ;;
    esac
    export CUBLAS_WORKSPACE_CONFIG
    # Equal string hashes, so equal set orders, in every process.
    export PYTHONHASHSEED="${PYTHONHASHSEED:-0}"
    # Tokenizers in forked data workers would warn, and may deadlock.
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

    printf '%s\n' "CUBLAS_WORKSPACE_CONFIG=$CUBLAS_WORKSPACE_CONFIG" "PYTHONHASHSEED=$PYTHONHASHSEED" \
        "TOKENIZERS_PARALLELISM=$TOKENIZERS_PARALLELISM" || :

    if _difftrain_is_on "${HF_HUB_OFFLINE-}" || _difftrain_is_on "${TRANSFORMERS_OFFLINE-}"; then
        printf '%s\n' "hub: offline mode is on; not asked, HF_ENDPOINT left as it is" || :
    elif [ -n "${HF_ENDPOINT-}" ]; then
        export HF_ENDPOINT
        printf '%s\n' "hub: HF_ENDPOINT=$HF_ENDPOINT, as it was set" || :
    elif ! command -v curl >/dev/null 2>&1; then
        printf '%s\n' "hub: $official; not checked, for want of curl" || :
    elif _difftrain_answers "$official"; then
        printf '%s\n' "hub: $official" || :
    elif _difftrain_answers "$mirror"; then
        export HF_ENDPOINT="$mirror"
        printf '%s\n' "hub: $official does not answer, its mirror does: HF_ENDPOINT=$HF_ENDPOINT" || :
    else
        printf '%s\n' "hub: neither $official nor $mirror answers: offline; HF_ENDPOINT left as it is" || :
    fi
}

_difftrain_is_on() { # the values that huggingface_hub takes for true
    case "$1" in
        1 | [oO][nN] | [yY][eE][sS] | [tT][rR][uU][eE]) return 0 ;;
        *) return 1 ;;
    esac
}

_difftrain_answers() {
    command curl -fsSIL --connect-timeout 2 --max-time 3 -o /dev/null "$1" >/dev/null 2>&1 </dev/null
}

_difftrain_runtime_env || :
unset -f _difftrain_runtime_env _difftrain_is_on _difftrain_answers
