#!/usr/bin/env bash
# One job on a TPU slice of its own, through gcloud's queued resources.
#
#   launch/tpu_vm.sh launch/jobs/biomed.yaml [--dry-run]
#
# Checks the job, asks for the slice, waits for it, starts the container on all workers, follows their logs, and deletes the slice when
# the run is done, has failed, or this is interrupted. A slice that is not given in time makes way for the job's next one. Where a
# worker ends with 42, 75, 76, 134 or 137, or the slice is taken away, the same run starts again: on another slice where hosts of this one
# were of no use three times in a row (76, or out of reach). Should this machine go down meanwhile the workers go on, and the same command
# finds them again.
#
# Exit status: 0 done; 2 a mistake in the job, before anything was created; 1 gcloud refused something; 75 too many restarts; otherwise
# what a worker ended with.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

read_job "$@"
need gcloud

# ---- The commands ----

commands() { # of the job on the slice that is chosen
  QUEUED=(gcloud compute tpus queued-resources)
  AT=("--project=$JOB_PROJECT" "--zone=$JOB_ZONE" --quiet)
  CREATE=("${QUEUED[@]}" create "$JOB_RUN" "--node-id=$JOB_RUN" "${AT[@]}" "--accelerator-type=$JOB_ACCELERATOR"
    "--runtime-version=$JOB_RUNTIME" "--network=$JOB_NETWORK" "--service-account=$JOB_SERVICE_ACCOUNT"
    --scopes=https://www.googleapis.com/auth/cloud-platform "--labels=owner=$JOB_OWNER")
  if [[ -n $JOB_SUBNETWORK ]]; then CREATE+=("--subnetwork=$JOB_SUBNETWORK"); fi
  case $JOB_CAPACITY in
    spot) CREATE+=(--spot) ;;
    reserved) CREATE+=(--reserved) ;;
  esac
  STATE=("${QUEUED[@]}" describe "$JOB_RUN" "${AT[@]}" "--format=value(state.state)")
  TYPE=("${QUEUED[@]}" describe "$JOB_RUN" "${AT[@]}" "--format=value(tpu.nodeSpec[0].node.acceleratorType)")
  DELETE=("${QUEUED[@]}" delete "$JOB_RUN" "${AT[@]}" --force)
  WORKERS=(gcloud compute tpus tpu-vm ssh "$JOB_RUN" "${AT[@]}" --worker=all)

  # A container that is there already goes on: this machine may have been away. PID 1 of it is flexolmo, which saves when it is told to stop.
  RUN="sudo docker run --detach --name $JOB_RUN --privileged --network host --stop-timeout 300 $JOB_IMAGE $JOB_COMMAND"
  LOG_IN="sudo gcloud auth configure-docker ${JOB_IMAGE%%/*} --quiet"
  START=("${WORKERS[@]}" "--command=sudo docker container inspect $JOB_RUN >/dev/null 2>&1 || { $LOG_IN && $RUN; }")
  FOLLOW=("${WORKERS[@]}" "--command=sudo docker logs --follow --tail 1000 $JOB_RUN 2>&1 | sed -u \"s/^/\$(hostname -s): /\"")
  CODES=("${WORKERS[@]}" "--command=sudo docker wait $JOB_RUN | sed \"s/^/\$(hostname -s) /\"")
  STOP=("${WORKERS[@]}" "--command=sudo docker stop $JOB_RUN")
  REMOVE=("${WORKERS[@]}" "--command=sudo docker rm --force $JOB_RUN")
}
commands

# ---- The steps ----

CREATED='' # or yes, once there may be something to delete

clean_up() { # clean_up STATUS
  [[ -n $CREATED ]] || return 0
  if (($1 > 128)); then # interrupted
    say "stopping the workers, which save first"
    try "${STOP[@]}" || true
  fi
  say "deleting $JOB_RUN"
  try "${DELETE[@]}" || say "could not delete it, and it costs until it is gone: $(show "${DELETE[@]}") ($complaint)"
}

choose_next() { # the next slice of the job's, after the last one the first
  ((JOB_CHOICES > 1)) || return 0
  choose "$(((JOB_CHOICE + 1) % JOB_CHOICES))"
  commands
}

# Goes by what is there already, which an earlier launch may have asked for. Where that is none of the job's slices, 1, and why.
choose_what_is_there() {
  local first=$JOB_CHOICE
  ((JOB_CHOICES > 1)) || return 0
  try "${TYPE[@]}" || { why="cannot see $JOB_RUN: $complaint" && return 1; }
  until [[ $answer == "$JOB_ACCELERATOR" ]]; do
    choose_next
    [[ $JOB_CHOICE != "$first" ]] || { why="$JOB_RUN is a $answer, which is none of the job's slices" && return 1; }
  done
}

