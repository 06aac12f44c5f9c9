#!/usr/bin/env bash
# One job on a TPU slice, through SkyPilot's managed jobs; launch/skypilot.yaml is the task.
#
#   launch/skypilot.sh launch/jobs/biomed.yaml [--dry-run]
#
# Checks the job, launches it and follows its log. SkyPilot restarts the run, and deletes the slice when it is over; interrupting this
# cancels the job.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

read_job "$@"
[[ $JOB_CHOICES == 1 ]] || die 2 "fallbacks has $((JOB_CHOICES - 1)); expected none with SkyPilot; launch/tpu_vm.sh takes them"
[[ $JOB_SLICES == 1 ]] || die 2 "slices is $JOB_SLICES; expected 1 with SkyPilot; launch/gke_xpk.sh runs several"
# SkyPilot boots a v5e with the runtime of a v5p, which its command line cannot change, and knows no TPU7x.
[[ $JOB_TPU == v5p:* || $JOB_TPU == v6e:* ]] || die 2 "tpu is $JOB_TPU; expected v5p or v6e with SkyPilot; use tpu_vm.sh or gke_xpk.sh"
[[ $JOB_CAPACITY != reserved ]] || die 2 "capacity is reserved; expected spot or on-demand with SkyPilot; use tpu_vm.sh or gke_xpk.sh"
need gcloud sky

PROJECT=(gcloud config get project)
LAUNCH=(sky jobs launch "$HERE/skypilot.yaml" --yes "--name=$JOB_RUN" "--infra=gcp/$JOB_REGION/$JOB_ZONE" "--gpus=tpu-$JOB_ACCELERATOR:1"
  "--image-id=docker:$JOB_IMAGE" "--config=gcp.vpc_name=$JOB_NETWORK" "--env=COMMAND=$JOB_COMMAND")
if [[ $JOB_CAPACITY == spot ]]; then LAUNCH+=(--use-spot); else LAUNCH+=(--no-use-spot); fi
CANCEL=(sky jobs cancel --yes "--name=$JOB_RUN")

LAUNCHED=''
clean_up() { # clean_up STATUS
  if [[ -n $LAUNCHED ]] && (($1 > 128)); then # otherwise it is over, or never began
    try "${CANCEL[@]}" || say "could not cancel $JOB_RUN, and it costs until it is: $(show "${CANCEL[@]}") ($complaint)"
  fi
}

# It launches in gcloud's project, whatever the job says.
call "cannot see gcloud's project" "${PROJECT[@]}"
[[ -n $DRY_RUN || $answer == "$JOB_PROJECT" ]] || die 2 "gcloud's project is '$answer'; expected gcloud config set project $JOB_PROJECT"
check_bucket
if [[ -n $DRY_RUN ]]; then
  show "${LAUNCH[@]}"
  exit
fi
LAUNCHED=yes
patiently "${LAUNCH[@]}" || die 1 "the job failed, or could not be launched; SkyPilot's last lines are above"
say "done: $JOB_OUT"
