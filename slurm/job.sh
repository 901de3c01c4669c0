# Functions of the job scripts, which source it inside SLURM, and outside of it for --dry-run.
#
# The batch shell gets USR1 ahead of the time limit, and USR1 or TERM at a preemption; it passes them
# on to all ranks. They agree on a step, save a checkpoint and end with 75, whereupon the job puts
# itself back into the queue and, at its next start, goes on from there.

refuse() {
    echo "maepretrain: error: $*" >&2
    exit 2
}

# `bash slurm/pretrain.sbatch --dry-run PLAN AND PRETRAIN OPTIONS`: the job script and the plan.
dry_run() {
    cat "$script"
    echo "# --- $here/job.sh"
    cat "$here/job.sh"
    echo "# --- maepretrain plan ${*@Q}"
    maepretrain plan "$@"
    exit
}

# The value of an option among the others, written `--name value` or `--name=value`.
option() {
    local name=$1 found='' next=''
    shift
    for word in "$@"; do
        [[ -z $next ]] || found=$word
        next=''
        case $word in
            "--$name") next=yes ;;
            "--$name="*) found=${word#*=} ;;
        esac
    done
    echo "$found"
}

# Choose the run folder, and the options that SLURM decides: nodes, devices, seeds or values of an array.
# Sets `run` and `slurm_options`, options for the verb.
choose_run_folder() {
    run=$(option run "$@")
    run=${run:-runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
    local word name value values
    for word in "$@"; do
        case $word in
            --trainer.devices* | --trainer.num_nodes*)
                refuse "$word: nodes and devices come from SLURM; take sbatch --nodes and" \
                    "--ntasks-per-node" ;;
        esac
    done
    slurm_options=()
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        # SWEEP=optim.base_lr=1e-4:2e-4 has a value for each task; without it they are seeds.
        name=${SWEEP:-seed} value=$SLURM_ARRAY_TASK_ID
        if [[ $name == *=* ]]; then
            IFS=: read -ra values <<<"${name#*=}"
            value=${values[SLURM_ARRAY_TASK_ID]:-}
            [[ -n $value ]] || refuse "SWEEP $SWEEP has no value number $SLURM_ARRAY_TASK_ID"
        fi
        name=${name%%=*}
        run=$run/$name-$value
        slurm_options+=("--$name" "$value")
    fi
    if ! mkdir -p "$run" || [[ ! -w $run ]]; then
        refuse "no write access to run folder $run"
    fi
    slurm_options+=(--run "$run" --trainer.num_nodes "$nodes" --trainer.devices "$tasks")
}

# Read the nodes and tasks of the job; refuse those that would hang or leave GPUs idle.
read_allocation() {
    nodes=$SLURM_JOB_NUM_NODES
    [[ $SLURM_TASKS_PER_NODE =~ ^[0-9]+(\(x[0-9]+\))?$ ]] ||
        refuse "tasks per node $SLURM_TASKS_PER_NODE must be equal on all nodes"
    tasks=${SLURM_TASKS_PER_NODE%%(*}
    # Since SLURM 22.05 srun does not take it from sbatch.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    if [[ -n ${SLURM_GPUS_ON_NODE:-} && $SLURM_GPUS_ON_NODE != "$tasks" ]]; then
        refuse "$tasks tasks on a node do not match its $SLURM_GPUS_ON_NODE GPUs: one task a GPU"
    fi
    export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    if ! srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --quiet \
        timeout 20 getent hosts "$MASTER_ADDR" >/dev/null; then
        refuse "MASTER_ADDR $MASTER_ADDR does not resolve on every node: set MASTER_ADDR to a" \
            "name or address that does"
    fi
}

# Run `maepretrain VERB OPTIONS...` on all tasks, and finish the job as they ended.
run_on_all_tasks() {
    local code=0
    step='' stopping=''
    trap 'forward_signal USR1' USR1
    trap 'forward_signal TERM' TERM
    errors=$(mktemp -d "$PWD/.errors-$SLURM_JOB_ID-XXXXXX")
    export MAEPRETRAIN_ERRORS=$errors
    # --label: each line begins with its rank. A rank that fails ends the others, which would wait
    # for it.
    srun --label --kill-on-bad-exit=1 ${container[@]+"${container[@]}"} maepretrain "$@" &
    step=$!
    [[ -z $stopping ]] || forward_signal USR1
    # A signal wakes the shell before the ranks have ended.
    while
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null
    do :; done
    code=0
    wait "$step" || code=$?
    finish "$code"
}

forward_signal() {
    stopping=yes
    [[ -z $step ]] || kill -s "$1" "$step" 2>/dev/null || true
}

finish() {
    local code=$1 state first
    first=$(find "$errors" -name 'rank-*.txt' -printf '%T@ %f\n' | sort -n | head -n 1)
    first=${first#* }
    # What scancel ended is in the state CANCELLED while this script still runs.
    state=$(job_state)
    if [[ $state == CANCELLED ]]; then
        echo "job $SLURM_JOB_ID was cancelled: it does not come back" >&2
        code=143
    elif [[ $code != 0 ]] && to_be_continued "$code"; then
        if [[ $state == RUNNING ]]; then
            echo "job $SLURM_JOB_ID goes back into the queue, and on from its last checkpoint" >&2
            scontrol requeue "$SLURM_JOB_ID" >/dev/null 2>&1 || true
        else
            # SLURM has decided: COMPLETING is what scancel ended, and what a preemption puts back.
            echo "job $SLURM_JOB_ID was ended by SLURM; where it comes back, it goes on from its" \
                "last checkpoint" >&2
        fi
        code=75
    elif [[ $code != 0 ]]; then
        # srun's own code may be that of a rank which it ended.
        [[ -z $first ]] || ! grep -q '^maepretrain: error:' "$errors/$first" || code=2
        echo "job $SLURM_JOB_ID failed with exit code $code" >&2
        cancel_dependents
        if [[ -n $first ]]; then
            echo "the first rank that failed, ${first%.txt}:" >&2
            cat "$errors/$first" >&2
        fi
    fi
    rm -rf "$errors"
    exit "$code"
}

# The state of this job; a controller that is busy is asked again.
job_state() {
    local state=''
    for _ in 1 2 3 4 5; do
        state=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null |
            grep -o 'JobState=[A-Z]*') && break
        sleep 1
    done
    echo "${state#*=}"
}

# 75 is what ranks end with that SLURM stopped. Where one's 75 ended the others first, srun says
# another number, but the run folder has it; so does this shell, if they had not begun to listen.
to_be_continued() {
    [[ $1 == 75 || -n $stopping ]] && return
    [[ -n ${run:-} && $run/status.json -nt $errors ]] &&
        grep -q '"state": "preempted"' "$run/status.json"
}

# Jobs that wait for the success of this one would wait for ever.
cancel_dependents() {
    local others
    others=$(squeue --noheader --sort=i --format='%i %E' |
        awk -v id="$SLURM_JOB_ID" '$2 ~ "after(ok|corr):" id "([^0-9]|$)" { print $1 }' |
        paste -sd ' ')
    if [[ -n $others ]]; then
        echo "cancelled, since they wait for its success: jobs $others" >&2
        # shellcheck disable=SC2086
        scancel $others || true
    fi
}