# A slice that is ACTIVE: the one that is there, or a new one. Where that fails, 1, and why.
ready() {
  local before=none waited=0
  while :; do
    if ! try "${STATE[@]}"; then
      [[ $complaint == *NOT_FOUND* ]] || { why="cannot see $JOB_RUN: $complaint" && return 1; }
      answer=''
    fi
    [[ $answer == "$before" ]] || say "$JOB_RUN: ${answer:-asking for $JOB_TPU ($JOB_ACCELERATOR, $JOB_CAPACITY) in $JOB_ZONE}"
    before=$answer
    case $answer in
      ACTIVE)
        CREATED=yes
        choose_what_is_there
        return
        ;;
      FAILED | SUSPENDED) # taken away, or never given; it can only be deleted
        CREATED=yes
        local was=$answer
        why="the slice is $was"
        try "${DELETE[@]}" || why+=", and cannot be deleted: $complaint"
        # One that was taken away may be to be had again.
        if [[ $was == SUSPENDED ]]; then choose 0 && commands; else choose_next; fi
        return 1
        ;;
      '')
        local first=$CREATED
        CREATED=yes # even if this is interrupted before gcloud answers
        if ! try "${CREATE[@]}"; then
          why="cannot create the queued resource $JOB_RUN: $complaint"
          [[ -n $first ]] || { CREATED='' && die 1 "$why"; }
          return 1
        fi
        ;;
    esac
    patiently sleep "$POLL"
    [[ $answer == PROVISIONING ]] || waited=$((waited + POLL))
    if ((JOB_CHOICES > 1 && waited >= 60 * JOB_PATIENCE)); then
      say "no $JOB_TPU within $JOB_PATIENCE minutes"
      try "${DELETE[@]}" || { why="cannot delete $JOB_RUN: $complaint" && return 1; }
      choose_next
      waited=0
    fi
  done
}

HOPELESS=3 # attempts in a row: an accelerator that a process still holds may be let go of before
USELESS=0

# useless WHAT: hosts of this slice are of no use, which may end the slice. Says so in $why.
useless() {
  why=$1
  USELESS=$((USELESS + 1))
  ((USELESS >= HOPELESS)) || return 0
  why+=", $USELESS times in a row; asking for another slice"
  USELESS=0
  try "${DELETE[@]}" || why+=", but this one cannot be deleted: $complaint"
}

# The run, from its last checkpoint to its end. Where it has to start again, 1, and why.
attempt() {
  local worker workers bad='' status=0
  ready || return 1
  try "${START[@]}" || status=$?
  case $status in
    0) ;;
    125 | 126 | 127) die 1 "cannot start the container on every worker: $complaint" ;; # docker's own refusals
    *) useless "cannot reach every worker: $complaint" && return 1 ;;
  esac
  patiently "${FOLLOW[@]}" || true # whether it is over is for the next command to say
  try "${CODES[@]}" || { why="lost the workers: $complaint" && return 1; }
  mapfile -t workers < <(grep -xE '[^ ]+ [0-9]+' <<<"$answer") # host and exit code
  ((${#workers[@]} == JOB_HOSTS)) || { why="${#workers[@]} of $JOB_HOSTS workers answered" && return 1; }
  why=''
  for worker in "${workers[@]}"; do
    case ${worker#* } in
      0) ;;
      76) bad+=" ${worker% *}" ;;
      42 | 75 | 134 | 137 | 255) why=${why:-${worker% *} ended with ${worker#* }} ;; # 255 is Docker's: a host went down and came back
      *) die "${worker#* }" "${worker% *} ended with ${worker#* }, which starting again does not help; its last lines are above" ;;
    esac
  done
  [[ -n $bad || -n $why ]] || return 0
  try "${REMOVE[@]}" || true # so that the next attempt starts a new container
  if [[ -n $bad ]]; then useless "the accelerator cannot be used on$bad"; else USELESS=0; fi
  return 1
}

check_bucket
if [[ -n $DRY_RUN ]]; then
  show "${STATE[@]}"
  for ((choice = 0; choice < JOB_CHOICES; choice++)); do
    show "${CREATE[@]}"
    show "${START[@]}"
    choose_next
  done
  show "${FOLLOW[@]}"
  show "${CODES[@]}"
  show "${DELETE[@]}"
  exit
fi
until attempt; do again "$why"; done
say "done: $JOB_OUT"
