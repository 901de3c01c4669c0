#!/usr/bin/env bash
# Submit a pretraining and, after its success, what judges it:
#
#   slurm/chain.sh [--dry-run] [SBATCH OPTIONS] -- pretrain OPTIONS -- probe OPTIONS -- finetune OPTIONS
#
# The options of pretrain name its --run, which the others get as --encoder; finetune's --run is
# RUN-finetuned where none is given. A stage that fails cancels those that wait for it, and its log
# says so. Prints a line `STAGE JOB` for each. --dry-run prints the commands, the job script and the
# plan, which takes the options of `maepretrain plan` from PLAN, such as PLAN='--devices 8 --memory
# 80GB'.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
export MAEPRETRAIN=${MAEPRETRAIN:-$(dirname "$here")}
source "$here/job.sh"
dry=''
if [[ ${1:-} == --dry-run ]]; then
    dry=yes
    shift
fi

sbatch_options=()
while [[ $# -gt 0 && $1 != -- ]]; do
    sbatch_options+=("$1")
    shift
done

run='' parent=''
# Submit one stage, the verb first.
stage() {
    local verb=$1 script=eval.sbatch after=() words
    shift
    words=("$verb" "$@")
    if [[ -z $run ]]; then
        [[ $verb == pretrain ]] || refuse "the first stage is $verb and must be pretrain"
        run=$(option run "$@")
        [[ -n $run ]] || refuse "pretrain needs its --run, for the stages after it"
        script=pretrain.sbatch words=("$@")
    else
        words+=(--encoder "$run")
        [[ $verb != finetune || -n $(option run "$@") ]] || words+=(--run "$run-finetuned")
        after=("--dependency=afterok:$parent" --kill-on-invalid-dep=yes)
    fi
    set -- sbatch --parsable --job-name="$verb" ${after[@]+"${after[@]}"} \
        ${sbatch_options[@]+"${sbatch_options[@]}"} "$here/$script" "${words[@]}"
    if [[ -n $dry ]]; then
        echo "${@@Q}"
        # shellcheck disable=SC2086
        [[ $verb != pretrain ]] || bash "$here/$script" --dry-run ${PLAN:-} "${words[@]}"
        parent=${parent:-JOB}
        return
    fi
    local job
    job=$("$@")
    parent=${parent:-${job%%;*}}
    echo "$verb ${job%%;*}"
}

[[ $# -gt 0 ]] || refuse "no stage: slurm/chain.sh [SBATCH OPTIONS] -- pretrain OPTIONS -- ..."
words=()
for word in "${@:2}" --; do
    if [[ $word == -- ]]; then
        [[ ${#words[@]} -gt 0 ]] || refuse "a stage is empty"
        stage "${words[@]}"
        words=()
    else
        words+=("$word")
    fi
done
